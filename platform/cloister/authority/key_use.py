"""The key service as one action uses it, so that each use leaves its mark in the action's own log entry.

Guarantees: wrapping, unwrapping, signing and deriving go through `KeyUse`, which counts them by key and version in the
entry's detail `key_use`, as in `unwrap dataset/adult@2 x12, sign release@1 x1`; an action that leaves no entry has no
use of keys. The detail holds names and numbers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloister.audit.event import MAX_TEXT
from cloister.canonical import canonical_json
from cloister.signing.keys import P256PublicKey, Signer
from cloister.stores.keys import KeyService, version_of

MODELS = "models"  # wraps the keys of models
LEDGER = "ledger"  # wraps the digests of ledgers: their seals
RELEASE = "release"  # signs models, and what the authority states about them and about erasures
DETAIL = "key_use"
_MORE = ", and more"


def dataset_key(name: str) -> str:
    """What the key is called that wraps a dataset's data keys."""
    return f"dataset/{name}"


def key_context(name: str, sealed_in: int, file: str) -> bytes:
    """What a wrapped data key is bound to."""
    return canonical_json({"use": "cloister.dev/data-key/v1", "dataset": name, "version": sealed_in, "file": file})


def model_key_context(run: str) -> bytes:
    """What a wrapped model key is bound to."""
    return canonical_json({"use": "cloister.dev/model-key/v1", "run": run})


def ledger_context(ledger: str, number: int) -> bytes:
    """What the seal over a ledger is bound to: whose it is, and after how many changes."""
    return canonical_json({"use": "cloister.dev/ledger/v1", "dataset": ledger, "number": number})


class KeyUse:
    """What an action may do with keys. `details` are those of its entry."""

    def __init__(self, service: KeyService, details: dict[str, Any]) -> None:
        self._service = service
        self._details = details
        self._uses: Counter[str] = Counter()

    def wrap(self, name: str, keys: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """As `KeyService.wrap`."""
        wrapped = self._service.wrap(name, keys)
        self._note("wrap", name, map(version_of, wrapped))
        return wrapped

    def unwrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """As `KeyService.unwrap`."""
        self._note("unwrap", name, (version_of(sealed) for sealed, _ in wrapped))
        return self._service.unwrap(name, wrapped)

    def rewrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """As `KeyService.rewrap`."""
        again = self._service.rewrap(name, wrapped)
        self._note("rewrap", name, map(version_of, again))
        return again

    def rotate(self, name: str) -> int:
        """As `KeyService.rotate`."""
        version = self._service.rotate(name)
        self._note("rotate", name, [version])
        return version

    def derive(self, name: str, context: bytes) -> bytes:
        """As `KeyService.derive`."""
        self._note("derive", name, [1])
        return self._service.derive(name, context)

    def signer(self, name: str) -> Signer:
        """As `KeyService.signer`; each signature is counted."""
        return _NotedSigner(self, name, self._service.signer(name))

    def _note(self, verb: str, name: str, versions: Any) -> None:
        self._uses.update(f"{verb} {name}@{version}" for version in versions)
        text = ", ".join(f"{use} x{count}" for use, count in self._uses.items())
        if len(text) > MAX_TEXT:
            text = text[: MAX_TEXT - len(_MORE)].rpartition(",")[0] + _MORE
        if text:
            self._details[DETAIL] = text


@dataclass(frozen=True, slots=True)
class _NotedSigner:
    use: KeyUse
    name: str
    signer: Signer

    def sign(self, message: bytes, /) -> bytes:
        self.use._note("sign", self.name, [1])
        return self.signer.sign(message)

    def public_key(self) -> P256PublicKey:
        return self.signer.public_key()
