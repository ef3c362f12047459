"""`cloister data`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common
from cloister.cli.inspect import inspect
from cloister.cli.lifecycle import certificate, erase, expire, list_, rectify, show

if TYPE_CHECKING:
    import pyarrow as pa

    from cloister.datasets.schema import DatasetSchema

USUAL_DELTA = 2.5e-5


@click.group()
def data() -> None:
    """Seal, list, show, verify and erase datasets."""


for command in (inspect, list_, show, erase, rectify, expire, certificate):
    data.add_command(command)


def _splitting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how rows are split."""
    for option in (
        click.option("--holdout", type=click.FloatRange(0, 0.9), default=0.2, show_default=True,
                     help="Share kept for evaluation."),
        click.option("--shards", type=click.IntRange(1, 10_000), default=4, show_default=True,
                     help="Training shards; as many again for every 32 MiB of rows."),
    ):  # fmt: skip
        command = option(command)
    return command


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--schema", "schema_file", type=click.Path(path_type=Path), required=True, help="The dataset's schema.")
@_splitting
@click.option(
    "--derived-from", multiple=True, metavar="NAME@N", help="Another dataset that this one was made from; repeatable."
)
@common
def seal(
    context: Context, file: Path, schema_file: Path, shards: int, holdout: float, derived_from: tuple[str, ...]
) -> None:
    """Validate FILE (CSV, JSON Lines, Parquet, Arrow), encrypt it here, and register it as the next version.

    FILE is read block by block, so that it may be larger than memory. Until the whole of it is sealed there is no
    version, and what was uploaded is removed again when something is wrong.
    """
    from cloister.client.seal import read_file, seal_dataset
    from cloister.datasets.schema import DatasetSchema
    from cloister.rounding import most_rows

    schema = DatasetSchema.from_yaml_text(read_file(schema_file, "schema").decode(errors="replace"))
    with _blocks(file, schema, f"sealing {schema.name}") as blocks:
        shown = seal_dataset(
            context.client(), context.private_key(), blocks, schema, shards=shards, holdout=holdout,
            receiving_key=_receiving_key(context), derived_from=derived_from,
        )  # fmt: skip
    if context.json:
        output.value(shown)
        return
    output.say(f"Sealed {shown['dataset']}: {shown['rows']:,} rows in {shown['shards']} shards and one holdout of "
               f"{shown['holdout_rows']:,} rows.")  # fmt: skip
    output.facts({"files": f"{shown['files']}, one key each ({', '.join(shown['classes'])})",
                  "bytes": f"{shown['bytes']:,} encrypted", "digest": shown["digest"]})  # fmt: skip
    output.say("Protected now: the sealed copy opens only in a worker with a lease. Your own file is as it was.")
    population = shown["population"] or {}  # none if the answer was lost
    if together := population.get("shared_with"):
        shares = "would share" if population.get("approval") else "shares"
        output.say(f"It {shares} one privacy budget with {', '.join(together)}.")
    if population.get("approval"):
        output.say(f"Asked before it is trained on: {population['question']}")
        output.say(f"Next: a security officer answers: cloister approvals show {population['approval']}")
    elif together:
        output.say(f"Next: cloister budget show {schema.name}")
    else:
        rows = most_rows(shown["rows"] - shown["holdout_rows"]) + most_rows(shown["holdout_rows"])
        output.say(f"Next: cloister budget set {schema.name} --epsilon 6 --delta {_delta(rows)}")


def _delta(rows: int) -> str:
    """A budget's delta for so many rows, to begin with: two digits, clearly below 1/rows."""
    most = 0.8 / max(1, rows)
    if most >= USUAL_DELTA:
        return "2.5e-5"
    power = math.floor(math.log10(most))
    return f"{math.floor(10 * most / 10**power) / 10:g}e{power}"


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--to", "name", type=NAME, required=True, help="The dataset whose newest live version gets the rows.")
@_splitting
@common
def append(context: Context, file: Path, name: str, shards: int, holdout: float) -> None:
    """Seal the rows of FILE as further shards of a dataset, in a version of its own.

    The files of the version before are listed by the new one as they are: nothing is encrypted again. The schema is
    the one of that version.
    """
    from cloister.client.seal import append_to_dataset, newest_schema

    client = context.client()
    schema = newest_schema(client, name)
    with _blocks(file, schema, f"appending to {name}") as blocks:
        shown = append_to_dataset(
            client, context.private_key(), blocks, schema, shards=shards, holdout=holdout,
            receiving_key=_receiving_key(context),
        )  # fmt: skip
    if context.json:
        output.value(shown)
        return
    (parent,) = shown["parents"]
    output.say(f"Sealed {shown['dataset']}: {shown['new_rows']:,} new rows in {shown['new_files']} files, and the "
               f"{shown['rows'] - shown['new_rows']:,} rows of {parent} in its {shown['files'] - shown['new_files']} "
               "files, as they are.")  # fmt: skip
    output.say(f"Protected now: the new rows, as those before. {parent} stays as it was, and so does your own file.")
    output.say(f"Next: name {shown['dataset']} in a training spec. Both spend the same budget: "
               f"cloister budget show {name}")  # fmt: skip


@contextlib.contextmanager
def _blocks(file: Path, schema: DatasetSchema, title: str) -> Iterator[Iterator[pa.Table]]:
    """The file's rows, block by block, under a progress bar."""
    from cloister.client.source import open_source

    with open_source(file) as source, output.progress(title) as advance:

        def read() -> Iterator[pa.Table]:
            for block in source.read_blocks(schema):
                advance(source.position, source.size, f"{source.position / 1e6:,.0f} of {source.size / 1e6:,.0f} MB")
                yield block

        yield read()


def _receiving_key(context: Context) -> bytes:
    from cloister.canonical import unb64

    return unb64(context.pinned()["receiving_key"])


@data.command()
@click.argument("dataset")
@common
def verify(context: Context, dataset: str) -> None:
    """Compare every stored file of a version with its signed manifest. Needs no key."""
    from cloister.client.verify import verify_dataset
    from cloister.datasets.manifest import parse_reference

    with output.progress(f"verifying {dataset}") as advance:
        shown = verify_dataset(context.client(), *parse_reference(dataset), progress=advance)
    if context.json:
        output.value(shown)
    else:
        output.say(f"{shown['dataset']} is whole: {shown['files']} files are as they were sealed.")
