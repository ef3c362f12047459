"""A session at the authority for whoever logged in at an outside issuer: one file with a refresh token (0600).

Guarantees: a refresh token is used once, by one process at a time; the new one is on disk before it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.client.authority import AuthorityClient
from cloister.errors import AuthenticationError
from cloister.signing import tokens
from cloister.stores.files import locked, private_directory, read_json, write_json

_HINT = "log in again: cloister login --issuer URL"


def exchange(url: str, ca: Path, foreign_token: str, directory: Path) -> str:
    """Trade an issuer's token for a session (RFC 8693), kept in `directory`; returns the name that we have here.

    Raises:
        CloisterError: the authority refused, or does not answer.
    """
    form = {
        "grant_type": tokens.TOKEN_EXCHANGE,
        "subject_token": foreign_token,
        "subject_token_type": tokens.JWT_TYPE,
        "resource": tokens.AUTHORITY_AUDIENCE,
    }
    answer = _post(url, ca, "/v1/token", form)
    name = str(answer["name"])
    private_directory(directory)
    write_json(directory / f"{name}.session", {"refresh_token": answer["refresh_token"]})
    return name


def end(url: str, ca: Path, file: Path) -> None:
    """End the session in `file`, there and here."""
    with Session(file).turn():
        kept = read_json(file, what="session", hint=_HINT)
        _post(url, ca, "/v1/revoke", {"token": kept["refresh_token"]})
        file.unlink()  # only now: with the authority away, it could not be ended any more


@dataclass(frozen=True, slots=True)
class Session:
    """The session in `file`, as a `Credential`."""

    file: Path

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold this around `form` and `answered`: a token that two processes use ends the session."""
        with locked(self.file.with_suffix(".lock")):
            yield

    def form(self) -> dict[str, str]:
        kept = read_json(self.file, what="session", hint=_HINT)
        return {"grant_type": "refresh_token", "refresh_token": str(kept["refresh_token"])}

    def answered(self, answer: Mapping[str, Any]) -> None:
        if "refresh_token" not in answer:
            raise AuthenticationError("the session was not renewed", _HINT)
        write_json(self.file, {"refresh_token": answer["refresh_token"]})


def _post(url: str, ca: Path, path: str, form: Mapping[str, str]) -> dict[str, Any]:
    with contextlib.closing(AuthorityClient(url, ca_path=ca, name="")) as client:
        return client.post_form(path, form)
