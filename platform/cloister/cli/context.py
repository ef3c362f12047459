"""What every command needs: whose home, as whom, in which form to answer."""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.errors import AuthenticationError, InputError, NotFoundError, UnavailableError
from cloister.stores.home import Home

if TYPE_CHECKING:
    from cloister.client.authority import AuthorityClient

IDENTITY_VARIABLE = "CLOISTER_AS"
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True, slots=True)
class Context:
    """One invocation."""

    home: Home
    identity: str | None
    json: bool

    def name(self) -> str:
        """As whom to act: `--as`, `$CLOISTER_AS`, or whoever logged in last.

        Raises:
            AuthenticationError: nobody.
        """
        current = self.home.identities / "current"
        name = self.identity or os.environ.get(IDENTITY_VARIABLE) or (current.read_text() if current.exists() else "")
        if not name:
            raise AuthenticationError("nobody is logged in", "cloister login NAME, or add --as NAME")
        return name.strip()

    def private_key(self) -> bytes:
        """The acting identity's private key, PEM.

        Raises:
            NotFoundError: it is not on this machine.
            InputError: the file is open to others.
        """
        path = key_file(self.home, self.name())
        if not path.is_file():
            raise NotFoundError(
                f"there is no key for {self.name()} on this machine",
                f"make one: cloister identity add {self.name()} --role ROLE",
            )
        if path.stat().st_mode & 0o077:
            raise InputError(f"the key file of {self.name()} is open to others", f"chmod 600 {path}")
        return path.read_bytes()

    def client(self) -> AuthorityClient:
        """The authority, as the acting identity.

        Raises:
            NotFoundError: this machine knows no authority, or has no such key.
        """

        return self.client_of(authority_address(self.home)[0])

    def client_of(self, url: str) -> AuthorityClient:
        """As `client`, for the authority at `url`, under the CA that this machine has pinned."""
        from cloister.client.authority import AuthorityClient

        ca, name = self.home.client / "ca.pem", self.name()
        session = session_file(self.home, name)
        if session.exists():
            from cloister.client.session import Session

            return AuthorityClient(url, ca_path=ca, name=name, credential=Session(session))
        return AuthorityClient(url, ca_path=ca, name=name, private_key_pem=self.private_key())

    def pinned(self) -> dict[str, Any]:
        """The authority's public keys, as they were when this machine first trusted it (`/v1/info`)."""
        return dict(_authority_facts(self.home)["pinned"])


def key_file(home: Home, name: str) -> Path:
    """Where the private key of `name` is kept.

    Raises:
        InputError: not a name.
    """
    if not name or not all(letter.isalnum() or letter in "._-" for letter in name) or name.startswith("."):
        raise InputError("a name has letters, digits, '.', '_' and '-' only", "choose another name")
    return home.identities / f"{name}.key"


def session_file(home: Home, name: str) -> Path:
    """Where the session of `name` is kept, if they logged in at an issuer."""
    return key_file(home, name).with_suffix(".session")


def authority_address(home: Home) -> tuple[str, Path]:
    """URL and CA certificate of the authority that this machine knows.

    Raises:
        NotFoundError: none yet.
    """
    return str(_authority_facts(home)["url"]), home.client / "ca.pem"


def _authority_facts(home: Home) -> dict[str, Any]:
    from cloister.stores.files import read_json

    file = home.client / "authority.json"
    return dict(read_json(file, what="authority known to this machine", hint="start one: cloister up"))


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that is taken before anything is started or recorded for it.

    Raises:
        InputError: `host` is not an address of this machine. UnavailableError: the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror as error:
        raise InputError(f"{host} is not an address of this machine", "use --host 127.0.0.1") from error
    except OSError as error:
        raise UnavailableError(
            f"port {port} on {host} cannot be used: {error.strerror}", f"choose another: --port {port + 1}"
        ) from error


class NameType(click.ParamType[str]):
    """A name or an id as a word that may stand in a URL and in a path."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _WORD.fullmatch(value):
            hint = "use one that a `list` command shows, without @ and its version"
            raise InputError(f"{value[:40]!r} is not a name or an id", hint)
        return value


NAME = NameType()


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--as` and `--json` to a command, and hands it a `Context` first."""

    @click.option("--as", "identity", metavar="NAME", help="Act as this identity.")
    @click.option("--json", "as_json", is_flag=True, help="Answer with one JSON value.")
    @functools.wraps(command)
    def wrapped(*arguments: Any, identity: str | None, as_json: bool, **options: Any) -> Any:
        context = Context(Home.find(), identity, as_json)
        click.get_current_context().meta["json"] = as_json
        return command(context, *arguments, **options)

    return wrapped
