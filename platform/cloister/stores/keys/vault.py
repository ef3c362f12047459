"""Vault or OpenBao as the key service, through `hvac`: transit for named keys, KV v2 for secrets and the log's anchor.

Guarantees: wrapping, signing and deriving keys never leave the service, and every use asks it: nothing is cached.
A signature and a derived key are pinned to version 1 of theirs, so a rotation there changes neither. A destroyed
version is trimmed, which Vault cannot undo. Secrets and the anchor are written by check-and-set.
Not guaranteed: that the authority itself stays out: it may ask for whatever its policy there grants it.

Keys are called `PREFIX-dataset-adult` (aes256-gcm96), `PREFIX-release` (ecdsa-p256) and `PREFIX-derive-…`; secrets are
`PREFIX/secrets/NAME`, the anchor is `PREFIX/anchor`. The README has the policy that they need.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from hvac import Client, exceptions

from cloister.canonical import b64, unb64
from cloister.errors import ConflictError, InputError, IntegrityError, KeyServiceError, NotFoundError
from cloister.sealing.envelope import KEY_BYTES
from cloister.signing.keys import P256PublicKey, Signer, p256_public_from_pem
from cloister.stores.keys.service import SECRET_NAME, KeyState, Use, destroyed, require_name, version_of
from cloister.stores.keys.settings import VaultSettings
from cloister.stores.keys.vault_connection import Answer, Connection

BATCH = 500  # keys a request: some 200 KB, far below the server's limit of 32 MB
PINNED = 1
ATTEMPTS = 5  # to be the one whose check-and-set wins
_TYPES: dict[Use, str] = {"wrap": "aes256-gcm96", "sign": "ecdsa-p256", "derive": "aes256-gcm96"}
_DERIVE = "derive-"
_RESULT = re.compile(r"vault:v([1-9][0-9]{0,8}):(.+)")

Pairs = Sequence[tuple[bytes, bytes]]


class VaultKeys:
    """`settings` say where; what they do not say, `environment` does."""

    def __init__(self, settings: VaultSettings, environment: Mapping[str, str] | None = None) -> None:
        """Log in.

        Raises:
            InputError, KeyServiceError: as `Connection`.
        """
        self._transit, self._kv, self._prefix = settings.transit, settings.kv, settings.prefix
        self._connection = Connection(settings, os.environ if environment is None else environment)
        self._made: set[str] = set()

    # ---- named keys ----

    def wrap(self, name: str, keys: Pairs) -> list[bytes]:
        if any(len(key) != KEY_BYTES for key, _ in keys):
            raise InputError("the key to wrap is not 32 bytes", "make it with new_key()")
        full = self._make(name, "wrap")

        def ask(batch: Pairs, vault: Client) -> list[bytes]:
            items = [{"plaintext": b64(key), "associated_data": b64(data)} for key, data in batch]
            encrypt = vault.secrets.transit.encrypt_data
            answer = encrypt(full, plaintext="", batch_input=items, mount_point=self._transit)
            return [result["ciphertext"].encode() for result in _results(answer, batch)]

        return [each for batch in _batches(keys) for each in self._asked(partial(ask, batch))]

    def unwrap(self, name: str, wrapped: Pairs) -> list[bytes]:
        full = self._full(name, "wrap")
        versions = {version_of(sealed) for sealed, _ in wrapped}

        def ask(batch: Pairs, vault: Client) -> list[bytes]:
            items = [{"ciphertext": sealed.decode("latin-1"), "associated_data": b64(data)} for sealed, data in batch]
            decrypt = vault.secrets.transit.decrypt_data
            answer = decrypt(full, ciphertext="", batch_input=items, mount_point=self._transit)
            return [_bytes(result["plaintext"]) for result in _results(answer, batch)]

        try:
            keys = [each for batch in _batches(wrapped) for each in self._connection.call(partial(ask, batch))]
        except (exceptions.InvalidRequest, exceptions.InvalidPath):
            self._explain(name, versions)
            raise IntegrityError(
                "the wrapped key does not open: it was changed, moved, or wrapped under another key",
                "restore the row from a backup, or check which key service the authority uses",
            ) from None
        if any(len(key) != KEY_BYTES for key in keys):
            raise IntegrityError("what was wrapped is not a key", "restore the row from a backup")
        return keys

    def rewrap(self, name: str, wrapped: Pairs) -> list[bytes]:
        # Not transit's own rewrap: it takes no associated data.
        keys = self.unwrap(name, wrapped)
        return self.wrap(name, [(key, data) for key, (_, data) in zip(keys, wrapped, strict=True)])

    def rotate(self, name: str) -> int:
        self._state(name)
        full = self._full(name, "wrap")
        self._connection.call(lambda vault: vault.secrets.transit.rotate_key(full, mount_point=self._transit))
        return self._state(name).newest

    def destroy_below(self, name: str, version: int) -> None:
        state, full = self._state(name), self._full(name, "wrap")
        if not 0 < version <= state.newest:
            raise InputError(f"the key {name} has no version {version}", "list them: cloister key list")

        def trim(vault: Client) -> None:
            known = vault.secrets.transit.read_key(full, mount_point=self._transit)["data"]
            # Only this minimum says that versions are gone: whoever may configure the key can lower the others.
            if version <= int(known.get("min_available_version") or 0):
                return
            # In this order: neither minimum may pass the other, and trimming needs both.
            configure = partial(vault.secrets.transit.update_key_configuration, full, mount_point=self._transit)
            configure(min_encryption_version=version)
            configure(min_decryption_version=version)
            vault.secrets.transit.trim_key(full, min_version=version, mount_point=self._transit)

        self._asked(trim)

    def states(self) -> list[KeyState]:
        begin = f"{self._prefix}-"
        try:
            found = self._connection.call(
                lambda vault: vault.secrets.transit.list_keys(mount_point=self._transit)["data"]["keys"]
            )
        except exceptions.InvalidPath:  # there is no key at all
            return []
        states = [self._read(full) for full in found if str(full).startswith(begin)]
        return sorted((state for state in states if state is not None), key=lambda state: state.name)

    def signer(self, name: str) -> Signer:
        full = self._make(name, "sign")
        known = self._connection.call(
            lambda vault: vault.secrets.transit.read_key(full, mount_point=self._transit)["data"]["keys"]
        )
        public = known.get(str(PINNED), {}).get("public_key")
        if not public:
            raise destroyed(name, PINNED)
        return _TransitSigner(self, full, p256_public_from_pem(str(public).encode()))

    def sign(self, full: str, message: bytes) -> bytes:
        """For signers: ECDSA with SHA-256 over `message`, ASN.1 DER."""

        def ask(vault: Client) -> bytes:
            answer = vault.secrets.transit.sign_data(
                full, hash_input=b64(message), key_version=PINNED, hash_algorithm="sha2-256",
                marshaling_algorithm="asn1", mount_point=self._transit,
            )  # fmt: skip
            return _pinned(answer["data"]["signature"])

        return self._asked(ask)

    def derive(self, name: str, context: bytes) -> bytes:
        full = self._make(name, "derive")

        def ask(vault: Client) -> bytes:
            answer = vault.secrets.transit.generate_hmac(
                full, hash_input=b64(context), key_version=PINNED, algorithm="sha2-256", mount_point=self._transit
            )
            return _pinned(answer["data"]["hmac"])

        return self._asked(ask)

    def close(self) -> None:
        self._connection.close()

    # ---- secrets, and how far the log was ----

    def secret(self, name: str) -> bytes:
        stored, _ = self._stored(f"secrets/{_secret_name(name)}")
        if stored is None:
            raise NotFoundError("the key service holds no such secret", "start the authority once to make it")
        return unb64(stored["value"])

    def store_secret(self, name: str, value: bytes) -> None:
        if not self._store(f"secrets/{_secret_name(name)}", {"value": b64(value)}, after=0):
            raise ConflictError("the key service has a secret of that name", "use the one that is there")

    def remember(self, size: int, root: str, *, rollback: bool = False) -> None:
        for _ in range(ATTEMPTS):
            kept, version = self._stored("anchor")
            if kept is not None and int(kept["size"]) >= size and not rollback:
                return
            if self._store("anchor", {"size": size, "root": root}, after=version):
                return
        raise KeyServiceError("the key service is too busy to remember the log", "try again; nothing was given out")

    def remembered(self) -> tuple[int, str] | None:
        kept, _ = self._stored("anchor")
        return None if kept is None else (int(kept["size"]), str(kept["root"]))

    def _stored(self, path: str) -> tuple[dict[str, Any] | None, int]:
        """What is there, and in which version; None and 0 if nothing is."""
        try:
            answer = self._connection.call(
                lambda vault: vault.secrets.kv.v2.read_secret_version(
                    f"{self._prefix}/{path}", mount_point=self._kv, raise_on_deleted_version=True
                )["data"]
            )
            return dict(answer["data"]), int(answer["metadata"]["version"])
        except exceptions.InvalidPath:
            return None, 0

    def _store(self, path: str, value: dict[str, Any], *, after: int) -> bool:
        """Write if the newest version is still `after`. False if it is not."""
        try:
            self._connection.call(
                lambda vault: vault.secrets.kv.v2.create_or_update_secret(
                    f"{self._prefix}/{path}", secret=value, cas=after, mount_point=self._kv
                )
            )
        except exceptions.InvalidRequest as error:
            if "check-and-set" in " ".join(error.errors or ()):
                return False
            raise _disliked() from None
        except exceptions.InvalidPath:
            raise _disliked() from None
        return True

    # ---- transit ----

    def _full(self, name: str, use: Use) -> str:
        """What a key is called there. No two names of ours are the same there: what is before "/" has no hyphen."""
        plain = require_name(name).replace("/", "-")
        if use != "derive" and name.startswith("derive"):
            raise InputError("this is not the name of a key", "list them: cloister key list")
        return f"{self._prefix}-{_DERIVE if use == 'derive' else ''}{plain}"

    def _make(self, name: str, use: Use) -> str:
        full = self._full(name, use)
        if full not in self._made:  # Vault leaves one that is there as it is
            self._asked(
                lambda vault: vault.secrets.transit.create_key(
                    full, key_type=_TYPES[use], exportable=False, allow_plaintext_backup=False,
                    mount_point=self._transit,
                )
            )  # fmt: skip
            self._made.add(full)
        return full

    def _state(self, name: str) -> KeyState:
        state = self._read(self._full(name, "wrap"))
        if state is None:
            if self._read(self._full(name, "derive")) is None:
                raise NotFoundError(f"there is no key {name}", "list them: cloister key list")
        elif state.use == "wrap":
            return state
        raise InputError(f"{name} is not a wrapping key: it stays the same for ever", "list them: cloister key list")

    def _read(self, full: str) -> KeyState | None:
        def ask(vault: Client) -> KeyState:
            known = vault.secrets.transit.read_key(full, mount_point=self._transit)["data"]
            made = {int(number): _time(each) for number, each in known["keys"].items()}
            name = full.removeprefix(f"{self._prefix}-")
            use: Use = "derive" if name.startswith(_DERIVE) else "sign" if known["type"] == _TYPES["sign"] else "wrap"
            newest = int(known["latest_version"])
            return KeyState(
                name=name.removeprefix(_DERIVE).replace("-", "/", 1), use=use, newest=newest,
                oldest=max(int(known["min_decryption_version"]), int(known.get("min_available_version") or 0), 1),
                created=min(made.values()), rotated=made[newest],
            )  # fmt: skip

        try:
            return self._connection.call(ask)
        except exceptions.InvalidPath:
            return None

    def _asked(self, ask: Callable[[Client], Answer]) -> Answer:
        """As the connection's `call`, where the server has no reason to dislike the request."""
        try:
            return self._connection.call(ask)
        except (exceptions.InvalidRequest, exceptions.InvalidPath):
            raise _disliked() from None

    def _explain(self, name: str, versions: set[int]) -> None:
        """Raise what is known better than that something does not open."""
        state = self._read(self._full(name, "wrap"))
        if state is None:
            raise IntegrityError(f"the key service has no key {name} to wrap with", "list them: cloister key list")
        for version in sorted(versions):
            if version < state.oldest:
                raise destroyed(name, version)


@dataclass(frozen=True, slots=True)
class _TransitSigner:
    service: VaultKeys
    full: str
    public: P256PublicKey

    def sign(self, message: bytes, /) -> bytes:
        return self.service.sign(self.full, message)

    def public_key(self) -> P256PublicKey:
        return self.public


def _secret_name(name: str) -> str:
    if not SECRET_NAME.fullmatch(name):
        raise InputError("this is not the name of a secret", "use lower-case letters, digits and hyphens")
    return name


def _pinned(text: str) -> bytes:
    found = _RESULT.fullmatch(text)
    if not found or int(found[1]) != PINNED:
        raise ValueError(text)
    return _bytes(found[2])


def _batches(pairs: Pairs) -> Iterator[Pairs]:
    return (pairs[first : first + BATCH] for first in range(0, len(pairs), BATCH))


def _results(answer: Any, batch: Pairs) -> list[dict[str, str]]:
    results: list[dict[str, str]] = answer["data"]["batch_results"]
    if any(each.get("error") for each in results):  # with status 200, of some versions
        raise exceptions.InvalidRequest
    if len(results) != len(batch):
        raise ValueError
    return results


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _time(version: Any) -> float:
    """When a version was made: Unix seconds of a symmetric key, RFC 3339 within a map of an asymmetric one."""
    if isinstance(version, dict):
        return datetime.fromisoformat(str(version["creation_time"]).replace("Z", "+00:00")).timestamp()
    return float(version)


def _disliked() -> KeyServiceError:
    return KeyServiceError(
        "the key service does not do what the authority asks of it",
        "check that transit and KV version 2 are mounted where authority.keys says, and the policy there",
    )
