"""The authority over HTTP: thin routes, one for each method of the service. What guards them is in `gate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Query, Request
from fastapi.responses import StreamingResponse

from cloister.authority.bodies import (
    Block,
    Budget,
    Checkpoint,
    CosignedNote,
    ElevatedAccess,
    EndingAt,
    Expiry,
    KeyRotation,
    LeaseRequest,
    ModelLeaseRequest,
    Name,
    NewAttempt,
    NewEndpoint,
    NewIdentity,
    NewKey,
    NewNode,
    NewRun,
    Opening,
    Policies,
    Progress,
    Question,
    QuotaRequest,
    Refusal,
    Roles,
    RunEnd,
    SealedDataset,
    Sealing,
    SigningRequest,
    Size,
    Spec,
    TrainedModel,
    Version,
    Vote,
    Word,
    WrappingKey,
)
from cloister.authority.core import Caller
from cloister.authority.gate import Gate, handle_errors, peer_of, source_of
from cloister.authority.log import Filter
from cloister.authority.service import Authority
from cloister.authority.sessions import TokenRequest
from cloister.canonical import b64, unb64
from cloister.signing.tokens import ALGORITHM, JWT_BEARER, TOKEN_EXCHANGE


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # `Gate` put it there; on a public path there is none, which is an error
    return caller


# At module level, because FastAPI resolves annotations there.
Who = Annotated[Caller, Depends(_caller)]


def create_app(authority: Authority) -> FastAPI:
    """The ASGI application over one authority."""
    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal}, "5XX": {"model": Refusal}}
    app = FastAPI(
        title="Cloister authority", version="1", docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json",
        responses=refusals, redirect_slashes=False,
    )  # fmt: skip
    app.add_middleware(Gate, authority=authority)
    handle_errors(app)
    _public_routes(app, authority)

    identities, datasets, runs = authority.identities, authority.datasets, authority.runs
    attempts, ends = authority.attempts, authority.ends
    registration, lifecycle, shredding = authority.registration, authority.lifecycle, authority.shredding
    models, endpoints, log = authority.models, authority.endpoints, authority.log
    approvals, access, policies, nodes = authority.approvals, authority.access, authority.policies, authority.nodes
    sessions, custody = authority.sessions, authority.custody

    def route(method: str, path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return app.api_route("/v1" + path, methods=[method])

    @route("POST", "/identities")
    def register_identity(c: Who, body: NewIdentity) -> Any:
        return identities.register(
            c, body.name, body.roles, public_key=body.public_key, kind=body.kind, issuer=body.issuer,
            subject=body.subject,
        )  # fmt: skip

    @route("GET", "/identities")
    def list_identities(c: Who) -> Any:
        return identities.list(c)

    @route("PUT", "/identities/{name}/roles")
    def change_roles(c: Who, name: Name, body: Roles) -> Any:
        return identities.change_roles(c, name, body.roles)

    @route("PUT", "/identities/{name}/key")
    def set_key(c: Who, name: Name, body: NewKey) -> Any:
        return identities.set_key(c, name, body.public_key, body.proof)

    @route("POST", "/identities/{name}/revocation")
    def revoke_identity(c: Who, name: Name) -> Any:
        return identities.revoke(c, name)

    @route("POST", "/identities/{name}/shredding")
    def shred_identity(c: Who, name: Name) -> Any:
        return identities.shred(c, name)

    @route("GET", "/me")
    def me(c: Who) -> Any:
        return identities.me(c)

    @route("POST", "/token-keys")
    def rotate_token_keys(c: Who, body: KeyRotation) -> Any:
        return sessions.rotate_keys(c, compromised=body.compromised)

    @route("GET", "/keys")
    def list_keys(c: Who) -> Any:
        return custody.list(c)

    @route("POST", "/keys/rotation")
    def rotate_key(c: Who, body: WrappingKey) -> Any:
        return custody.rotate(c, body.name)

    @route("POST", "/nodes")
    def register_node(c: Who, body: NewNode) -> Any:
        return nodes.register(c, body.name, body.public_key, body.region, body.assurance)

    @route("POST", "/nodes/certificate")
    def certify_node(c: Who, body: SigningRequest) -> Any:
        return nodes.certify(c, body.csr.encode())

    @route("POST", "/access")
    def request_access(c: Who, body: ElevatedAccess) -> Any:
        return access.request(c, body.role, body.seconds, body.reason)

    @route("GET", "/policy")
    def show_policy(c: Who) -> Any:
        return policies.show(c)

    @route("POST", "/policy")
    def propose_policy(c: Who, body: Policies) -> Any:
        return policies.propose(c, body.text, body.reason)

    @route("POST", "/policy/explain")
    def explain(c: Who, body: Question) -> Any:
        return policies.explain(c, body.principal, body.action, body.resource_type, body.resource)

    @route("GET", "/datasets")
    def list_datasets(c: Who) -> Any:
        return datasets.list(c)

    @route("POST", "/datasets/{name}/sealing")
    def keys_for_sealing(c: Who, name: Name, body: Sealing) -> Any:
        return registration.sealing(c, name, body.kind, body.region, unb64(body.public_key))

    @route("POST", "/datasets/{name}/openings")
    def keys_for_opening(c: Who, name: Name, body: Opening) -> Any:
        return registration.openings(c, name, body.purpose, body.files, unb64(body.public_key))

    @route("POST", "/datasets")
    def register_dataset(c: Who, body: SealedDataset) -> Any:
        return registration.register(c, body.envelope.model_dump(), unb64(body.sealed_keys), body.ends, body.reason)

    @route("POST", "/datasets/{name}/endings")
    def end_files(c: Who, name: Name, body: EndingAt) -> Any:
        return registration.end(c, name, body.version, body.ends, body.reason)

    @route("GET", "/datasets/{name}/versions/{version}")
    def show_dataset(c: Who, name: Name, version: Version) -> Any:
        return datasets.show(c, name, version)

    @route("GET", "/datasets/{name}/budget")
    def show_budget(c: Who, name: Name, version: Version | None = None) -> Any:
        return datasets.budget(c, name, version)

    @route("PUT", "/datasets/{name}/budget")
    def set_budget(c: Who, name: Name, body: Budget) -> Any:
        return datasets.set_budget(c, name, body.epsilon, body.delta, body.version)

    @route("POST", "/datasets/{name}/versions/{version}/key-destruction")
    def destroy_keys(c: Who, name: Name, version: Version) -> Any:
        return lifecycle.destroy_keys(c, name, version)

    @route("POST", "/datasets/{name}/versions/{version}/expiry")
    def expire(c: Who, name: Name, version: Version, body: Expiry) -> Any:
        return lifecycle.expire(c, name, version, early=body.early)

    @route("GET", "/erasures/{erasure}")
    def certificate(c: Who, erasure: Name) -> Any:
        return shredding.certificate(c, erasure)

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
        return ends.stop(c, run)

    @route("POST", "/runs/{run}/resume")
    def resume(c: Who, run: Name) -> Any:
        return ends.resume(c, run)

    @route("POST", "/runs/{run}/attempts")
    def open_attempt(c: Who, run: Name, body: NewAttempt) -> Any:
        return attempts.open(c, run, body.world_size, body.code_digest)

    @route("POST", "/runs/{run}/leases")
    def lease(c: Who, run: Name, body: LeaseRequest) -> Any:
        return attempts.lease(c, run, body.attempt, body.rank, unb64(body.public_key), body.code_digest)

    @route("POST", "/runs/{run}/blocks")
    def commit_block(c: Who, run: Name, body: Block) -> Any:
        return attempts.commit_block(c, run, body.attempt, body.first, body.last)

    @route("POST", "/runs/{run}/checkpoints")
    def checkpoint(c: Who, run: Name, body: Checkpoint) -> Any:
        return attempts.checkpoint(c, run, body.attempt, body.step, body.blob, body.sha256)

    @route("POST", "/runs/{run}/progress")
    def progress(c: Who, run: Name, body: Progress) -> Any:
        return attempts.progress(c, run, body.attempt, body.steps_done, body.rows_per_s)

    @route("POST", "/runs/{run}/model")
    def register_model(c: Who, run: Name, body: TrainedModel) -> Any:
        return models.register(
            c, run, unb64(body.manifest), body.model_sha256, body.blob, body.blob_sha256, body.evaluation,
            body.audit.model_dump(),
        )  # fmt: skip

    @route("POST", "/runs/{run}/end")
    def end(c: Who, run: Name, body: RunEnd) -> Any:
        return ends.end(c, run, body.envelope.model_dump(), body.error)

    @route("GET", "/models")
    def list_models(c: Who) -> Any:
        return models.list(c)

    @route("GET", "/models/{name}/versions/{version}")
    def show_model(c: Who, name: Name, version: Version) -> Any:
        return models.show(c, name, version)

    @route("POST", "/models/{name}/versions/{version}/promotion")
    def promote(c: Who, name: Name, version: Version) -> Any:
        return models.promote(c, name, version)

    @route("POST", "/models/{name}/versions/{version}/export")
    def export_model(c: Who, name: Name, version: Version, body: ModelLeaseRequest) -> Any:
        return models.export(c, name, version, unb64(body.public_key))

    @route("GET", "/approvals")
    def list_approvals(c: Who) -> Any:
        return approvals.list(c)

    @route("POST", "/approvals/{approval}/votes")
    def vote(c: Who, approval: Name, body: Vote) -> Any:
        return approvals.vote(c, approval, body.envelope.model_dump())

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

    @route("GET", "/endpoints/{endpoint}/changes")
    def changes(c: Who, endpoint: Name, after: Size = 0, policy: Size = 0) -> Any:
        return endpoints.changes(c, endpoint, after, policy)

    @route("GET", "/log")
    def search_log(
        c: Who, action: Word = "", actor: Word = "", outcome: Word = "", since: Word = "", until: Word = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> Any:  # fmt: skip
        wanted = Filter(action=action, actor=actor, outcome=outcome, since=since, until=until, limit=limit)
        return log.search(c, wanted)

    @route("GET", "/log/export")
    def export_log(c: Who, form: Word = "cloister", first: Size = 0) -> Any:
        return StreamingResponse(log.export(c, form, first), media_type="text/plain; charset=utf-8")

    @route("GET", "/log/entries/{index}/proof")
    def prove_entry(c: Who, index: Size) -> Any:
        return log.prove(c, index)

    @route("POST", "/log/cosignatures")
    def take_cosignature(c: Who, body: CosignedNote) -> Any:
        return log.take_cosignature(c, body.note)

    @route("GET", "/log/consistency")
    def prove_consistency(c: Who, first: Size, second: Size = 0) -> Any:
        return log.consistency(c, first, second)

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
            "token_public_keys": {key_id: pem.decode() for key_id, pem in authority.sessions.published_keys().items()},
            "issuers": [
                {"issuer": each.issuer, "client_id": each.client_id, "audience": each.audience, "scope": each.scope}
                for each in authority.issuers
                if each.kind == "people"
            ],
            "required_approvals": authority.approvals.required.promotion,
            "endpoint_ca": authority.endpoint_ca.decode(),
            "receiving_key": b64(authority.receiving_public),
        }

    @app.get("/v1/checkpoint")
    def checkpoint() -> Any:
        """Public: witnesses and rememberers need no identity."""
        return {"note": authority.log.checkpoint(), "cosigned": authority.log.cosigned()}

    @app.get("/v1/jwks.json")
    def jwks() -> Any:
        """Public: the keys that sign access tokens (RFC 7517)."""
        return authority.sessions.jwks()

    @app.get("/.well-known/oauth-authorization-server")
    def metadata() -> Any:
        """Public: RFC 8414."""
        url = authority.url
        return {
            "issuer": url,
            "token_endpoint": f"{url}/v1/token",
            "revocation_endpoint": f"{url}/v1/revoke",
            "jwks_uri": f"{url}/v1/jwks.json",
            "grant_types_supported": [JWT_BEARER, TOKEN_EXCHANGE, "client_credentials", "refresh_token"],
            "token_endpoint_auth_methods_supported": ["private_key_jwt", "none"],
            "token_endpoint_auth_signing_alg_values_supported": [ALGORITHM],
            "response_types_supported": [],
            "tls_client_certificate_bound_access_tokens": True,
        }

    @app.post("/v1/token")
    def token(
        request: Request,
        grant_type: Annotated[str, Form(max_length=100)],
        resource: Annotated[str, Form(max_length=200)],
        assertion: Annotated[str, Form(max_length=4096)] = "",
        client_assertion_type: Annotated[str, Form(max_length=100)] = "",
        client_assertion: Annotated[str, Form(max_length=4096)] = "",
        subject_token: Annotated[str, Form(max_length=8192)] = "",
        subject_token_type: Annotated[str, Form(max_length=100)] = "",
        refresh_token: Annotated[str, Form(max_length=100)] = "",
    ) -> Any:
        """Public: what is sent is the proof (RFC 7523, RFC 8693, RFC 6749 section 6)."""
        asked = TokenRequest(
            grant_type=grant_type, resource=resource, assertion=assertion, client_assertion=client_assertion,
            client_assertion_type=client_assertion_type, subject_token=subject_token,
            subject_token_type=subject_token_type, refresh_token=refresh_token,
        )  # fmt: skip
        return authority.sessions.token(asked, source_of(request), peer_of(request))

    @app.post("/v1/revoke")
    def revoke(request: Request, token: Annotated[str, Form(max_length=4096)]) -> Any:
        """Public: whoever holds a token may end it (RFC 7009)."""
        authority.sessions.revoke(token, source_of(request))
        return {}
