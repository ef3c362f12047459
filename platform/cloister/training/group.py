"""The ranks of an attempt, and what one of them says to all.

Guarantees: what an act on one rank fails with is raised on every rank, in words that may be written down (`describe`);
no rank waits for one that has failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from cloister.canonical import canonical_json
from cloister.errors import from_dict
from cloister.process import describe

T = TypeVar("T")


class Group(Protocol):
    """The ranks of an attempt, as `torch.distributed` or a test provides them."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over all ranks, in place."""

    def share(self, message: bytes) -> bytes:
        """What rank 0 passes, on every rank; returns only when rank 0 has passed it."""

    def gather(self, message: bytes) -> list[bytes]:
        """What each rank passes, in their order, on every rank; returns only when all have passed it."""


def from_rank_0(group: Group, act: Callable[[], Any]) -> Any:
    """What `act` gives on rank 0, as JSON, on every rank; or what it failed with, raised on every rank."""
    said, failure = _said(act) if group.rank == 0 else (b"", None)
    return _heard(group.share(said), failure)


def on_each_rank(group: Group, act: Callable[[], T]) -> T:
    """What `act` gives on this rank, once it has succeeded on all.

    Raises:
        CloisterError: it failed on another rank: what `describe` says of it, of the first of those.
        Exception: it failed on this rank, which is the first of those.
    """
    done: list[T] = []
    said, failure = _said(lambda: done.append(act()))
    for rank, message in enumerate(group.gather(said)):
        _heard(message, failure if rank == group.rank else None)
    return done[0]


def _said(act: Callable[[], Any]) -> tuple[bytes, Exception | None]:
    """What this rank passes to others: what `act` gives, or fails with, as JSON; and what it failed with."""
    try:
        return canonical_json({"value": act()}), None
    except Exception as error:  # noqa: BLE001  (whatever it is, the other ranks must not wait for ever)
        return canonical_json({"error": describe(error)}), error


def _heard(message: bytes, failure: Exception | None) -> Any:
    """What a rank gave; or what it failed with, raised: `failure`, if that rank is this one."""
    told = json.loads(message)
    if "error" in told:
        raise failure or from_dict(told["error"])
    return told["value"]
