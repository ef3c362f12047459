"""The folder of one run (0700): which run, which authority, and the run's own key. All that a worker is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloister.client.authority import AuthorityClient
from cloister.client.node import present_node
from cloister.errors import InputError, NotFoundError
from cloister.stores.files import private_directory, read_json, write_atomic, write_json

ENDED = frozenset({"finished", "failed", "stopped"})  # the states of a run that never change again
_HINT = "submit the run again: cloister train submit SPEC"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Public facts of a run; its private key is in `directory/run.key` and is only read to sign."""

    directory: Path
    run: str
    workers: int
    gpus_per_worker: int
    authority_url: str
    authority_ca: str
    jobs: str
    node: str | None = None
    """The folder of the node that the workers run on; without one, `$CLOISTER_NODE` of each."""

    def write(self, private_key_pem: bytes) -> None:
        """Make the folder."""
        private_directory(self.directory)
        write_atomic(self.directory / "run.key", private_key_pem)
        facts = asdict(self)
        del facts["directory"]
        write_json(self.directory / "run.json", facts)

    @classmethod
    def open(cls, directory: Path) -> RunFolder:
        """Read it back.

        Raises:
            NotFoundError: there is no such run on this machine.
        """
        facts: dict[str, Any] = read_json(
            directory / "run.json", what=f"run {directory.name} on this machine", hint=_HINT
        )
        try:
            return cls(directory=directory, **facts)
        except TypeError as error:
            raise InputError(f"{directory / 'run.json'} is not a run of this version", _HINT) from error

    def client(self) -> AuthorityClient:
        """Speak to the authority as this run."""
        try:
            key = (self.directory / "run.key").read_bytes()
        except OSError as error:
            raise NotFoundError(f"run {self.run} has no key on this machine", _HINT) from error
        return AuthorityClient(
            self.authority_url, ca_path=Path(self.authority_ca), name=self.run, private_key_pem=key,
            node=present_node(self.node),
        )  # fmt: skip
