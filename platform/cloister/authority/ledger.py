"""What a privacy budget is, what of it is left, and holding a part of it for a run.

Runs that people choose after they have seen earlier models are composed by two rules, and what either allows may run:

    adding   epsilons and deltas of all runs are added up, as their certificates have them
    Rényi    a filter over their Rényi divergences (`privacy.renyi`): for several runs it is far less than the sum

Guarantees: together all runs stay within the budget's epsilon and delta, whatever is chosen on what was seen, and which
of the rules ends up as the one that holds may depend on that too. For each rule has half of the budget's delta. Let A
be the outcomes that end with all that is committed within adding. As of a process that stops by adding alone,
P(A) <= e^epsilon Q(A) + delta/2. The same holds of the outcomes that end within the filter, so of all with delta. What
is held for a run is never less than what it has committed, so giving back what was not used changes none of this. Of a
budget that was changed on what was seen it holds with the largest epsilon and delta that it had.

It is checked and charged in one transaction. A ledger with a run of before there was a filter adds up, with all of its
delta. Who may spend is decided elsewhere.

Not guaranteed: adding, where when a run ends tells of rows. Nothing that is computed from rows leaves before its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from cloister.authority.costs import curve, settle
from cloister.errors import BudgetError
from cloister.privacy import renyi
from cloister.privacy.plan import PrivacyPlan
from cloister.stores.tables import budget_changes, budgets, runs

ADDING, RENYI = "adding", "renyi"
_ROUNDING = 1 + 1e-9  # for sums of decimal fractions; it is relative to the total, so it cannot add up


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a run or of several: `epsilon` and `delta` as added up, and the sum of the Rényi curves; None if unknown."""

    epsilon: float = 0.0
    delta: float = 0.0
    curve: renyi.Curve | None = renyi.NOTHING

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        """Of several together."""
        listed = list(costs)
        curves = [cost.curve for cost in listed if cost.curve is not None]
        return cls(
            math.fsum(cost.epsilon for cost in listed), math.fsum(cost.delta for cost in listed),
            renyi.total(curves) if len(curves) == len(listed) else None,
        )  # fmt: skip

    @classmethod
    def of(cls, run: Any) -> Cost:
        """What a run holds, or has spent."""
        if not run.epsilon_charged and not run.delta_charged:
            return cls()
        known = run.renyi_charged
        curve = tuple(float.fromhex(each) for each in known) if known and len(known) == len(renyi.ORDERS) else None
        return cls(float(run.epsilon_charged), float(run.delta_charged), curve)

    @classmethod
    def of_steps(cls, plan: dict[str, Any], steps: int, caller: str | None = None) -> Cost:
        """What so many committed steps of a plan cost; accounted for on behalf of `caller`, if it has to be."""
        return cls(*settle(plan, steps, caller), curve(plan, steps, caller))

    @classmethod
    def of_plan(cls, plan: PrivacyPlan, caller: str | None = None) -> Cost:
        """What is held for a run that is submitted: its epsilon as it was asked for, at least what it is certified."""
        return cls(plan.epsilon, plan.delta, curve(plan.to_dict(), plan.steps, caller))

    @classmethod
    def settled(cls, run: Any) -> Cost:
        """What a run that ends is charged: all steps that are on record. One that was held without a curve keeps none,
        or a ledger that adds up with all of its delta would have half of it from then on.
        """
        cost = cls.of_steps(run.plan, run.steps_committed)
        held = cls.of(run)
        return replace(cost, curve=None) if held.curve is None else cost

    def at_least(self, other: Cost) -> Cost:
        """The larger of both, in each of its numbers."""
        curve = None
        if self.curve is not None and other.curve is not None:
            curve = tuple(max(pair) for pair in zip(self.curve, other.curve, strict=True))
        return Cost(max(self.epsilon, other.epsilon), max(self.delta, other.delta), curve)

    def columns(self) -> dict[str, Any]:
        """The columns of `runs` that keep it."""
        kept = None if self.curve is None else [each.hex() for each in self.curve]
        return {"epsilon_charged": self.epsilon, "delta_charged": self.delta, "renyi_charged": kept}


@dataclass(frozen=True, slots=True)
class Budget:
    """A ledger's budget, and the cost of its runs."""

    epsilon: float
    delta: float
    spent: Cost
    order: int = renyi.DEFAULT_ORDER

    @property
    def delta_of_each_rule(self) -> float:
        return self.delta if self.spent.curve is None else self.delta / 2

    def after(self, more: Cost) -> Budget:
        """With this spent too."""
        return replace(self, spent=Cost.sum((self.spent, more)))

    def holds(self) -> bool:
        """Whether by one rule or the other all that is spent is within the budget."""
        return self._adding_holds() or self._renyi_holds()

    def _adding_holds(self) -> bool:
        enough = self.spent.epsilon <= self.epsilon * _ROUNDING
        return enough and self.spent.delta <= self.delta_of_each_rule * _ROUNDING

    def _renyi_holds(self) -> bool:
        return self.spent.curve is not None and self.delta > 0 and renyi.within(
            self.spent.curve, self.epsilon, self.delta_of_each_rule, self.order
        )  # fmt: skip

    def charged(self) -> tuple[float, str]:
        """The epsilon that all runs together come to at the budget's delta, and the rule that says so."""
        added = self.spent.epsilon
        if self.spent.curve is None or added == 0 or self.delta == 0:
            return added, ADDING
        filtered = renyi.epsilon(self.spent.curve, self.delta_of_each_rule, self.order)
        adds = self.spent.delta <= self.delta_of_each_rule * _ROUNDING and added <= filtered
        return (added, ADDING) if adds else (filtered, RENYI)

    @property
    def epsilon_left(self) -> float:
        return max(0.0, self.epsilon - self.charged()[0])

    def to_dict(self) -> dict[str, Any]:
        """For people: what is there, what of it is charged by which rule, and what adding up alone would say."""
        charged, rule = self.charged()
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "rule": rule,
            "epsilon_charged": charged,
            "epsilon_left": max(0.0, self.epsilon - charged),
            "epsilon_added": self.spent.epsilon,
            "delta_added": self.spent.delta,
            "delta_of_each_rule": self.delta_of_each_rule,
        }


def budget_of(connection: Connection, ledger: str | None, *, without: str | None = None) -> Budget:
    """A ledger's budget; of nothing where there is none, so that nothing is trained. `without` leaves out a run."""
    if ledger is None:
        return Budget(0.0, 0.0, Cost())
    row = connection.execute(select(budgets).where(budgets.c.ledger == ledger)).one_or_none()
    mine = (runs.c.ledger == ledger) & (runs.c.id != (without or ""))
    charged = connection.execute(
        select(runs.c.epsilon_charged, runs.c.delta_charged, runs.c.renyi_charged).where(mine).order_by(runs.c.id)
    ).all()
    spent = Cost.sum(map(Cost.of, charged))
    return Budget(row.epsilon, row.delta, spent, row.order or renyi.DEFAULT_ORDER) if row else Budget(0.0, 0.0, spent)


def has_budget(connection: Connection, ledger: str) -> bool:
    """Whether one was ever set, be it of nothing."""
    return connection.execute(select(budgets.c.ledger).where(budgets.c.ledger == ledger)).first() is not None


def reserve(connection: Connection, run: Any, steps: int) -> None:
    """Hold for a run what `steps` steps cost, over all of its attempts; it keeps what it holds if that is more.

    Raises:
        BudgetError: the budget does not pay for it, or these are more steps than were approved.
    """
    plan = PrivacyPlan.from_dict(run.plan)
    if steps > plan.steps + plan.redo_steps:
        raise BudgetError(
            f"{run.id} would come to {steps:,} steps, and at most {plan.steps + plan.redo_steps:,} were approved",
            "submit a new run, with more training.retries if need be",
        )
    held = Cost.of(run)
    needed = Cost.of_steps(run.plan, steps).at_least(held)
    budget = budget_of(connection, run.ledger, without=run.id)
    more = needed.epsilon > held.epsilon or needed.delta > held.delta or held.curve != needed.curve
    if more and not budget.after(needed).holds():
        now = budget.after(held).to_dict()
        raise BudgetError(
            f"{run.id} would come to epsilon {needed.epsilon:.4f}, delta {needed.delta:g}, of which {held.epsilon:.4f} "
            f"and {held.delta:g} are charged already; {run.dataset} had epsilon {now['epsilon_left']:.4f} left",
            f"ask the owner for more: cloister budget set {run.dataset}; then: cloister train resume {run.id}",
        )
    connection.execute(update(runs).where(runs.c.id == run.id).values(**needed.columns()))


def change_budget(
    connection: Connection, ledger: str, epsilon: float, delta: float, person: str, approval: str | None, now: float
) -> None:
    """Set a ledger's budget, and keep who did. Within `ledger_seals.changing`."""
    before = budget_of(connection, ledger)
    values: dict[str, float] = {"epsilon": epsilon, "delta": delta}
    if connection.execute(select(runs.c.id).where(runs.c.ledger == ledger).limit(1)).first() is None:
        values["order"] = renyi.order_for(epsilon, delta / 2) if epsilon and delta else renyi.DEFAULT_ORDER
    changed = connection.execute(update(budgets).where(budgets.c.ledger == ledger).values(**values))
    if not changed.rowcount:
        connection.execute(insert(budgets).values(ledger=ledger, **values))
    mine = budget_changes.c.ledger == ledger
    last = connection.execute(select(func.coalesce(func.max(budget_changes.c.number), 0)).where(mine)).scalar_one()
    connection.execute(
        insert(budget_changes).values(
            ledger=ledger, number=last + 1, person=person, approval=approval, created=now, epsilon=epsilon, delta=delta,
            epsilon_before=before.epsilon, delta_before=before.delta,
        )
    )  # fmt: skip


def spending(connection: Connection, ledger: str | None) -> dict[str, Any]:
    """How a budget came to be what it is (`changes`), what of it each run and each person has or holds, and what all
    runs together came to after each (`after`).
    """
    changes = connection.execute(
        select(budget_changes).where(budget_changes.c.ledger == ledger).order_by(budget_changes.c.number)
    ).all()
    rows = connection.execute(select(runs).where(runs.c.ledger == ledger).order_by(runs.c.created, runs.c.id)).all()
    people: dict[str, dict[str, Any]] = {}
    so_far, after = replace(budget_of(connection, ledger), spent=Cost()), []
    for row in rows:
        person = people.setdefault(row.author, {"person": row.author, "runs": 0, "epsilon": 0.0, "delta": 0.0})
        person["runs"] += 1
        person["epsilon"] += row.epsilon_charged
        person["delta"] += row.delta_charged
        so_far = so_far.after(Cost.of(row))
        after.append(so_far.charged()[0])
    return {
        "changes": [
            {
                "time": row.created, "person": row.person, "epsilon": [row.epsilon_before, row.epsilon],
                "delta": [row.delta_before, row.delta], "approval": row.approval,
            }
            for row in changes
        ],
        "runs": [
            {
                "run": row.id, "dataset": f"{row.dataset}@{row.version}", "author": row.author, "state": row.state,
                "epsilon": row.epsilon_charged, "delta": row.delta_charged, "settled": row.settled,
                "steps": row.steps_committed, "attempts": row.attempt, "created": row.created, "after": together,
                # Released with the model, of rows that are held out: they pay this where the others pay `epsilon`.
                "evaluation_epsilon": PrivacyPlan.from_dict(row.plan).evaluation_epsilon
                if row.state == "finished" else 0.0,
            }
            for row, together in zip(rows, after, strict=True)
        ],
        "people": sorted(people.values(), key=lambda person: (-person["epsilon"], person["person"])),
    }  # fmt: skip
