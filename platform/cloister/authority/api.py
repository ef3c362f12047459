"""The authority over HTTP: thin routes, one for each method of the service.

Guarantees: every path but those in `PUBLIC` demands a valid access token, before a byte of the body is read; bodies
are validated by pydantic and limited in size; an error is `{"error", "hint", "kind"}` with the error's own status,
never a traceback or a value, neither in the answer nor in the process's log.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from cloister.authority.core import Caller
from cloister.authority.service import Authority
from cloister.canonical import b64, unb64
from cloister.errors import CloisterError, InputError, QuotaExceededError
from cloister.process import describe
from cloister.signing.tokens import JWT_BEARER

MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_PUBLIC_BODY_BYTES = 16 * 1024  # of callers who have shown nothing yet: an assertion is smaller
_log = logging.getLogger("cloister.authority")

PUBLIC = frozenset({"/v1/health", "/v1/info", "/v1/checkpoint", "/v1/token", "/v1/openapi.json"})

Name = Annotated[str, Field(min_length=1, max_length=63)]
Version = Annotated[int, Field(ge=1, le=999_999_999)]
Step = Annotated[int, Field(ge=0, le=1_000_000_000)]
Pem = Annotated[str, Field(min_length=1, max_length=4096)]
Base64 = Annotated[str, Field(max_length=8 * 1024 * 1024)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CodeDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", str_max_length=8 * 1024 * 1024)


class NewIdentity(Body):
    name: Name
    roles: Annotated[list[Name], Field(min_length=1, max_length=10)]
    public_key: Pem


class Signature(Body):
    keyid: Annotated[str, Field(max_length=128)] = ""
    sig: Annotated[str, Field(max_length=256)]


class Envelope(Body):
    """DSSE v1.0.2."""

    payload: Base64
    payloadType: Annotated[str, Field(max_length=100)]  # noqa: N815  (DSSE's name)
    signatures: Annotated[list[Signature], Field(min_length=1, max_length=8)]


class SealedDataset(Body):
    envelope: Envelope
    sealed_keys: Base64


class Budget(Body):
    epsilon: Finite
    delta: Finite


class Spec(Body):
    spec: dict[str, Any]


class NewRun(Spec):
    code_digest: CodeDigest
    public_key: Pem


class LeaseRequest(Body):
    rank: int = Field(ge=0, le=4096)
    public_key: Base64
    code_digest: CodeDigest


class Block(Body):
    first: Step
    last: Step


class Progress(Body):
    steps_done: Step
    rows_per_s: float = Field(ge=0, allow_inf_nan=False)


class TrainedModel(Body):
    manifest: Base64
    model_sha256: Sha256
    blob: Annotated[str, Field(max_length=300)]
    blob_sha256: Sha256
    holdout_accuracy: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Failure(Body):
    error: dict[str, str]


class Vote(Body):
    envelope: Envelope


class NewEndpoint(Body):
    model: Name
    public_key: Pem
    csr: Pem
    quota_requests: int = Field(ge=1, le=10_000_000)
    quota_window_s: int = Field(ge=1, le=86_400)


class ModelLeaseRequest(Body):
    public_key: Base64


class QuotaRequest(Body):
    subject: Name
    wanted: int = Field(ge=1, le=10_000)


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # `Gate` put it there; on a public path there is none, which is an error
    return caller


# At module level, because FastAPI resolves annotations there.
Who = Annotated[Caller, Depends(_caller)]


def create_app(authority: Authority) -> FastAPI:
    """The ASGI application over one authority."""
    app = FastAPI(
        title="Cloister authority", version="1", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json"
    )
    app.add_middleware(Gate, authority=authority)
    _handle_errors(app)
    _public_routes(app, authority)

    identities, datasets, runs = authority.identities, authority.datasets, authority.runs
    models, endpoints, log = authority.models, authority.endpoints, authority.log

    def route(method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return app.api_route("/v1" + path, methods=[method])

    @route("POST", "/identities")
    def register_identity(c: Who, body: NewIdentity) -> Any:
        return identities.register(c, body.name, body.roles, body.public_key)

    @route("GET", "/identities")
    def list_identities(c: Who) -> Any:
        return identities.list(c)

    @route("GET", "/datasets")
    def list_datasets(c: Who) -> Any:
        return datasets.list(c)

    @route("GET", "/datasets/{name}/next")
    def next_version(c: Who, name: Name) -> Any:
        return {"version": datasets.next_version(c, name), "blobs": datasets.blobs_url}

    @route("POST", "/datasets")
    def register_dataset(c: Who, body: SealedDataset) -> Any:
        return datasets.register(c, body.envelope.model_dump(), unb64(body.sealed_keys))

    @route("GET", "/datasets/{name}/versions/{version}")
    def show_dataset(c: Who, name: Name, version: Version) -> Any:
        return datasets.show(c, name, version) | {"blobs": datasets.blobs_url}

    @route("GET", "/datasets/{name}/budget")
    def show_budget(c: Who, name: Name) -> Any:
        return datasets.budget(c, name)

    @route("PUT", "/datasets/{name}/budget")
    def set_budget(c: Who, name: Name, body: Budget) -> Any:
        return datasets.set_budget(c, name, body.epsilon, body.delta)

    @route("POST", "/plans")
    def plan(c: Who, body: Spec) -> Any:
        return runs.plan(c, body.spec)

    @route("POST", "/runs")
    def submit(c: Who, body: NewRun) -> Any:
        return runs.submit(c, body.spec, body.code_digest, body.public_key)

    @route("GET", "/runs")
    def list_runs(c: Who) -> Any:
        return runs.list(c)

    @route("GET", "/runs/{run}")
    def show_run(c: Who, run: Name) -> Any:
        return runs.show(c, run)

    @route("POST", "/runs/{run}/stop")
    def stop_run(c: Who, run: Name) -> Any:
        return runs.stop(c, run)

    @route("POST", "/runs/{run}/leases")
    def lease(c: Who, run: Name, body: LeaseRequest) -> Any:
        return runs.lease(c, run, body.rank, unb64(body.public_key), body.code_digest)

    @route("POST", "/runs/{run}/blocks")
    def commit_block(c: Who, run: Name, body: Block) -> Any:
        return runs.commit_block(c, run, body.first, body.last)

    @route("POST", "/runs/{run}/progress")
    def progress(c: Who, run: Name, body: Progress) -> Any:
        return runs.progress(c, run, body.steps_done, body.rows_per_s)

    @route("POST", "/runs/{run}/model")
    def register_model(c: Who, run: Name, body: TrainedModel) -> Any:
        return models.register(
            c, run, unb64(body.manifest), body.model_sha256, body.blob, body.blob_sha256, body.holdout_accuracy
        )

    @route("POST", "/runs/{run}/failure")
    def fail(c: Who, run: Name, body: Failure) -> Any:
        return runs.fail(c, run, body.error)

    @route("GET", "/models")
    def list_models(c: Who) -> Any:
        return models.list(c)

    @route("GET", "/models/{name}/versions/{version}")
    def show_model(c: Who, name: Name, version: Version) -> Any:
        return models.show(c, name, version) | {"blobs": datasets.blobs_url}

    @route("POST", "/models/{name}/versions/{version}/promotion")
    def promote(c: Who, name: Name, version: Version) -> Any:
        return models.promote(c, name, version)

    @route("POST", "/models/{name}/versions/{version}/export")
    def export_model(c: Who, name: Name, version: Version, body: ModelLeaseRequest) -> Any:
        return models.export(c, name, version, unb64(body.public_key)) | {"blobs": datasets.blobs_url}

    @route("GET", "/approvals")
    def list_approvals(c: Who) -> Any:
        return models.approvals(c)

    @route("POST", "/approvals/{approval}/votes")
    def vote(c: Who, approval: Name, body: Vote) -> Any:
        return models.vote(c, approval, body.envelope.model_dump())

    @route("POST", "/endpoints")
    def deploy(c: Who, body: NewEndpoint) -> Any:
        return endpoints.deploy(
            c, body.model, body.public_key, body.csr.encode(), body.quota_requests, body.quota_window_s
        )

    @route("GET", "/endpoints")
    def list_endpoints(c: Who) -> Any:
        return endpoints.list(c)

    @route("POST", "/endpoints/{endpoint}/stop")
    def stop_endpoint(c: Who, endpoint: Name) -> Any:
        return endpoints.stop(c, endpoint)

    @route("POST", "/endpoints/{endpoint}/leases")
    def lease_model(c: Who, endpoint: Name, body: ModelLeaseRequest) -> Any:
        return endpoints.lease(c, endpoint, unb64(body.public_key))

    @route("POST", "/endpoints/{endpoint}/quota")
    def quota(c: Who, endpoint: Name, body: QuotaRequest) -> Any:
        return endpoints.quota_block(c, endpoint, body.subject, body.wanted)

    @route("GET", "/log")
    def search_log(c: Who, action: str = "", actor: str = "", limit: int = 50) -> Any:
        return log.search(c, action=action, actor=actor, limit=max(1, min(limit, 1000)))

    @route("GET", "/log/export")
    def export_log(c: Who) -> Any:
        return log.export(c)

    return app


def _public_routes(app: FastAPI, authority: Authority) -> None:
    @app.get("/v1/health")
    def health() -> Any:
        """Public."""
        return {"status": "ok"}

    @app.get("/v1/info")
    def info() -> Any:
        """Public: the authority's name and public keys."""
        return {
            "issuer": authority.url,
            "log_verifier_key": authority.log.verifier_key,
            "release_public_key": authority.release_public.decode(),
            "token_public_keys": {authority.identities.token_key_id: authority.token_public.decode()},
            "endpoint_ca": authority.endpoint_ca.decode(),
            "receiving_key": b64(authority.receiving_public),
        }

    @app.get("/v1/checkpoint")
    def checkpoint() -> Any:
        """Public: witnesses and rememberers need no identity."""
        return {"note": authority.log.checkpoint()}

    @app.post("/v1/token")
    def token(
        request: Request,
        grant_type: Annotated[str, Form(max_length=100)],
        assertion: Annotated[str, Form(max_length=4096)],
        resource: Annotated[str, Form(max_length=200)],
    ) -> Any:
        """Public: the assertion is the proof (RFC 7523)."""
        if grant_type != JWT_BEARER:
            raise InputError("the only grant type is the JWT bearer grant", f"send grant_type={JWT_BEARER}")
        return authority.identities.token(assertion, resource, _source(request))


class Gate:
    """What every request passes first: token, then size. Outermost, so that no exception reaches the server's log.

    A body must state its length: over the limit, in chunks or without a length it is refused.
    """

    def __init__(self, app: Any, authority: Authority) -> None:
        self._app = app
        self._identities = authority.identities

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
                request.state.caller = self._identities.authenticate(
                    request.headers.get("authorization"), _source(request)
                )
            if _too_large(request):
                refused = InputError("the request body is too large or of unknown length", "send less, with its length")
                answer = JSONResponse(refused.to_dict(), status_code=413)
            else:
                await self._app(scope, receive, watched)
        except CloisterError as error:
            answer = _error_response(error)
        except Exception as error:  # noqa: BLE001  (only the type: the text of a foreign exception may hold anything)
            _log.error("unexpected %s", type(error).__name__)
            answer = JSONResponse(describe(error), status_code=500)
        if answer is not None and not started:
            await answer(scope, receive, send)


def _source(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _too_large(request: Request) -> bool:
    if request.method in ("GET", "HEAD"):
        return False
    length = request.headers.get("content-length", "0")
    plain = length.isascii() and length.isdigit() and len(length) < 20
    limit = MAX_PUBLIC_BODY_BYTES if request.url.path in PUBLIC else MAX_BODY_BYTES
    return "transfer-encoding" in request.headers or not plain or int(length) > limit


def _error_response(error: CloisterError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if isinstance(error, QuotaExceededError):
        headers["Retry-After"] = str(error.retry_after_s)
    return JSONResponse(error.to_dict(), status_code=error.status, headers=headers)


def _handle_errors(app: FastAPI) -> None:
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
