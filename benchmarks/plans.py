"""How long does it take to find the noise of a plan, and how much less is it than what Rényi's bound alone asks for?

Plans that people make (the examples), the corners of what a spec may ask for, and random ones between: each from
nothing, in one process, with all accountants. The peer is Opacus's RDP accountant, by bisection.

    python benchmarks/plans.py [--quick] [--json]
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from _report import Row, options, report, row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from cloister.errors import InputError
from cloister.privacy import accounting
from cloister.privacy.plan import PrivacyPlan, make_plan
from cloister.rounding import most_rows

Asked = tuple[float, float, int, int, int, int]  # epsilon, delta, rows, expected batch size, steps, rows of a unit
MOST_SECONDS, MOST_GIGABYTES = 10.0, 1.0
PEOPLES = {
    "adult's example": (3.0, 1e-5, 26_049, 1024, 509, 1),
    "mnist's example": (3.0, 1e-5, 54_000, 4096, 527, 1),
    "eight rows a person": (3.0, 1e-5, 26_049, 1024, 509, 8),
}
CORNERS = (
    (20.0, 1e-9, 1000, 500, 50_000, 1), (3.0, 1e-10, 10**6, 20_000, 50_000, 1), (0.1, 1e-6, 10**5, 1000, 5000, 1),
    (0.01, 1e-10, 10**8, 10_000, 50_000, 1), (20.0, 1e-7, 10**6, 10, 50_000, 1), (20.0, 1e-10, 3, 2, 1, 1000),
    (20.0, 1e-7, 10**6, 5 * 10**5, 1, 1000), (12.58, 3.3e-8, 816_111, 13, 14_677, 120),
    (4.91, 8e-8, 11_946_290, 13_174, 43_852, 4), (0.21, 1.7e-4, 3022, 422, 124, 1000),
)  # fmt: skip
_RANDOM = 40


def made(asked: Asked) -> tuple[float, PrivacyPlan | None]:
    """CPU-seconds, and the plan, or None where no noise reaches epsilon."""
    for accountant in (accounting.prv_epsilon, accounting.prv_of_unit, accounting.pld_epsilon, accounting.rdp_epsilon,
                       accounting.replacing_epsilon):  # fmt: skip
        accountant.cache_clear()
    epsilon, delta, rows, batch, steps, unit = asked
    started = time.process_time()
    try:
        found = make_plan(
            epsilon=epsilon, delta=delta, max_grad_norm=1.0, epochs=steps * batch / rows, expected_batch_size=batch,
            rows=rows, rows_per_unit=unit, redo_steps=min(150, steps),
        )  # fmt: skip
    except InputError:
        found = None
    return time.process_time() - started, found


def random_mechanisms(count: int) -> list[Asked]:
    draw, found = np.random.default_rng(2026), list[Asked]()
    while len(found) < count:
        rows = int(10 ** draw.uniform(2, 9))
        batch = max(1, int(rows * 10 ** draw.uniform(-5, -0.1)))
        delta = min(0.99 / most_rows(rows), 10 ** draw.uniform(-10, -4))
        unit = 1 if draw.uniform() < 0.75 else int(10 ** draw.uniform(0, 3))
        found.append((10 ** draw.uniform(-1.5, 1.3), delta, rows, batch, int(10 ** draw.uniform(0, 4.7)), unit))
    return [each for each in found if each[1] >= accounting.MIN_DELTA]


def noise_by_renyi(plan: PrivacyPlan) -> float:
    """The noise multiplier that Opacus's RDP accountant asks for."""
    low, high = 0.1, 1000.0
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        if accounting.rdp_epsilon(middle, plan.sample_rate, plan.steps, plan.delta) <= plan.epsilon:
            high = middle
        else:
            low = middle
    return high


def measure(quick: bool) -> list[Row]:
    accounting.warm()
    rows: list[Row] = []
    seconds, above = [], 0
    for name, mechanism in PEOPLES.items():
        taken, plan = made(mechanism)
        rows.append(row(name, taken, "s"))
        if plan is not None and plan.rows_per_unit == 1:
            share = plan.noise_multiplier / noise_by_renyi(plan)
            rows.append(row(f"{name}: its noise, Rényi's being 1", share, "ratio", "<= 1", share <= 1.0))
    for mechanism in (*CORNERS[: 3 if quick else None], *random_mechanisms(3 if quick else _RANDOM)):
        taken, plan = made(mechanism)
        seconds.append(taken)
        above += plan is not None and plan.epsilon_certified > plan.epsilon
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [
        *rows,
        row(f"median of {len(seconds)} corners and random plans", statistics.median(seconds), "s"),
        row("slowest", max(seconds), "s", f"<= {MOST_SECONDS:g}", max(seconds) <= MOST_SECONDS),
        row("memory", gigabytes, "GB", f"<= {MOST_GIGABYTES:g}", gigabytes <= MOST_GIGABYTES),
        row("certified above their target", above, "plans", "0", not above),
    ]


def main() -> None:
    arguments = options(__doc__, quick="three corners, three random plans").parse_args()
    report("How long does a plan take, and how much noise does it save?", arguments, lambda: measure(arguments.quick))


if __name__ == "__main__":
    main()
