"""`cloister data` and `cloister budget`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common
from cloister.errors import InputError


@click.group()
def data() -> None:
    """Seal, list, show and verify datasets."""


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--schema", "schema_file", type=click.Path(path_type=Path), required=True, help="The dataset's schema.")
@click.option("--shards", type=click.IntRange(1, 10_000), default=4, show_default=True, help="Training shards.")
@click.option(
    "--holdout", type=click.FloatRange(0, 0.9), default=0.2, show_default=True, help="Share kept for evaluation."
)
@common
def seal(context: Context, file: Path, schema_file: Path, shards: int, holdout: float) -> None:
    """Validate FILE (CSV, gzipped CSV or Parquet), encrypt it here, and register it as the next version."""
    from cloister.canonical import unb64
    from cloister.client.seal import read_file, seal_dataset
    from cloister.datasets.schema import DatasetSchema

    schema = DatasetSchema.from_yaml_text(read_file(schema_file, "schema").decode(errors="replace"))
    content = read_file(file, "data file")
    with output.progress(f"sealing {schema.name}") as advance:
        shown = seal_dataset(
            context.client(),
            context.private_key(),
            content,
            schema,
            shards=shards,
            holdout=holdout,
            receiving_key=unb64(context.pinned()["receiving_key"]),
            progress=advance,
        )
    if context.json:
        output.value(shown)
        return
    output.say(f"Sealed {shown['dataset']}: {shown['rows']:,} rows in {shown['shards']} shards and one holdout of "
               f"{shown['holdout_rows']:,} rows.")  # fmt: skip
    output.facts({"files": f"{shown['files']}, one key each ({', '.join(shown['classes'])})",
                  "bytes": f"{shown['bytes']:,} encrypted", "digest": shown["digest"]})  # fmt: skip
    output.say("Protected now: the sealed copy opens only in a worker with a lease. Your own file is as it was.")
    output.say(f"Next: cloister budget set {schema.name} --epsilon 6 --delta 2e-5")


@data.command(name="list")
@common
def list_(context: Context) -> None:
    """List dataset versions."""
    rows = context.client().get("/v1/datasets")
    if context.json:
        output.value(rows)
        return
    cells = [(r["dataset"], r["owner"], f"{r['rows']:,}", r["files"], r["budget"]["epsilon_left"]) for r in rows]
    output.table(("dataset", "owner", "rows", "files", "epsilon left"), cells, empty="No dataset is sealed yet.")


@data.command()
@click.argument("dataset")
@common
def show(context: Context, dataset: str) -> None:
    """Show the public facts of a version: columns, classes, shards, budget."""
    from cloister.datasets.manifest import parse_reference

    name, version = parse_reference(dataset)
    shown = context.client().get(f"/v1/datasets/{name}/versions/{version}")
    if context.json:
        output.value(shown)
        return
    schema = shown["manifest"]["dataset_schema"]
    output.facts({"dataset": shown["dataset"], "owner": shown["owner"], "purpose": schema["purpose"],
                  "region": schema["region"], "retention": schema["retention"], "digest": shown["digest"],
                  "epsilon left": shown["budget"]["epsilon_left"]})  # fmt: skip
    cells = [(c["name"], c["type"], c["class"], c.get("role")) for c in schema["columns"]]
    output.table(("column", "type", "class", "role"), cells, empty="No columns.")


@data.command()
@click.argument("dataset")
@common
def verify(context: Context, dataset: str) -> None:
    """Compare every stored file of a version with its signed manifest. Needs no key."""
    from cloister.client.seal import verify_dataset
    from cloister.datasets.manifest import parse_reference

    with output.progress(f"verifying {dataset}") as advance:
        shown = verify_dataset(context.client(), *parse_reference(dataset), progress=advance)
    if context.json:
        output.value(shown)
    else:
        output.say(f"{shown['dataset']} is whole: {shown['files']} files are as they were sealed.")


@click.group()
def budget() -> None:
    """Set and show a dataset's privacy budget."""


@budget.command(name="set")
@click.argument("dataset", type=NAME)
@click.option("--epsilon", type=float, required=True, help="Total over all runs, at most 100.")
@click.option("--delta", type=float, required=True, help="Total over all runs, below 0.01.")
@common
def set_(context: Context, dataset: str, epsilon: float, delta: float) -> None:
    """Set the total that all runs on DATASET (all versions) may spend."""
    if not (math.isfinite(epsilon) and math.isfinite(delta)):
        raise InputError("epsilon and delta are numbers", "such as --epsilon 6 --delta 2e-5")
    shown = context.client().put(f"/v1/datasets/{dataset}/budget", {"epsilon": epsilon, "delta": delta})
    _show_budget(context, shown)


@budget.command(name="show")
@click.argument("dataset", type=NAME)
@common
def show_budget(context: Context, dataset: str) -> None:
    """Show the budget, what is left, and who spent it."""
    _show_budget(context, context.client().get(f"/v1/datasets/{dataset}/budget"))


def _show_budget(context: Context, shown: dict[str, Any]) -> None:
    if context.json:
        output.value(shown)
        return
    output.say(f"{shown['dataset']}: epsilon {shown['epsilon_left']:.3f} of {shown['epsilon']:g} left, "
               f"delta {shown['delta_left']:g} of {shown['delta']:g}.")  # fmt: skip
    if "history" in shown:
        cells = [(h["run"], h["author"], h["state"], h["epsilon"]) for h in shown["history"]]
        output.table(("run", "author", "state", "epsilon"), cells, empty="Nobody has spent any of it.")
