"""Talking to the authority: as a person, a run or an endpoint, always by the caller's own key.

Guarantees: TLS 1.3 against the pinned CA only, no redirects, no proxy from the environment; with a node, mutual TLS by
its certificate, renewed while this runs; access tokens live in memory, and one that ended early is replaced once;
refusals are raised as the error that the authority described; keys that
arrive are HPKE-sealed to a key made here for one answer.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from cloister.canonical import b64, sha256_hex, unb64
from cloister.client.node import NodeFolder
from cloister.errors import InputError, IntegrityError, QuotaExceededError, UnavailableError, from_dict
from cloister.sealing import purposes
from cloister.sealing.lease import OneTimeKey
from cloister.signing import tokens
from cloister.stores.blobs import open_blobs

TIMEOUT_S = 60.0
TOKEN_MARGIN_S = 30.0
PATIENCE_S = 120.0
MAX_LINE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A sealed checkpoint: the state after `step` steps of the plan, at the path `blob` of the run's store."""

    step: int
    blob: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt of a run: it goes on after `resume_from` steps, from `checkpoint` unless it begins anew.

    The rest is public, and the same in its leases: what it is to do is tried before there is a key.
    """

    number: int
    resume_from: int
    checkpoint: Checkpoint | None
    manifest: dict[str, Any]
    owner_key: str
    spec: dict[str, Any]
    plan: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLease:
    """What one rank was granted. `keys` maps `shard/class` to a data key; `model_key` is rank 0's alone."""

    keys: Mapping[str, bytes] = field(repr=False)
    model_key: bytes | None = field(repr=False)
    checkpoint_key: bytes = field(repr=False)
    manifest: dict[str, Any]
    owner_key: str
    spec: dict[str, Any]
    plan: dict[str, Any]
    blobs: str
    seal_context: dict[str, str]
    checkpoint_context: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLease:
    """A sealed model, its key, and the evidence that a replica verifies."""

    model: str
    """`name@version`."""
    model_onnx_sealed: bytes = field(repr=False)
    model_key: bytes = field(repr=False)
    seal_context: dict[str, str]
    manifest: bytes
    bundle: bytes
    provenance: dict[str, Any]
    directory: dict[str, Any]
    approvals: Sequence[dict[str, Any]]


class Credential(Protocol):
    """How a caller proves itself to the token endpoint."""

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Held around the two below, where only one process at a time may do them."""

    def form(self) -> Mapping[str, str]:
        """The grant, without the audience."""

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Told what came back: a new refresh token, say."""


@dataclass(frozen=True, slots=True)
class OwnKey:
    """An assertion signed by the caller's own key (RFC 7523 section 2.1)."""

    name: str
    private_key_pem: bytes = field(repr=False)
    url: str

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def form(self) -> dict[str, str]:
        assertion = tokens.issue_assertion(self.private_key_pem, subject=self.name, audience=self.url, now=time.time())
        return {"grant_type": tokens.JWT_BEARER, "assertion": assertion}

    def answered(self, answer: Mapping[str, Any]) -> None:
        """Nothing to keep."""


class AuthorityClient:
    """One caller's connection. Thread-safe."""

    def __init__(
        self, url: str, *, ca_path: Path, name: str, private_key_pem: bytes | None = None,
        credential: Credential | None = None, node: NodeFolder | None = None,
    ) -> None:  # fmt: skip
        """Prepare; nothing is sent yet. The caller proves itself by their key, or by `credential`.

        Raises:
            InputError: the URL is not HTTPS, or `ca_path` holds no certificate.
        """
        if not url.startswith("https://"):
            raise InputError("the authority speaks HTTPS only", "write https:// in its URL")
        try:
            context = ssl.create_default_context(cafile=ca_path)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"{ca_path} is not a usable CA certificate", "start the authority: cloister up") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.url = url
        self.name = name
        self._ca_path = ca_path
        self._credential = credential or OwnKey(name, private_key_pem or b"", url)
        self._node = node
        self._certificate = 0
        self._tls = context
        self._tokens: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._http = self._connections()

    def close(self) -> None:
        self._http.close()

    def token(self, audience: str = tokens.AUTHORITY_AUDIENCE) -> str:
        """An access token that is good for at least half a minute more.

        Raises:
            AuthenticationError: the authority does not know this caller or its key.
        """
        with self._lock:
            token, good_until = self._tokens.get(audience, ("", 0.0))
            if time.monotonic() < good_until:
                return token
            self._present_node()
            with self._credential.turn():
                form = dict(self._credential.form()) | {"resource": audience}
                answer = self.post_form("/v1/token", form)
                self._credential.answered(answer)
            self._tokens[audience] = (answer["access_token"], time.monotonic() + answer["expires_in"] - TOKEN_MARGIN_S)
            return str(answer["access_token"])

    def _present_node(self) -> None:
        """Speak as the node of this machine, with its newest certificate."""
        if self._node is None:
            return
        before = self._certificate
        self._certificate = self._node.load_into(self._tls, self._certify)
        if before not in (0, self._certificate):
            # Connections of before were made with the old one; another thread may be in the middle of a call on them.
            self._http = self._connections()

    def _certify(self, request: bytes) -> bytes:
        assert self._node is not None  # noqa: S101  (only called for a node)
        node = AuthorityClient(
            self.url, ca_path=self._ca_path, name=self._node.name, private_key_pem=self._node.private_key()
        )
        with contextlib.closing(node):
            return str(node.post("/v1/nodes/certificate", {"csr": request.decode()})["certificate"]).encode()

    def _connections(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self._tls, timeout=TIMEOUT_S, trust_env=False)

    def get(self, path: str, **parameters: Any) -> Any:
        """GET with a token; the decoded answer.

        Raises:
            CloisterError: what the authority refused with; UnavailableError when it does not answer.
        """
        return self._authorised("GET", path, params=parameters)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST with a token; the decoded answer. Raises as `get`."""
        return self._authorised("POST", path, json=dict(body or {}))

    def post_in_turn(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST of what one caller may do only once at a time, and so often: waits for the turn. Raises as `get`.

        Raises:
            QuotaExceededError: it has not come within `PATIENCE_S`.
        """
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.post(path, body)
            except QuotaExceededError as error:
                if time.monotonic() + error.retry_after_s > end:
                    raise
                time.sleep(error.retry_after_s)

    def put(self, path: str, body: Mapping[str, Any]) -> Any:
        """PUT with a token; the decoded answer. Raises as `get`."""
        return self._authorised("PUT", path, json=dict(body))

    def lines(self, path: str, **parameters: Any) -> Iterator[bytes]:
        """GET with a token; the answer's lines as they come, each with its newline. Raises as `get`.

        Raises:
            IntegrityError: (while reading) a line of more than `MAX_LINE_BYTES`.
        """
        headers = {"Authorization": f"Bearer {self.token()}"}
        rest = b""
        try:
            with self._http.stream("GET", path, params=parameters, headers=headers) as response:
                if response.status_code != 200:
                    response.read()
                    self._answer(response)
                for part in response.iter_bytes():
                    *whole, rest = (rest + part).split(b"\n")
                    yield from (line + b"\n" for line in whole)
                    if len(rest) > MAX_LINE_BYTES:
                        raise IntegrityError("the authority's answer has a line without an end", "ask again")
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the authority at {self.url} stopped answering ({type(error).__name__})", "ask again"
            ) from error
        if rest:
            yield rest

    def public(self, path: str) -> Any:
        """GET of a public route, without a token."""
        return self._answer(self._send("GET", path))

    def post_form(self, path: str, form: Mapping[str, str]) -> dict[str, Any]:
        """POST of a form to one of OAuth's routes, where the form itself is the proof. Raises as `get`."""
        return dict(self._answer(self._send("POST", path, data=dict(form))))

    # ---- a run's work ----

    def open_attempt(self, run: str, world_size: int, code_digest: str) -> Attempt:
        """Open the run's next attempt, which ends the one before.

        Raises:
            ConflictError: the run is over, or its attempts are used up. BudgetError: nobody pays for the redo.
        """
        answer = self.post(f"/v1/runs/{run}/attempts", {"world_size": world_size, "code_digest": code_digest})
        kept = answer["checkpoint"]
        return Attempt(
            number=answer["attempt"],
            resume_from=answer["resume_from"],
            checkpoint=Checkpoint(**kept) if kept else None,
            manifest=answer["manifest"],
            owner_key=answer["owner_key"],
            spec=answer["spec"],
            plan=answer["plan"],
        )

    def lease_shards(self, run: str, attempt: int, rank: int, code_digest: str) -> TrainingLease:
        """Ask for the data keys of one rank, sealed to a key that is made here and dies here."""
        one_time = OneTimeKey.generate()
        body = {"attempt": attempt, "rank": rank, "public_key": b64(one_time.public), "code_digest": code_digest}
        answer = self.post(f"/v1/runs/{run}/leases", body)
        granted = json.loads(one_time.open(unb64(answer["sealed"]), purposes.training_lease(run, attempt, rank)))
        return TrainingLease(
            keys={name: unb64(key) for name, key in granted["keys"].items()},
            model_key=unb64(granted["model_key"]) if "model_key" in granted else None,
            checkpoint_key=unb64(granted["checkpoint_key"]),
            manifest=answer["manifest"],
            owner_key=answer["owner_key"],
            spec=answer["spec"],
            plan=answer["plan"],
            blobs=answer["blobs"],
            seal_context=answer["seal_context"],
            checkpoint_context=answer["checkpoint_context"],
        )

    # ---- a replica's work: `cloister.serving.replica.Authority` ----

    def lease_model(self, endpoint_id: str) -> ModelLease:
        """The endpoint's model, still sealed, with its key and evidence."""
        return self._model_lease(f"/v1/endpoints/{endpoint_id}/leases", purposes.model_lease(endpoint_id))

    def export_model(self, name: str, version: int) -> ModelLease:
        """A production model for a copy outside Cloister; the authority records the disclosure."""
        path = f"/v1/models/{name}/versions/{version}/export"
        return self._model_lease(path, purposes.model_export(name, version))

    def take_quota_block(self, endpoint_id: str, subject: str, wanted: int) -> tuple[int, float]:
        """Rows granted (debited already) and the Unix time at which their window ends."""
        answer = self.post(f"/v1/endpoints/{endpoint_id}/quota", {"subject": subject, "wanted": wanted})
        return int(answer["granted"]), float(answer["window_ends"])

    def _model_lease(self, path: str, info: bytes) -> ModelLease:
        one_time = OneTimeKey.generate()
        answer = self.post(path, {"public_key": b64(one_time.public)})
        sealed = open_blobs(answer["blobs"]).get(answer["blob"])
        if sha256_hex(sealed) != answer["blob_sha256"]:
            raise IntegrityError(
                "the sealed model's bytes changed since it was registered",
                "restore the blob from a backup, or train again; nothing was opened",
            )
        return ModelLease(
            model=str(answer["model"]),
            model_onnx_sealed=sealed,
            model_key=unb64(json.loads(one_time.open(unb64(answer["sealed"]), info))["model_key"]),
            seal_context=answer["seal_context"],
            manifest=unb64(answer["manifest"]),
            bundle=unb64(answer["bundle"]),
            provenance=answer["provenance"],
            directory=answer["directory"],
            approvals=answer["approvals"],
        )

    # ---- an endpoint's ----

    def changes(self, endpoint_id: str, after: int, policy_version: int) -> dict[str, Any]:
        """What a replica must know at once: see `cloister.authority.endpoints.Endpoints.changes`."""
        return dict(self.get(f"/v1/endpoints/{endpoint_id}/changes", after=after, policy=policy_version))

    def _authorised(self, method: str, path: str, **options: Any) -> Any:
        token = self.token()
        response = self._send(method, path, headers={"Authorization": f"Bearer {token}"}, **options)
        if response.status_code == 401:  # our access changed, or the key that signs tokens: ask anew, once
            with self._lock:
                self._tokens.clear()
            headers = {"Authorization": f"Bearer {self.token()}"}
            response = self._send(method, path, headers=headers, **options)
        return self._answer(response)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the authority at {self.url} does not answer ({type(error).__name__})",
                "start it: cloister up   or look at what runs: cloister doctor",
            ) from error

    @staticmethod
    def _answer(response: httpx.Response) -> Any:
        try:
            body = response.json()
        except ValueError:
            body = {}
        if response.status_code == 200:
            return body
        raise from_dict(body if isinstance(body, dict) else {}, response.status_code)
