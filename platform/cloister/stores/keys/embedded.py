"""The embedded key service: a root key (`root`), and a ring of versioned keys and secrets sealed under it, in a folder.

Guarantees: keys and secrets rest only encrypted, each bound to its name, use and version; the ring is replaced
atomically, so an error or a crash at any moment leaves the old ring or the new one; several processes may share the
folder, and what one of them made or destroyed holds for the others at once.
Not guaranteed: protection from whoever has the root key. Nor from copies of this folder: a copy that was made before a
version was destroyed still opens what was wrapped under it, so never back it up together with the state.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.canonical import b64, unb64
from cloister.errors import ConflictError, InputError, IntegrityError, KeyServiceError, NotFoundError
from cloister.sealing.envelope import key_version, new_key, unwrap_named, wrap_named
from cloister.sealing.stream import open_sealed, seal
from cloister.signing.keys import P256PublicKey, Signer, generate_p256, p256_from_pem, private_to_pem, sign
from cloister.stores.files import locked, private_directory, read_json, write_json
from cloister.stores.keys.root import Passphrase, RootKey
from cloister.stores.keys.service import SECRET_NAME, KeyState, Use, destroyed, require_name

_FORMAT = "cloister.dev/keyring/v2"
_UNREADABLE = (NotFoundError, InputError, KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class _Ring:
    """The ring as it was in one state of its file. `opened` holds what was decrypted of it, by name and version."""

    state: tuple[int, int, int]
    content: dict[str, Any]
    opened: dict[tuple[str, int], bytes] = field(default_factory=dict)


class EmbeddedKeys:
    """`directory/root.key` or `root.sealed`, `directory/keyring.json`, `directory/anchor.json`."""

    def __init__(
        self, directory: Path, *, passphrase: Passphrase | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the key service, or make a new one in an empty folder. `passphrase` is asked for if it is given.

        Raises:
            IntegrityError: one of the two files is missing, or the root key does not open the ring.
            InputError: the root key is open to others, or the passphrase is not the one.
        """
        private_directory(directory)
        self._ring_file = directory / "keyring.json"
        self._anchor_file = directory / "anchor.json"
        self._lock_file = directory / "keyring.lock"
        self._clock = clock
        self._ring: _Ring | None = None
        root = RootKey(directory, passphrase)
        with _told_as_ours(), locked(self._lock_file):
            if not root.exists() and (root.half_made() or not self._ring_file.exists()):
                self._ring_file.unlink(missing_ok=True)  # sealed under a root key that never counted
                self._root = root.make()
                write_json(self._ring_file, {"format": _FORMAT, "keys": {}, "secrets": {}, "check": self._check()})
                root.commit()
            elif not root.exists():
                raise IntegrityError(f"the root key in {directory} is missing", "restore it: without it no key opens")
            else:
                self._root = root.read()
        self._open_check(self._current().content["check"])

    # ---- named keys ----

    def wrap(self, name: str, keys: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        version, kek = self._newest(name, "wrap")
        return [wrap_named(kek, key, data, name=name, version=version) for key, data in keys]

    def unwrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        ring = self._current()
        return [
            unwrap_named(self._version(ring, name, "wrap", key_version(sealed)), sealed, data, name=name)
            for sealed, data in wrapped
        ]

    def rewrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        keys = self.unwrap(name, wrapped)
        return self.wrap(name, [(key, data) for key, (_, data) in zip(keys, wrapped, strict=True)])

    def rotate(self, name: str) -> int:
        with self._changing() as content:
            known = _wrapping_key(content, name)
            version: int = known["newest"] + 1
            known["versions"][str(version)] = self._new_version(name, "wrap", version, new_key())
            known["newest"] = version
        return version

    def destroy_below(self, name: str, version: int) -> None:
        known = _wrapping_key(self._current().content, name)
        if not 0 < version <= known["newest"]:
            raise InputError(f"the key {name} has no version {version}", "list them: cloister key list")
        with self._changing(overwrite=True) as content:
            known = _wrapping_key(content, name)
            for old in [each for each in known["versions"] if int(each) < version]:
                del known["versions"][old]

    def states(self) -> list[KeyState]:
        content = self._current().content["keys"]
        states = []
        for name, known in sorted(content.items()):
            versions = {int(number): each for number, each in known["versions"].items()}
            states.append(
                KeyState(
                    name=name, use=known["use"], oldest=min(versions), newest=known["newest"],
                    created=known["created"], rotated=versions[known["newest"]]["created"],
                )
            )  # fmt: skip
        return states

    def signer(self, name: str) -> Signer:
        self._newest(name, "sign")
        return _RingSigner(self, name)

    def derive(self, name: str, context: bytes) -> bytes:
        _, key = self._newest(name, "derive")
        return hmac.digest(key, context, hashlib.sha256)

    def close(self) -> None:
        self._ring = None

    # ---- secrets, and how far the log was ----

    def secret(self, name: str) -> bytes:
        stored = self._current().content["secrets"].get(name)
        if stored is None:
            raise NotFoundError("the key ring holds no such secret", "start the authority once to make it")
        return open_sealed(self._root, unb64(stored), _secret_context(name))

    def store_secret(self, name: str, value: bytes) -> None:
        if not SECRET_NAME.fullmatch(name):
            raise InputError("this is not the name of a secret", "use lower-case letters, digits and hyphens")
        sealed = b64(seal(self._root, value, _secret_context(name)))
        with self._changing() as content:
            if name in content["secrets"]:
                raise ConflictError("the key ring has a secret of that name", "use the one that is there")
            content["secrets"][name] = sealed

    def remember(self, size: int, root: str, *, rollback: bool = False) -> None:
        with _told_as_ours(), locked(self._anchor_file.with_suffix(".lock")):
            kept = self.remembered()
            if kept is None or kept[0] < size or rollback:  # another process may have come further
                write_json(self._anchor_file, {"size": size, "root": root})

    def remembered(self) -> tuple[int, str] | None:
        if not self._anchor_file.exists():
            return None
        hint = f"restore {self._anchor_file} from a backup"
        try:
            kept = read_json(self._anchor_file, what="anchor of the log", hint=hint)
            return int(kept["size"]), str(kept["root"])
        except (KeyError, TypeError, ValueError):
            raise InputError("the anchor of the log is damaged", hint) from None

    # ---- the ring ----

    def _current(self) -> _Ring:
        """The ring as it is now: read again when any process has changed it."""
        ring = self._ring
        if ring is None or ring.state != self._state():
            state = self._state()  # before reading: what changes meanwhile is read again
            try:
                content = self._read()
            except IntegrityError:
                # Who replaced the ring may just have been overwriting the old one, which we had open.
                with locked(self._lock_file):
                    state, content = self._state(), self._read()
            ring = self._ring = _Ring(state, content)
        return ring

    def _state(self) -> tuple[int, int, int]:
        try:
            stat = self._ring_file.stat()
        except OSError:
            return (0, 0, 0)
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _read(self) -> dict[str, Any]:
        hint = f"restore {self._ring_file}: without it no key opens"
        try:
            content = read_json(self._ring_file, what="key ring", hint=hint)
            known = content["format"] == _FORMAT and isinstance(content["secrets"], dict)
            if not known or not isinstance(content["keys"], dict) or not isinstance(content["check"], str):
                raise ValueError
        except (*_UNREADABLE, OSError):
            raise IntegrityError(
                f"the key ring {self._ring_file} is missing, damaged or of an unknown version", hint
            ) from None
        return dict(content)

    @contextlib.contextmanager
    def _changing(self, *, overwrite: bool = False) -> Iterator[dict[str, Any]]:
        """The ring's content, to be changed: written back whole at the end of the block, unless it fails.

        `overwrite`: the old file's bytes too, as far as the file system lets us.
        """
        with _told_as_ours(), locked(self._lock_file):
            # Only who holds the lock writes, so these were left by a crash, and may hold what was destroyed since.
            for left in self._ring_file.parent.glob(f".{self._ring_file.name}.*"):
                left.unlink(missing_ok=True)
            content = self._read()  # a copy of our own: nobody wraps under what is not durable yet
            old = os.open(self._ring_file, os.O_WRONLY) if overwrite else None
            try:
                yield content
                write_json(self._ring_file, content)
                if old is not None:
                    os.pwrite(old, bytes(os.fstat(old).st_size), 0)
                    os.fsync(old)
            finally:
                if old is not None:
                    os.close(old)

    def _newest(self, name: str, use: Use) -> tuple[int, bytes]:
        ring = self._current()
        if require_name(name) not in ring.content["keys"]:
            with self._changing() as content:
                if name not in content["keys"]:  # another process may have been first
                    secret = private_to_pem(generate_p256()) if use == "sign" else new_key()
                    content["keys"][name] = {
                        "use": use, "created": self._clock(), "newest": 1,
                        "versions": {"1": self._new_version(name, use, 1, secret)},
                    }  # fmt: skip
            ring = self._current()
        version = int(ring.content["keys"][name]["newest"])
        return version, self._version(ring, name, use, version)

    def _new_version(self, name: str, use: Use, version: int, secret: bytes) -> dict[str, Any]:
        sealed = b64(seal(self._root, secret, _key_context(name, use, version)))
        return {"created": self._clock(), "sealed": sealed}

    def _version(self, ring: _Ring, name: str, use: Use, version: int) -> bytes:
        opened = ring.opened.get((name, version))
        known = ring.content["keys"].get(name)
        if known is None or known["use"] != use:
            raise IntegrityError(f"the key service has no key {name} to {use} with", "list them: cloister key list")
        if opened is None:
            if version > known["newest"]:
                raise IntegrityError(
                    f"this was wrapped under version {version} of the key {name}, and the key ring is older",
                    f"restore the newest {self._ring_file}",
                )
            if str(version) not in known["versions"]:
                raise destroyed(name, version)
            sealed = unb64(known["versions"][str(version)]["sealed"])
            opened = ring.opened[name, version] = open_sealed(self._root, sealed, _key_context(name, use, version))
        return opened

    def _check(self) -> str:
        return b64(seal(self._root, b"", {"use": f"{_FORMAT}/check"}))

    def _open_check(self, sealed: str) -> None:
        """Refuse a ring that another root key made, before anything is added to it."""
        open_sealed(self._root, unb64(sealed), {"use": f"{_FORMAT}/check"})


@dataclass(frozen=True, slots=True)
class _RingSigner:
    ring: EmbeddedKeys
    name: str

    def sign(self, message: bytes, /) -> bytes:
        return sign(p256_from_pem(self.ring._newest(self.name, "sign")[1]), message)

    def public_key(self) -> P256PublicKey:
        return p256_from_pem(self.ring._newest(self.name, "sign")[1]).public_key()


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeyServiceError(
            f"the key ring cannot be written: {error.strerror or type(error).__name__}",
            "check its disk and folder; the ring is whole, as it was before or after",
        ) from None


def _wrapping_key(content: dict[str, Any], name: str) -> dict[str, Any]:
    known: dict[str, Any] | None = content["keys"].get(require_name(name))
    if known is None:
        raise NotFoundError(f"there is no key {name}", "list them: cloister key list")
    if known["use"] != "wrap":
        raise InputError(f"{name} is not a wrapping key: it stays the same for ever", "list them: cloister key list")
    return known


def _key_context(name: str, use: Use, version: int) -> dict[str, str]:
    return {"use": f"{_FORMAT}/{use}", "name": name, "version": str(version)}


def _secret_context(name: str) -> dict[str, str]:
    return {"use": f"{_FORMAT}/secret", "name": name}
