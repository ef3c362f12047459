"""What the authority needs from a key service, whichever it is.

Guarantees, of every service: named keys have versions 1, 2, …; what is wrapped opens only under the same name and the
same associated data, and under a version that is still there; a new version is durable before anything is wrapped under
it; what `destroy_below` destroyed is gone for good from the service (not from copies that were made of it before);
nothing answers from memory what the service would refuse now.

Errors, of every service: `KeyServiceError` when it cannot be had in its stated time, is sealed, full, or refuses the
authority; `IntegrityError` when bytes, name, associated data or version do not fit. None holds a key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cloister.errors import InputError, IntegrityError
from cloister.sealing.envelope import key_version
from cloister.signing.keys import Signer

Use = Literal["wrap", "sign", "derive"]

# A use has a word of its own ("dataset", "models"), and may have a key for each of many things: "dataset/adult".
KEY_NAME = re.compile(r"[a-z]+(/[a-z0-9][a-z0-9-]{0,99})?")
SECRET_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")
_VAULT_TEXT = re.compile(rb"vault:v([1-9][0-9]{0,8}):.+")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """A named key. The versions from `oldest` to `newest` are there; times are in Unix seconds."""

    name: str
    use: Use
    oldest: int
    newest: int
    created: float
    rotated: float
    """When the newest version was made."""


class Secrets(Protocol):
    """The part of a key service that keeps what no named key can be: other keys, and how far the log was."""

    def secret(self, name: str) -> bytes:
        """A stored secret, such as a signing key's PEM.

        Raises:
            NotFoundError: there is none of that name.
        """

    def store_secret(self, name: str, value: bytes) -> None:
        """Store a secret, once: no name is ever given another value.

        Raises:
            ConflictError: there is one of that name already.
        """

    def remember(self, size: int, root: str, *, rollback: bool = False) -> None:
        """Keep how long the log was, and its root in hex, where restoring the database does not reach.

        Never less than what is kept, unless `rollback`: a restore of an older state, that somebody answers for.
        """

    def remembered(self) -> tuple[int, str] | None:
        """What was last kept; None before the first time."""


class KeyService(Secrets, Protocol):
    """Named keys: wrapping keys, signing keys that never leave, and keys that others are derived from."""

    def wrap(self, name: str, keys: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Wrap each (256-bit key, associated data) under the newest version of `name`, made when first used."""

    def unwrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """The keys of each (wrapped key, associated data). All of them, or an error."""

    def rewrap(self, name: str, wrapped: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Each (wrapped key, associated data) under the newest version."""

    def rotate(self, name: str) -> int:
        """Make a new version of a wrapping key, and say which. It is durable when this returns.

        Raises:
            NotFoundError: there is no such key.
            InputError: not a wrapping key: others pin what a signing key is, and derived keys would change.
        """

    def destroy_below(self, name: str, version: int) -> None:
        """Destroy all versions before `version`, for good. Twice does no harm.

        Raises:
            NotFoundError, InputError: as `rotate`; or there is no such version, so that nothing would be left.
        """

    def states(self) -> list[KeyState]:
        """Every named key, by name."""

    def signer(self, name: str) -> Signer:
        """The P-256 key `name`, made when first asked for. It is the same for ever."""

    def derive(self, name: str, context: bytes) -> bytes:
        """32 bytes that only this key gives for this context, and always the same. `name` is not a wrapping key's."""

    def close(self) -> None:
        """Let go of what it holds: connections, threads, tokens."""


def version_of(wrapped: bytes) -> int:
    """Under which version of its key something was wrapped, by any service.

    Raises:
        IntegrityError: these are no bytes of a key service.
    """
    found = _VAULT_TEXT.fullmatch(wrapped)
    return int(found[1]) if found else key_version(wrapped)


def require_name(name: str) -> str:
    """A named key's name, if it is one.

    Raises:
        InputError: it is not.
    """
    if not KEY_NAME.fullmatch(name):
        raise InputError("this is not the name of a key", "list them: cloister key list")
    return name


def destroyed(name: str, version: int) -> IntegrityError:
    """A version of a key is gone."""
    return IntegrityError(
        f"this was wrapped under version {version} of the key {name}, which is not there: it was destroyed",
        "nothing opens it any more; if the state was restored from a backup, restore one from after the destruction",
    )
