"""What every request to the authority passes first, and how every refusal looks.

Guarantees: every path but those in `PUBLIC` demands a valid access token, before a byte of the body is read; a body is
limited in size and in values; an error is `{"error", "hint", "kind"}` with the error's own status, never a traceback or
a value, neither in the answer nor in the process's log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cloister.authority import uploads
from cloister.authority.bodies import MAX_FILE_REFS
from cloister.authority.nodes import Peer
from cloister.authority.service import Authority
from cloister.authority.uploads import LIMITED
from cloister.errors import CloisterError, InputError, QuotaExceededError
from cloister.policy.decide import MAX_SITE_CHARACTERS
from cloister.process import describe

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_PUBLIC_BODY_BYTES = 16 * 1024  # of callers who have shown nothing yet: an assertion is smaller
# In a body, of which 16 MiB of `[],[],…` would be gigabytes of objects. The longest list has 10,000 items.
MAX_COMMAS = 12_000
_log = logging.getLogger("cloister.authority")

PUBLIC = frozenset({
    "/v1/health", "/v1/info", "/v1/checkpoint", "/v1/token", "/v1/revoke", "/v1/jwks.json", "/v1/openapi.json",
    "/.well-known/oauth-authorization-server",
})  # fmt: skip
PEER = "cloister.peer"  # where the listener puts the client certificate (DER) into an ASGI scope


class Gate:
    """What every request passes first: token, then size. Outermost, so that no exception reaches the server's log.

    A body states its length: over the limit, in chunks, or longer than it says, it is refused.
    """

    def __init__(self, app: Any, authority: Authority) -> None:
        self._app = app
        self._sessions = authority.sessions
        self._uploads = authority.uploads

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer: Response | None = None
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            request = Request(scope)
            if scope["path"] not in PUBLIC:
                # In a thread, since it asks the database.
                request.state.caller = await run_in_threadpool(
                    self._sessions.authenticate,
                    request.headers.get("authorization"),
                    source_of(request),
                    peer_of(request),
                )
            if _too_large(request):
                refused = InputError("the request body is too large or of unknown length", "send less, with its length")
                answer = JSONResponse(refused.to_dict(), status_code=413)
            else:
                with self._turn(request):
                    await self._app(scope, _bounded(receive, request), watched)
        except CloisterError as error:
            answer = _error_response(error)
        except Exception as error:  # noqa: BLE001  (only the type: the text of a foreign exception may hold anything)
            _log.error("unexpected %s", type(error).__name__)
            answer = JSONResponse(describe(error), status_code=500)
        if answer is not None and not started:
            await answer(scope, receive, send)

    def _turn(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Held by what a caller may do only so often, and once at a time."""
        if request.method != "POST" or not LIMITED.fullmatch(request.url.path):
            return contextlib.nullcontext()
        return self._uploads.turn(request.state.caller.name)


def peer_of(request: Request) -> Peer | None:
    certificate = request.scope.get(PEER)
    return Peer.from_der(certificate) if certificate else None


def source_of(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _length(request: Request) -> int:
    """What a request says that its body has, in bytes; -1 if that is no number."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1


def _too_large(request: Request) -> bool:
    if request.method in ("GET", "HEAD"):
        return False
    limit = MAX_PUBLIC_BODY_BYTES if request.url.path in PUBLIC else MAX_BODY_BYTES
    if LIMITED.fullmatch(request.url.path):
        limit = uploads.MAX_BODY_BYTES
    return "transfer-encoding" in request.headers or not 0 <= _length(request) <= limit


def _bounded(receive: Callable[[], Awaitable[Any]], request: Request) -> Callable[[], Awaitable[Any]]:
    """A body as it comes, until it is longer than it said, or has so many commas that it has too many values."""
    length = _length(request)
    commas = MAX_COMMAS + (MAX_SITE_CHARACTERS if request.url.path == "/v1/policy" else 0)
    if LIMITED.fullmatch(request.url.path):
        commas += MAX_FILE_REFS

    async def bounded() -> Any:
        nonlocal length, commas
        message = await receive()
        part = message.get("body", b"")
        length, commas = length - len(part), commas - part.count(b",")
        if part and (length < 0 or commas < 0):
            raise HTTPException(413)
        return message

    return bounded


def _error_response(error: CloisterError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if isinstance(error, QuotaExceededError):
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error.to_dict(), status_code=error.status, headers=headers)


def handle_errors(app: FastAPI) -> None:
    @app.exception_handler(CloisterError)
    def ours(_request: Request, error: CloisterError) -> Response:
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> Response:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])[:200]
        refused = InputError(f"the request is not valid at {field}", "see /v1/openapi.json")
        return JSONResponse(refused.to_dict(), status_code=400)

    @app.exception_handler(UnicodeEncodeError)
    def not_text(_request: Request, _error: UnicodeEncodeError) -> Response:
        """JSON can spell half a character (a lone surrogate), which neither UTF-8 nor the database can hold."""
        return JSONResponse(InputError("the request holds text that is not Unicode", "correct it").to_dict(), 400)

    @app.exception_handler(HTTPException)
    def http(_request: Request, error: HTTPException) -> Response:
        refused = CloisterError(f"the server answered {error.status_code}", "see /v1/openapi.json")
        return JSONResponse(refused.to_dict(), status_code=error.status_code)
