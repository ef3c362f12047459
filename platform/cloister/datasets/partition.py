"""Splits rows into the pieces that are sealed one by one: shards of rows, in each a file for each class, and the index.

Guarantees: every row is in exactly one shard, every column in exactly one class file, and all files of a shard hold the
same rows in the same order; a holdout shard shares no row with training, and no unit where a unit has several rows. The
order of rows is the caller's permutation, which must come from a CSPRNG: this module draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloister.datasets.schema import INDEX, ORDINAL_COLUMN, DatasetSchema, PartName
from cloister.datasets.subjects import Tags, held_out, index_table
from cloister.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file to seal: what the part `part` of shard `shard` holds."""

    shard: str
    role: Literal["train", "holdout"]
    part: PartName
    table: pa.Table


@dataclass(slots=True)
class Numbering:
    """How many shards of each role have a name by now."""

    train: int = 0
    holdout: int = 0


def partition(
    table: pa.Table, tags: Tags | None, schema: DatasetSchema, shards: int, holdout: float,
    permutation: npt.NDArray[np.int64], numbering: Numbering,
) -> Iterator[Part]:  # fmt: skip
    """One block of rows, as `subjects.protect` gave it, as `shards` training shards and, if `holdout` > 0, one more.

    Where a unit has several rows, the holdout takes whole units: its share is right on average, and it may be empty.

    Raises:
        InputError: fewer rows than shards, or the fraction leaves one side empty.
        ValueError: `permutation` is not one of the table's rows.
    """
    rows = table.num_rows
    if len(permutation) != rows or not np.array_equal(np.sort(permutation), np.arange(rows)):
        raise ValueError("the permutation does not name every row once")
    if not 0.0 <= holdout < 1.0:
        raise InputError("the holdout fraction lies between 0 and 1", "use --holdout 0.2")
    by_unit = schema.unit != "row"
    if by_unit and tags is not None:
        apart = held_out(tags, holdout)[permutation]
        held, rest = permutation[apart], permutation[~apart]
    else:
        held, rest = np.split(permutation, [round(rows * holdout)])
    if shards < 1 or len(rest) < shards or (holdout > 0.0 and not len(held) and not by_unit):
        raise InputError("there are too few rows for this many shards and this holdout", "use fewer shards")
    pieces: list[tuple[Literal["train", "holdout"], npt.NDArray[np.int64]]] = [
        ("train", piece) for piece in np.array_split(rest, shards)
    ]
    if len(held):
        pieces.append(("holdout", held))
    for role, chosen in pieces:
        number = getattr(numbering, role)
        setattr(numbering, role, number + 1)
        yield from shard_parts(table.take(pa.array(chosen)).combine_chunks(), None if tags is None else tags[chosen],
                               schema, f"{role}-{number:03d}", role)  # fmt: skip


def shard_parts(
    rows: pa.Table, tags: Tags | None, schema: DatasetSchema, shard: str, role: Literal["train", "holdout"]
) -> Iterator[Part]:
    """The files of one shard: of each class with columns, the index where the schema has a subject, and the ordinals if
    `rows` have them.
    """
    for part in schema.parts(numbered=ORDINAL_COLUMN in rows.column_names):
        if part == INDEX:
            assert tags is not None  # noqa: S101 - a schema with a subject has tags
            yield Part(shard=shard, role=role, part=part, table=index_table(tags))
        else:
            yield Part(shard=shard, role=role, part=part, table=rows.select(list(schema.stored_columns(part))))
