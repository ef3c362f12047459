"""Splits a table into the pieces that are sealed one by one: shards of rows, and in each the columns of one class.

Guarantees: every row is in exactly one shard, every column in exactly one class file, and all class files of a shard
hold the same rows in the same order; the holdout shard shares no row with training. The order of rows is the
caller's permutation, which must come from a CSPRNG: this module draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.datasets.schema import CLASSES, DatasetSchema, SensitivityClass
from cloister.errors import InputError

HOLDOUT = "holdout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file to seal: the columns of class `cls` of shard `shard`."""

    shard: str
    role: Literal["train", "holdout"]
    cls: SensitivityClass
    table: pa.Table


def partition(
    table: pa.Table, schema: DatasetSchema, shards: int, holdout: float, permutation: npt.NDArray[np.int64]
) -> list[Part]:
    """`shards` training shards (`train-000`, …) and, if `holdout` > 0, one holdout shard, split by class.

    Raises:
        InputError: fewer rows than shards, or the fraction leaves one side empty.
        ValueError: `permutation` is not one of the table's rows.
    """
    rows = table.num_rows
    if len(permutation) != rows or not np.array_equal(np.sort(permutation), np.arange(rows)):
        raise ValueError("the permutation does not name every row once")
    if not 0.0 <= holdout < 1.0:
        raise InputError("the holdout fraction lies between 0 and 1", "use --holdout 0.2")
    held = round(rows * holdout)
    if shards < 1 or rows - held < shards or (holdout > 0.0 and held == 0):
        raise InputError("there are too few rows for this many shards and this holdout", "use fewer shards")
    pieces = [(f"train-{i:03d}", p) for i, p in enumerate(np.array_split(permutation[held:], shards))]
    if held:
        pieces.append((HOLDOUT, permutation[:held]))
    parts = []
    for shard, chosen in pieces:
        piece = table.take(pa.array(chosen)).combine_chunks()
        for cls in CLASSES:
            names = [column.name for column in schema.columns_of_class(cls)]
            if names:
                role: Literal["train", "holdout"] = "holdout" if shard == HOLDOUT else "train"
                parts.append(Part(shard=shard, role=role, cls=cls, table=piece.select(names)))
    return parts
