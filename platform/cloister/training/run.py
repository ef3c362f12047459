"""The folder of one run (0700): which run, which authority, and the run's own key. All that a worker is told.

Guarantees: `end` says that the run has ended only of the attempt that it was asked for, signed by the run's own key;
what the run did not use of its epsilon is free again by that alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cloister.client.authority import AuthorityClient
from cloister.client.node import present_node
from cloister.errors import CloisterError, InputError, NotFoundError
from cloister.process import describe
from cloister.signing import keys, run_end
from cloister.stores.files import locked, private_directory, read_json, write_atomic, write_json

_HINT = "submit the run again: cloister train submit SPEC"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Public facts of a run; its private key is in `directory/run.key` and is only read to sign."""

    directory: Path
    run: str
    workers: int
    min_workers: int
    retries: int
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
        before: dict[str, Any] = {"min_workers": facts.get("workers"), "retries": 0}  # of before there were attempts
        try:
            return cls(directory=directory, **(before | facts))
        except TypeError as error:
            raise InputError(f"{directory / 'run.json'} is not a run of this version", _HINT) from error

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One command of this machine at a time begins or ends the run.

        Raises:
            NotFoundError: it was forgotten meanwhile.
        """
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.directory / "lock"))
            except FileNotFoundError as error:
                raise NotFoundError(f"run {self.run} is not on this machine any more", _HINT) from error
            yield

    def client(self) -> AuthorityClient:
        """Speak to the authority as this run."""
        return AuthorityClient(
            self.authority_url, ca_path=Path(self.authority_ca), name=self.run, private_key_pem=self._key(),
            node=present_node(self.node),
        )  # fmt: skip

    def end(self, error: CloisterError, attempt: int | None = None) -> dict[str, Any]:
        """Say that the run has ended, with `error` unless it was stopped, and settle its charge. Twice does no harm.

        Raises:
            ConflictError: `attempt` is not the run's last: another goes on, so nothing has ended.
            UnavailableError: the authority does not answer.
        """
        with contextlib.closing(self.client()) as client:
            shown: dict[str, Any] = client.get(f"/v1/runs/{self.run}")
            if shown["settled"]:
                return shown
            said = run_end.RunEnd(
                run=self.run,
                attempt=shown["attempt"] if attempt is None else attempt,
                outcome="stopped" if shown["state"] == "stopped" else "failed",
                steps_done=shown["steps_done"],
            )
            envelope = run_end.make(said, shown["plan"], keys.ed25519_from_pem(self._key()))
            return dict(client.post(f"/v1/runs/{self.run}/end", {"envelope": envelope, "error": describe(error)}))

    def _key(self) -> bytes:
        try:
            return (self.directory / "run.key").read_bytes()
        except OSError as error:
            raise NotFoundError(f"run {self.run} has no key on this machine", _HINT) from error
