"""A real authority over SQLite with people, a sealed table and a budget, for what is measured against one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloister.client.seal import seal_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from authority_world import World, adult_schema, blocks_of_adult


@contextmanager
def sealed_world(shards: int) -> Iterator[World]:
    """`adult@1` in so many shards. What is made lies in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "authority"
        directory.mkdir(mode=0o700)
        world = World(directory)
        try:
            world.register_everybody()
            seal_dataset(
                world.client("olga"), world.people["olga"].private, blocks_of_adult(), adult_schema(), shards=shards,
                holdout=0.2, receiving_key=world.authority.receiving_public,
            )  # fmt: skip
            world.set_budget(epsilon=100.0, delta=1e-3)
            yield world
        finally:
            world.close()
