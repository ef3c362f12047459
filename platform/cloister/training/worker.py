"""One Ray Train worker: `work` between a process group of our own and the authority.

Guarantees: what Ray sees of a worker is the path of the run's folder; an error reaches the authority's record and
Ray's logs as one of ours, since the text of a foreign exception can quote a row. The ranks find each other through a
file that only this user can reach, and every socket between them is on loopback.

Does not guarantee anything against other users of this host: gloo's connections are not authenticated, so an account
on the same machine can disturb them. What crosses them is sums that already carry their ranks' noise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from cloister.cluster.guardian import MARKER
from cloister.errors import CloisterError
from cloister.process import describe
from cloister.training.code import code_digest
from cloister.training.run import RunFolder
from cloister.training.work import work

COLLECTIVE_TIMEOUT_S = 300  # a rank that waits longer for the others gives up, and the run ends


class NoProcessGroup(TorchConfig):
    """Keeps Ray Train from making a process group: its rendezvous listens on all interfaces and admits anybody."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


@contextlib.contextmanager
def process_group() -> Iterator[TorchGroup]:
    """Join the other ranks of this job, all on this host, and leave at the end. One rank alone needs no group."""
    group = TorchGroup()
    if group.world_size == 1:
        yield group
        return
    # One file a job: who submits a second job to a held cluster must not meet the ranks of the first.
    file = Path(os.environ[MARKER]) / f"ranks-{ray.get_runtime_context().get_job_id()}"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        yield group
    finally:
        dist.destroy_process_group()


class TorchGroup:
    """`torch.distributed` (gloo) as a `Group`."""

    def __init__(self) -> None:
        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def agree(self, ok: bool) -> bool:
        if self.world_size == 1:
            return ok
        flag = torch.tensor([int(ok)])
        dist.broadcast(flag, src=0)
        return bool(flag.item())


def train_worker(config: dict[str, str]) -> None:
    """Ray Train's entry point, once in each worker. `config` holds the paths of the run's folder and of the jobs."""
    torch.set_num_threads(1)
    folder = RunFolder.open(Path(config["folder"]))
    client = folder.client()
    failure: CloisterError | None = None
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(process_group())
            work(client, folder.run, code_digest(Path(config["jobs"])), group)
        except CloisterError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (the edge: its text may quote data, only its type goes on)
            failure = CloisterError(
                f"the worker failed with {type(error).__name__}", "report this to the platform's team"
            )
        if failure:
            # Before the group ends: that breaks the other ranks' collectives, and the first report is what is kept.
            client.post(f"/v1/runs/{folder.run}/failure", {"error": describe(failure)})
            raise failure
