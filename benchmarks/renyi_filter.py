"""What do runs cost that are composed by the filter, in place of adding their epsilons?

Runs on a table like Adult (26,000 training rows), each with as much noise as its certificate asks for. Peers: adding;
the best order chosen afterwards, and the PRV accountant, both of which hold only for settings that are chosen before
the first run; and the filter by a union bound over the orders.

    python benchmarks/renyi_filter.py [--quick] [--json]
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _report import Row, options, report, row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from cloister.privacy import accounting, renyi
from cloister.privacy.plan import PrivacyPlan, make_plan

ROWS, DELTA = 26_000, 1e-5
MANY = (1, 2, 5, 10, 19)
DELTAS = (DELTA, 0.5e-5, 2.5e-5)
MOST_SECONDS, MOST_MILLISECONDS = 1.0, 2.0
SLOW = ((0.5, 1e-4, 2), (300.0, 0.1, 1000), (60.0, 1e-3, 1000), (0.5, 1e-4, 1000), (1000.0, 0.01, 10_000))


def plan_of(epsilon: float, batch: int, epochs: int, unit: int) -> PrivacyPlan:
    return make_plan(
        epsilon=epsilon, delta=DELTA, max_grad_norm=1.0, epochs=epochs, expected_batch_size=batch, rows=ROWS,
        rows_per_unit=unit,
    )  # fmt: skip


def runs(plan: PrivacyPlan, many: int) -> renyi.Curve:
    return renyi.total([renyi.curve_of(plan, plan.steps)] * many)


def by_filter(curve: renyi.Curve, delta: float) -> float:
    """What it says with a budget that is just enough, whose order follows from it."""
    order = renyi.DEFAULT_ORDER
    for _ in range(5):
        order = renyi.order_for(renyi.epsilon(curve, delta, order), delta)
    return renyi.epsilon(curve, delta, order)


def by_union_bound(curve: renyi.Curve, delta: float) -> float:
    """The best order's conversion, each order with an equal share of delta."""
    weights = [1 / len(renyi.ORDERS)] * len(renyi.ORDERS)
    return min(
        r + math.log1p(-1 / a) - math.log(delta * w * a) / (a - 1)
        for r, a, w in zip(curve, renyi.ORDERS, weights, strict=True)
    )


def seconds(call: Callable[[], object], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def table(quick: bool) -> list[str]:
    """One line for each number of runs, which are certified at epsilon 1 each."""
    lines = [
        "| rows a unit | batch | epochs | noise | runs, which is adding | filter | at delta 0.5e-5 | at 2.5e-5 "
        "| best order | union bound | PRV |",
        "|" + "---|" * 11,
    ]
    for unit, batch, epochs in list(itertools.product((1, 8, 32), (256, 1024), (10, 30)))[: 1 if quick else None]:
        plan = plan_of(1.0, batch, epochs, unit)
        for many in MANY:
            curve = runs(plan, many)
            fixed = accounting.prv_epsilon(plan.noise_multiplier, plan.sample_rate, plan.steps * many, DELTA, unit)
            found = [by_filter(curve, delta) for delta in DELTAS]
            found += [renyi.epsilon_of_one(curve, DELTA), by_union_bound(curve, DELTA), fixed]
            figures = " | ".join(f"{each:.2f}" for each in found)
            lines.append(f"| {unit} | {batch} | {epochs} | {plan.noise_multiplier:g} | {many} | {figures} |")
    return lines


def measure(quick: bool) -> list[Row]:
    accounting.warm()
    rows: list[Row] = []
    for epsilon in (1.0,) if quick else (1.0, 3.0, 8.0):
        plans = [plan_of(epsilon, batch, epochs, 1) for batch, epochs in itertools.product((256, 1024), (10, 30))]
        for name, cost in (("filter", by_filter), ("best order", renyi.epsilon_of_one)):
            shares = [cost(runs(plan, 1), DELTA) / plan.epsilon_certified for plan in plans]
            title = f"one run of epsilon {epsilon:g}: {name}, the certificate being 1"
            rows += [row(f"{title}, {which.__name__} of four", which(shares), "ratio") for which in (min, max)]
    plan = plan_of(1.0, 256, 10, 1)
    for budget, delta in ((2, DELTA), (3, DELTA), (5, DELTA), (5, 5 * DELTA), (8, DELTA), (12, DELTA)):
        bought = 0
        while renyi.within(runs(plan, bought + 1), budget, delta, renyi.order_for(budget, delta)):
            bought += 1
        rows.append(row(f"runs of epsilon 1 that a budget of {budget} at delta {delta:g} buys", bought, "runs"))
    slowest = 0.0
    for mechanism in SLOW:
        renyi.step_of.cache_clear()
        slowest = max(slowest, seconds(lambda mechanism=mechanism: renyi.step_of(*mechanism)))
    renyi.step_of.cache_clear()
    curve = runs(plan, 5)
    renyi.step_of.cache_clear()
    curve_of = seconds(lambda: renyi.curve_of(plan, plan.steps))
    asked = 1000 * seconds(lambda: renyi.within(curve, 3.0, DELTA), 1000)
    return [
        *rows,
        row("curve of that plan", curve_of, "s", f"<= {MOST_SECONDS:g}", curve_of <= MOST_SECONDS),
        row("slowest curve of corners", slowest, "s", f"<= {MOST_SECONDS:g}", slowest <= MOST_SECONDS),
        row("asking the filter", asked, "ms", f"<= {MOST_MILLISECONDS:g}", asked <= MOST_MILLISECONDS),
    ]


def main() -> None:
    arguments = options(__doc__, quick="one kind of run").parse_args()
    report("What do runs cost by the filter?", arguments, lambda: measure(arguments.quick))
    if not arguments.json:
        print("\n" + "\n".join(table(arguments.quick)))


if __name__ == "__main__":
    main()
