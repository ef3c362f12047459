"""One replica as one object: lease, verify, open the port. Plain Python; Ray Serve merely supervises it.

Guarantees: the port opens only after the model was leased, opened and verified in this process; the constructor's
arguments hold no secret; a replica whose server died reports itself unhealthy, and is then replaced.

Protocol of a start:

    1. Read the endpoint directory; refuse one that others could read.
    2. Lease: ask the authority, as this endpoint, for the sealed model, its key and its proofs.
    3. Open the seal, in memory.
    4. Verify the release by the pinned keys (`release.py`).
    5. Listen for what changes at the authority from now on (`watch.py`).
    6. Open the port.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cloister.errors import IntegrityError, UnavailableError
from cloister.sealing.stream import open_sealed
from cloister.serving.app import build_app
from cloister.serving.endpoint import Endpoint, open_endpoint
from cloister.serving.listener import Listener
from cloister.serving.pipeline import Authorizer, Pipeline
from cloister.serving.quota import Block, Quota
from cloister.serving.release import Release, VerifiedModel, verify_release
from cloister.serving.watch import Watch
from cloister.signing.tokens import TokenVerifier


class ModelLease(Protocol):
    """What the authority hands out for one endpoint. `cloister.client.authority.ModelLease` fits."""

    @property
    def model(self) -> str: ...
    @property
    def model_onnx_sealed(self) -> bytes: ...
    @property
    def model_key(self) -> bytes: ...
    @property
    def seal_context(self) -> Mapping[str, str]: ...
    @property
    def manifest(self) -> bytes: ...
    @property
    def bundle(self) -> bytes: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...
    @property
    def directory(self) -> Mapping[str, Any]: ...
    @property
    def approvals(self) -> Sequence[Mapping[str, Any]]: ...


class Authority(Protocol):
    """The authority as a replica sees it. Methods block, and have timeouts of their own."""

    def lease_model(self, endpoint_id: str) -> ModelLease: ...

    def take_quota_block(self, endpoint_id: str, subject: str, wanted: int) -> tuple[int, float]:
        """Units granted (already debited) and the end of their window in Unix seconds."""
        ...

    def changes(self, endpoint_id: str, after: int, policy_version: int) -> Mapping[str, Any]:
        """What changed since: see `cloister.serving.watch`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """What a replica needs from outside of this package."""

    authority: Authority
    authorizer: Callable[[VerifiedModel, str, str], Authorizer]
    """Makes the policy for the model that was verified, known as `name@version`, with the site's own rules."""
    clock: Callable[[], float] = time.time


class Replica:
    """Answers on its own port from construction until `close`."""

    def __init__(self, directory: str, connect: Callable[[Endpoint], Backing]) -> None:
        """Start, in the steps above. `connect` is a module-level function, for Ray pickles it by name.

        Raises:
            CloisterError: a step failed; no port was opened.
        """
        endpoint = open_endpoint(Path(directory))  # 1
        backing = connect(endpoint)
        model, reference = leased_model(endpoint, backing)  # 2 to 4
        config, trust = endpoint.config, endpoint.trust
        verifier = TokenVerifier(
            {key_id: pem.encode() for key_id, pem in trust.token_keys.items()},
            issuer=trust.token_issuer,
            audience=trust.token_audience,
        )
        authorize = _Authorize(backing, model, reference)
        self._watch = Watch(backing.authority, config.endpoint, verifier=verifier, on_policy=authorize.follow)  # 5
        pipeline = Pipeline(
            model,
            verifier=verifier,
            liveness=self._watch,
            authorize=authorize,
            quota=Quota(
                _Blocks(backing.authority, config.endpoint), block_size=config.quota_block, clock=backing.clock
            ),
            decimals=config.decimals,
            clock=backing.clock,
        )
        self._closing = threading.Lock()
        self._listener: Listener | None = Listener(  # 6
            build_app(pipeline),
            host=config.host,
            port=config.port,
            certificate=endpoint.certificate_path,
            key=endpoint.certificate_key_path,
        )

    @property
    def port(self) -> int:
        """The port that answers; of use when the configuration says 0."""
        return self._listener.port if self._listener else 0

    def check_health(self) -> None:
        """Called by Serve every few seconds.

        Raises:
            UnavailableError: the port does not answer any more.
        """
        if self._listener is None or not self._listener.alive:
            raise UnavailableError("the replica's HTTPS server has stopped", "Serve replaces the replica")

    def close(self) -> None:
        """Finish what is in flight and close the port. May be called again."""
        with self._closing:
            listener, self._listener = self._listener, None
        if listener is not None:
            self._watch.stop()
            listener.stop()

    def __del__(self) -> None:  # Serve's hook for a graceful shutdown (`call_destructor`)
        if hasattr(self, "_listener"):  # not if a step of the constructor failed
            self.close()


class _Authorize:
    """The policy in force, as an `Authorizer`."""

    def __init__(self, backing: Backing, model: VerifiedModel, reference: str) -> None:
        self._backing = backing
        self._model = model
        self._reference = reference
        self.follow("")

    def follow(self, site: str) -> None:
        """Go by the site's policies `site` from now on."""
        self._ask = self._backing.authorizer(self._model, self._reference, site)

    def __call__(self, subject: str, kind: str, roles: frozenset[str], action: str) -> None:
        self._ask(subject, kind, roles, action)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The authority as a `QuotaSource`."""

    authority: Authority
    endpoint_id: str

    def take_block(self, subject: str, wanted: int) -> Block:
        granted, window_ends = self.authority.take_quota_block(self.endpoint_id, subject, wanted)
        return Block(granted=granted, window_ends=window_ends)


def leased_model(endpoint: Endpoint, backing: Backing) -> tuple[VerifiedModel, str]:
    """The model, and the `name@version` that the authority knows it by."""
    lease = backing.authority.lease_model(endpoint.config.endpoint)  # 2
    release = Release(
        model_onnx=open_sealed(lease.model_key, lease.model_onnx_sealed, lease.seal_context),  # 3
        manifest=lease.manifest,
        bundle=lease.bundle,
        provenance=lease.provenance,
        directory=lease.directory,
        approvals=lease.approvals,
    )
    model = verify_release(  # 4
        release,
        name=endpoint.config.model,
        release_key_pem=endpoint.trust.release_key.encode(),
        required_approvals=endpoint.trust.required_approvals,
        now=backing.clock(),
    )
    if lease.model.partition("@")[0] != endpoint.config.model:
        raise IntegrityError("the lease is for another model than was asked for", "deploy the endpoint again")
    return model, lease.model
