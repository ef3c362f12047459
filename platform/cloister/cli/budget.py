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
    """Set and show the privacy budget of a dataset, which it shares with others of its owner and unit."""


@budget.command(name="set")
@click.argument("dataset", type=NAME)
@click.option("--epsilon", type=float, required=True, help="Total over all runs, at most 100.")
@click.option(
    "--delta",
    type=float,
    required=True,
    help="Total over all runs, below 0.01 and one in as many rows; at least twice that of a run.",
)
@common
def set_(context: Context, dataset: str, epsilon: float, delta: float) -> None:
    """Set the total that all runs may spend on DATASET, and on what shares its budget. More than before takes approval,
    and so does a first budget above the site's ceiling.
    """
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
    together = [name for name in shown["datasets"] if name != dataset] or "nobody"
    output.facts({
        "protects": output.unit(shown["unit"]),
        "shared with": together if shown["joined"] else "not told yet: cloister approvals list",
        "epsilon": _share(shown),
        "rule": _rule(shown),
    } | ({"population": shown["population"]} if shown["population"] else {}))  # fmt: skip
    output.say()
    output.table(("changed", "by", "epsilon", "delta", "approval"), [
        (_when(c["time"]), c["person"], _change(c["epsilon"]), _change(c["delta"]), c["approval"])
        for c in shown["changes"]
    ], empty="Nobody has set it yet.")  # fmt: skip
    output.say()
    output.table(("spent by", "runs", "epsilon, added up", "delta"), [
        (p["person"], p["runs"], p["epsilon"], p["delta"]) for p in shown["people"]
    ], empty="Nobody has spent any of it.")  # fmt: skip
    if shown["runs"]:
        output.say()
        output.table(("run", "on", "by", "state", "attempts", "steps", "epsilon", "if held out", "all so far", ""), [
            (r["run"], r["dataset"], r["author"], r["state"], r["attempts"], f"{r['steps']:,}", r["epsilon"],
             r["evaluation_epsilon"], r["after"], "" if r["settled"] else "held")
            for r in shown["runs"]
        ], empty="")  # fmt: skip


def _summary(shown: dict[str, Any]) -> str:
    return (f"{shown['dataset']}: epsilon {shown['epsilon_left']:.3f} of {shown['epsilon']:g} left, "
            f"at delta {shown['delta']:g}.")  # fmt: skip


def _share(shown: dict[str, Any]) -> str:
    """How much of epsilon is spent, or held for runs that go on; as a bar on a terminal."""
    total, charged = shown["epsilon"], shown["epsilon_charged"]
    held = sum(not run["settled"] for run in shown["runs"])
    bar = ""
    if total > 0 and sys.stdout.isatty():
        filled = round(BAR_WIDTH * min(1.0, charged / total))
        bar = "█" * filled + "░" * (BAR_WIDTH - filled) + "  "
    going_on = f", {held} of the runs not over" if held else ""
    return f"{bar}{charged:.4g} spent or held{going_on}, {shown['epsilon_left']:.4g} left of {total:g}"


def _rule(shown: dict[str, Any]) -> str:
    """By which rule runs come to what they do, and what that saves."""
    charged, added, most = shown["epsilon_charged"], shown["epsilon_added"], shown["delta_of_each_rule"]
    if shown["rule"] == "adding":
        return f"added up, with up to delta {most:g} in all; {shown['delta_added']:g} so far"
    return (f"a Rényi filter, at delta {most:g}: added up, the same runs would come to epsilon {added:.4g}, "
            f"{added - charged:.4g} more")  # fmt: skip


def _change(values: list[float]) -> str:
    before, after = values
    return f"{after:g}" if before == 0 else f"{before:g} → {after:g}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
