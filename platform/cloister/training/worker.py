"""One Ray Train worker: `work` between a process group of our own and the authority.

Guarantees: what Ray sees of a worker is the path of the run's folder; an error reaches the authority's record as one
of ours, since the text of a foreign exception can quote a row. Ray starts the ranks again when one of them was killed,
and never because of what went wrong in one: that is not told to Ray, for it would go wrong again and be charged again.
The ranks of each start find each other through a file of their own that only this user can reach, and every socket
between them is on loopback.

Does not guarantee anything against other users of this host: gloo's connections are not authenticated, so an account
on the same machine can disturb them. What crosses them is sums that already carry their ranks' noise.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray import train
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig

from cloister.client.authority import AuthorityClient
from cloister.cluster.guardian import MARKER
from cloister.errors import CloisterError, ConflictError
from cloister.signing.run_end import ENDED
from cloister.training.code import code_digest
from cloister.training.run import RunFolder
from cloister.training.work import open_attempt, work

COLLECTIVE_TIMEOUT_S = 300  # a rank that waits longer for the others gives up, and Ray starts them all again
MEETING = "CLOISTER_MEETING"  # names the file in which the ranks of one start find each other


class BrokenGroupError(Exception):
    """Another rank is gone. Its text is ours: what gloo says names addresses."""


class Meeting(Backend):
    """Tells the ranks, each time that Ray starts them, where to meet: never those of a start before."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002  (Ray's signature)
        worker_group.execute(_meet_at, secrets.token_hex(8))


def _meet_at(name: str) -> None:
    os.environ[MEETING] = name


class NoProcessGroup(TorchConfig):
    """Keeps Ray Train from making a process group: its rendezvous listens on all interfaces and admits anybody."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Meeting


@contextlib.contextmanager
def process_group() -> Iterator[TorchGroup]:
    """Join the other ranks of this start, all on this host, and leave at the end. One rank alone needs no group.

    It is not torch's default group. An export to ONNX keeps that one alive beyond its end, so that the others would
    wait for a rank that has left.
    """
    group = TorchGroup()
    if group.world_size == 1:
        yield group
        return
    file = Path(os.environ[MARKER]) / f"ranks-{os.environ[MEETING]}"
    store = dist.FileStore(str(file), group.world_size)  # type: ignore[attr-defined]  # torch exports it untold
    with _broken():
        group.gloo = dist.ProcessGroupGloo(
            store, group.rank, group.world_size, timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        )  # fmt: skip
    try:
        yield group
    finally:
        group.gloo = None  # its connections end with it, which wakes the others up


@contextlib.contextmanager
def _broken() -> Iterator[None]:
    """What fails while ranks talk to each other fails because one of them is gone."""
    try:
        yield
    except RuntimeError:
        raise BrokenGroupError("another rank is gone") from None


class TorchGroup:
    """`torch.distributed` (gloo) as a `Group`."""

    gloo: Any = None
    """A `ProcessGroupGloo`, whose methods torch has no types for; None for one rank alone."""

    def __init__(self) -> None:
        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.gloo:
            with _broken():
                self.gloo.allreduce([tensor]).wait()

    def share(self, message: bytes) -> bytes:
        return self._of(0, message)

    def gather(self, message: bytes) -> list[bytes]:
        return [self._of(rank, message) for rank in range(self.world_size)]

    def _of(self, rank: int, message: bytes) -> bytes:
        """What that rank passes, on every rank."""
        if self.gloo is None:
            return message
        with _broken():
            size = torch.tensor([len(message)])
            self.gloo.broadcast(size, rank).wait()
            content = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == rank:
                content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            self.gloo.broadcast(content, rank).wait()
        return content.numpy().tobytes()


def train_worker(config: dict[str, str]) -> None:
    """Ray Train's entry point, once in each worker at each start. `config` has the paths of the run and of the jobs.

    Raises:
        BrokenGroupError: another rank is gone although the run goes on: Ray is to start all of them again.
        UnavailableError: the authority could not be told why this rank ends.
    """
    torch.set_num_threads(1)
    folder = RunFolder.open(Path(config["folder"]))
    client = folder.client()
    try:
        with process_group() as group:
            _work(folder, client, Path(config["jobs"]), group)
    except BrokenGroupError:
        if client.get(f"/v1/runs/{folder.run}")["state"] not in ENDED:
            raise


def _work(folder: RunFolder, client: AuthorityClient, jobs: Path, group: TorchGroup) -> None:
    """One attempt. What goes wrong is reported before the group ends: that wakes the others up, and they ask."""
    number: int | None = None
    try:
        code = code_digest(jobs)
        attempt = open_attempt(client, folder.run, code, group)
        number = attempt.number
        work(client, folder.run, code, group, attempt)
        return
    except BrokenGroupError:
        raise
    except CloisterError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  (the edge: its text may quote data, only its type goes on)
        failure = CloisterError(f"the worker failed with {type(error).__name__}", "report this to the platform's team")
    with contextlib.suppress(ConflictError):  # this attempt is over, and another one goes on
        folder.end(failure, number)
