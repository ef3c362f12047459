"""HTTP around the pipeline: the routes of the Open Inference Protocol v2 as an ASGI app.

    GET  /v2                       what this server is                    open
    GET  /v2/health/live, /ready   for probes                             open
    GET  /v2/models/NAME           inputs and outputs                     access token
    GET  /v2/models/NAME/ready     for Triton and KServe clients          access token
    POST /v2/models/NAME/infer     an answer                              access token

Guarantees: a body is read only after its sender was admitted, up to `MAX_BODY_BYTES` and for `BODY_TIMEOUT_S`; every
refusal is JSON with `error` (a string), `hint` and `kind`; no traceback, no exception text that is not ours and no
value of a request reaches a response or a log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloister.errors import CloisterError, InputError, NotFoundError, QuotaExceededError
from cloister.serving.pipeline import Pipeline
from cloister.serving.tables import MAX_BODY_BYTES

BODY_TIMEOUT_S = 10.0
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[dict[str, Any]]]


def build_app(pipeline: Pipeline) -> Starlette:
    """The app for one replica. Its state is the pipeline's; it has no lifespan."""

    async def server(_: Request) -> dict[str, Any]:
        return {"name": "cloister", "version": "2", "extensions": []}

    async def live(_: Request) -> dict[str, Any]:
        return {"live": True}

    async def ready(_: Request) -> dict[str, Any]:
        return {"ready": True}  # the port opens only after the model was verified

    async def metadata(request: Request) -> dict[str, Any]:
        pipeline.identify(request.headers.get("authorization"), request.path_params["name"])
        return pipeline.metadata()

    async def model_ready(request: Request) -> dict[str, Any]:
        pipeline.identify(request.headers.get("authorization"), request.path_params["name"])
        return {"name": request.path_params["name"], "ready": True}

    async def infer(request: Request) -> dict[str, Any]:
        claims = pipeline.admit(request.headers.get("authorization"), request.path_params["name"])
        return await pipeline.infer(claims, await _body(request))

    return Starlette(
        routes=[
            Route("/v2", _guarded(server)),
            Route("/v2/health/live", _guarded(live)),
            Route("/v2/health/ready", _guarded(ready)),
            Route("/v2/models/{name}", _guarded(metadata)),
            Route("/v2/models/{name}/ready", _guarded(model_ready)),
            Route("/v2/models/{name}/infer", _guarded(infer), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _no_route},
    )


def _guarded(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """Nothing but our own errors may shape a response: a foreign exception's text can quote the request."""

    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await handler(request), headers=_HEADERS)
        except CloisterError as error:
            return _refusal(error, has_credentials="authorization" in request.headers)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except Exception as error:  # noqa: BLE001  (the edge: whatever it is, it must not be shown)
            _log.error("a request failed: %s", type(error).__name__)
            return _refusal(CloisterError("the server failed on this request", "try again; tell the operator"))

    return endpoint


def _refusal(error: CloisterError, *, has_credentials: bool = False) -> Response:
    headers = dict(_HEADERS)
    if error.status == 401:  # RFC 6750 section 3: a code only if there were credentials
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if has_credentials else "Bearer"
    if isinstance(error, QuotaExceededError):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.to_dict(), status_code=error.status, headers=headers)


async def _no_route(request: Request, exception: Exception) -> Response:  # noqa: ARG001  (Starlette's signature)
    error = NotFoundError("there is nothing at this address", "POST /v2/models/NAME/infer")
    if isinstance(exception, HTTPException) and exception.status_code == 405:
        error.status = 405
    return _refusal(error)


async def _body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _input_error(415, "a compressed body is not accepted", "send it as it is")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise _input_error(408, "the body did not arrive in time", "send it again") from None
    return bytes(body)


def _too_large() -> InputError:
    return _input_error(413, f"the body is larger than {MAX_BODY_BYTES} bytes", "send fewer rows")


def _input_error(status: int, message: str, hint: str) -> InputError:
    error = InputError(message, hint)
    error.status = status
    return error
