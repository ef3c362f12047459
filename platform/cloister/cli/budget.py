"""`cloister budget`."""

from __future__ import annotations

import math
import sys
from datetime import UTC, datetime
from typing import Any

import click

from cloister.cli import output
from cloister.cli.context import NAME, Context, common
from cloister.errors import InputError

BAR_WIDTH = 40


@click.group()
def budget() -> None:
    """Set and show a dataset's privacy budget."""


@budget.command(name="set")
@click.argument("dataset", type=NAME)
@click.option("--epsilon", type=float, required=True, help="Total over all runs, at most 100.")
@click.option("--delta", type=float, required=True, help="Total over all runs, below 0.01 and one in as many rows.")
@common
def set_(context: Context, dataset: str, epsilon: float, delta: float) -> None:
    """Set the total that all runs on DATASET (all versions) may spend. More than before takes approval."""
    if not (math.isfinite(epsilon) and math.isfinite(delta)):
        raise InputError("epsilon and delta are numbers", "such as --epsilon 6 --delta 2e-5")
    shown = context.client().put(f"/v1/datasets/{dataset}/budget", {"epsilon": epsilon, "delta": delta})
    if context.json:
        output.value(shown)
    else:
        output.say(_summary(shown))


@budget.command()
@click.argument("dataset", type=NAME)
@common
def show(context: Context, dataset: str) -> None:
    """Show the budget, what is left, how it came to be what it is, and who spent it."""
    shown = context.client().get(f"/v1/datasets/{dataset}/budget")
    if context.json:
        output.value(shown)
        return
    output.say(_summary(shown))
    output.facts(
        {"protects": output.unit(shown["unit"])} | {name: _share(shown, name) for name in ("epsilon", "delta")}
    )
    output.say()
    output.table(("changed", "by", "epsilon", "delta", "approval"), [
        (_when(c["time"]), c["person"], _change(c["epsilon"]), _change(c["delta"]), c["approval"])
        for c in shown["changes"]
    ], empty="Nobody has set it yet.")  # fmt: skip
    output.say()
    output.table(("spent by", "runs", "epsilon", "delta"), [
        (p["person"], p["runs"], p["epsilon"], p["delta"]) for p in shown["people"]
    ], empty="Nobody has spent any of it.")  # fmt: skip
    if shown["runs"]:
        output.say()
        output.table(("run", "on", "by", "state", "attempts", "steps", "epsilon", "if held out", ""), [
            (r["run"], r["dataset"], r["author"], r["state"], r["attempts"], f"{r['steps']:,}", r["epsilon"],
             r["evaluation_epsilon"], "" if r["settled"] else "held")
            for r in shown["runs"]
        ], empty="")  # fmt: skip


def _summary(shown: dict[str, Any]) -> str:
    return (f"{shown['dataset']}: epsilon {shown['epsilon_left']:.3f} of {shown['epsilon']:g} left, "
            f"delta {shown['delta_left']:g} of {shown['delta']:g}.")  # fmt: skip


def _share(shown: dict[str, Any], name: str) -> str:
    """How much of a total is spent, and how much is held for runs that have not settled; as a bar on a terminal."""
    total, charged = shown[name], shown[f"{name}_charged"]
    held = sum(run[name] for run in shown["runs"] if not run["settled"])
    spent = max(0.0, charged - held)
    bar = ""
    if total > 0 and sys.stdout.isatty():
        first, second = (round(BAR_WIDTH * min(1.0, part / total)) for part in (spent, charged))
        bar = "█" * first + "▒" * (second - first) + "░" * (BAR_WIDTH - second) + "  "
    return f"{bar}{spent:.4g} spent, {held:.4g} held for runs that go on, {shown[f'{name}_left']:.4g} left of {total:g}"


def _change(values: list[float]) -> str:
    before, after = values
    return f"{after:g}" if before == 0 else f"{before:g} → {after:g}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
