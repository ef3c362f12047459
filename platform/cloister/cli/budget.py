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
@click.argument("dataset", metavar="NAME[@N]")
@click.option("--epsilon", type=float, required=True, help="Total over all runs, at most 100.")
@click.option(
    "--delta",
    type=float,
    required=True,
    help="Total over all runs, below 0.01 and below 1/rows; at least twice that of a run.",
)
@common
def set_(context: Context, dataset: str, epsilon: float, delta: float) -> None:
    """Set the total that all runs may spend on a dataset, and on all that shares its budget: by NAME, on its newest
    version. More than before takes approval, and so does a first budget above the site's ceiling.
    """
    name, version = _named(dataset)
    if not (math.isfinite(epsilon) and math.isfinite(delta)):
        raise InputError("epsilon and delta are finite numbers", "such as --epsilon 6 --delta 2e-5")
    body = {"epsilon": epsilon, "delta": delta} | ({"version": version} if version else {})
    shown = context.client().put(f"/v1/datasets/{name}/budget", body)
    if context.json:
        output.value(shown)
    else:
        output.say(_summary(shown))


@budget.command()
@click.argument("dataset", metavar="NAME[@N]")
@common
def show(context: Context, dataset: str) -> None:
    """Show the budget, what is left, how it came to be what it is, and who spent it."""
    name, version = _named(dataset)
    shown = context.client().get(f"/v1/datasets/{name}/budget" + (f"?version={version}" if version else ""))
    if context.json:
        output.value(shown)
        return
    if not (shown["changes"] or shown["runs"] or shown["epsilon"]):
        output.say(f"{name} has no budget yet. Next: " + (
            f"cloister budget set {dataset} --epsilon 6 --delta 2.5e-5" if shown["joined"] else
            "a security officer answers whose rows these are: cloister approvals list"
        ))  # fmt: skip
        return
    output.say(_summary(shown))
    together = [each for each in shown["datasets"] if each != name] or "nobody"
    output.facts({
        "protects": output.unit(shown["unit"]),
        "shared with": together if shown["joined"] else "nobody yet: a security officer has to answer "
                                                        "(cloister approvals list)",
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
        output.table(("run", "on", "by", "state", "steps", "by itself", "for held-out rows", "all up to it"), [
            (r["run"], r["dataset"], r["author"], r["state"] + ("" if r["settled"] else " (held)"),
             f"{r['steps']:,}" + (f" ({r['attempts']} tries)" if r["attempts"] > 1 else ""), f"{r['epsilon']:.4g}",
             f"{r['evaluation_epsilon']:.4g}", f"{r['after']:.4g}")
            for r in shown["runs"]
        ], empty="")  # fmt: skip


def _named(dataset: str) -> tuple[str, int | None]:
    """A dataset, by its name or as one of its versions.

    Raises:
        InputError: neither.
    """
    from cloister.datasets.manifest import parse_reference

    if "@" in dataset:
        return parse_reference(dataset)
    return str(NAME.convert(dataset, None, None)), None


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
    going_on = f" (for {held} run{'s that are' if held > 1 else ' that is'} not over)" if held else ""
    return f"{bar}{charged:.4g} of {total:g} spent or held{going_on}, {shown['epsilon_left']:.4g} left"


def _rule(shown: dict[str, Any]) -> str:
    """By which rule runs come to what they do, and what that saves."""
    deltas, most = shown["delta_added"], shown["delta_of_each_rule"]
    if shown["rule"] == "adding":
        share = "half of the budget's" if most < shown["delta"] else "the budget's"
        return f"adding: the epsilons of all runs. Their deltas come to {deltas:g}, at most {most:g} ({share})"
    too_large = f", but their deltas come to {deltas:g}, more than that half" if deltas > most else ""
    return (f"Rényi filter, at half of the budget's delta: {shown['epsilon_charged']:.4g}; adding would say "
            f"{shown['epsilon_added']:.4g}{too_large}. A further run mostly takes less than its own epsilon: "
            "cloister train plan says how much")  # fmt: skip


def _change(values: list[float]) -> str:
    return output.change(values if values[0] else [values[1]] * 2)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
