"""One Ray Train worker: `work` between Ray's process group and the authority.

Guarantees: what Ray sees of a worker is the path of the run's folder; an error reaches the authority's record and
Ray's logs as one of ours, since the text of a foreign exception can quote a row.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ray import train

from cloister.errors import CloisterError
from cloister.process import describe
from cloister.training.code import code_digest
from cloister.training.run import RunFolder
from cloister.training.work import work


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
    try:
        work(client, folder.run, code_digest(Path(config["jobs"])), TorchGroup())
    except CloisterError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  (the edge: its text may quote data, only its type goes on)
        failure = CloisterError(f"the worker failed with {type(error).__name__}", "report this to the platform's team")
    if failure:
        client.post(f"/v1/runs/{folder.run}/failure", {"error": describe(failure)})
        raise failure
