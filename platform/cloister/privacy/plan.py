"""The privacy of one training run, decided before it touches data.

Guarantees: `make_plan` is the one place that couples sampling, clipping, noise and accounting; there is no plan that
is certified above its target; every field is public, so a plan may be approved, logged and signed. `rows` is the
published number of training rows (`cloister.rounding`), not the exact one, which is private: a table has up to
`most_rows` of them, or fewer where rows were erased since. Averages divide by the public `sample_rate * rows`, never by
a realised batch size, which is private. What epsilon costs follows from the rate and the steps, whatever the table.

Steps that are run again, because workers died, cost as additional steps: `redo_steps` bounds them, and
`epsilon_at_most` is what the run then costs. Without deaths it costs `epsilon_certified`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cloister.errors import InputError
from cloister.privacy import accounting
from cloister.privacy.evaluation import DEFAULT_EPSILON, Evaluation
from cloister.rounding import most_rows

BLOCK_STEPS = 50
"""How many steps are committed to the ledger at once: what one death of a worker costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """Everything that the workers, the ledger and a reviewer need to agree on."""

    epsilon: float
    delta: float
    epsilon_certified: float
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    rows: int
    """As published; exact in plans of before there were published numbers."""
    rows_per_unit: int = 1
    """How many rows of a unit of privacy are used at most: epsilon and delta are promised to it, not to each row."""
    redo_steps: int = 0
    """How many steps may be run again, over all attempts."""
    epsilon_at_most: float = 0.0
    """The certified epsilon of `steps + redo_steps`; never below `epsilon`."""
    epsilon_replacing: float | None = None
    """What holds of a row that is replaced by another, where epsilon holds of one that is there or not. None where a
    unit has several rows."""
    evaluation_epsilon: float = DEFAULT_EPSILON
    """Of the noisy histogram of how the model does on rows that are held out. No unit of theirs is trained on, so a run
    costs the larger of this and `epsilon_certified`."""

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise InputError("the sample rate of a plan lies in (0, 1]", "lower expected_batch_size")
        if self.steps < 1 or self.rows < 1 or self.rows_per_unit < 1:
            raise InputError("a plan needs at least one row, a step and a row for each unit", "raise epochs")
        if not 0.0 < self.max_grad_norm < math.inf or not 0.0 <= self.noise_multiplier < math.inf:
            raise InputError(
                "the clipping norm is finite and positive, and the noise multiplier finite and not negative",
                "make the plan again",
            )
        if not self.epsilon_certified <= self.epsilon:  # no number is refused too
            raise InputError("the plan costs more than its epsilon", "make the plan again")
        if not 0.0 < self.evaluation_epsilon <= self.epsilon:
            raise InputError("the epsilon of the evaluation is positive, and not more than the plan's", "lower it")
        if self.redo_steps < 0 or not math.isfinite(self.epsilon_at_most):
            raise InputError("the steps that may be run again, and what they cost, are finite", "make the plan again")
        object.__setattr__(self, "epsilon_at_most", max(self.epsilon_at_most, self.epsilon))

    @property
    def expected_batch_size(self) -> float:
        """The public denominator q·N of every averaged gradient."""
        return self.sample_rate * self.rows

    @property
    def most_rows(self) -> int:
        """The most rows that a table of this plan has."""
        return most_rows(self.rows)

    @property
    def largest_expected_batch(self) -> float:
        """How many rows a batch of the largest such table is expected to have: for bounds, not for averages."""
        return self.sample_rate * self.most_rows

    @property
    def epochs(self) -> float:
        """Expected number of times that a row is used."""
        return self.sample_rate * self.steps

    def evaluation(self, labels: Collection[str], rows: int) -> Evaluation:
        """The evaluation of these labels on so many held-out rows: `DatasetManifest.evaluated` says both."""
        return Evaluation(
            labels=len(labels), rows=rows, epsilon=self.evaluation_epsilon, rows_per_unit=self.rows_per_unit
        )

    def is_capped(self, most_of_unit: int) -> bool:
        """Whether a run uses fewer rows of a unit than its schema allows it. Only then are ordinals leased and used."""
        return self.rows_per_unit < most_of_unit

    def accounts_after(self, steps: int) -> dict[str, float]:
        """What each accountant says once this many steps have been released, redone ones counted again."""
        return accounting.accounts(self.noise_multiplier, self.sample_rate, steps, self.delta, self.rows_per_unit)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: a field is missing, unknown or of the wrong type.
        """
        # Plans of before there were units, and retries, have none; their evaluations cost 1, or a smaller epsilon.
        epsilon = values.get("epsilon")
        evaluation = min(1.0, epsilon) if isinstance(epsilon, int | float) else 1.0
        plan = {"rows_per_unit": 1, "redo_steps": 0, "epsilon_at_most": epsilon,
                "epsilon_replacing": None, "evaluation_epsilon": evaluation, **values}  # fmt: skip
        if set(plan) != {field.name for field in fields(cls)}:
            raise InputError("this is not a privacy plan", "make the plan again with `cloister train plan`")
        for name, value in plan.items():
            if value is None and name == "epsilon_replacing":
                continue
            whole = name in ("steps", "rows", "rows_per_unit", "redo_steps")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InputError(f"field '{name}' of the privacy plan has the wrong type", "make the plan again")
            plan[name] = value if whole else float(value)
        return cls(**plan)


def make_plan(
    *,
    epsilon: float,
    delta: float,
    max_grad_norm: float,
    epochs: float,
    expected_batch_size: int,
    rows: int,
    rows_per_unit: int = 1,
    redo_steps: int = 0,
    evaluation_epsilon: float = DEFAULT_EPSILON,
) -> PrivacyPlan:
    """The plan for these spec fields over `rows` training rows, as published, up to `rows_per_unit` of them of one
    unit. Delta is below one in as many rows as any table has that publishes as many.

    The noise is that for the planned steps; `redo_steps` more, should they be needed, cost more epsilon. The evaluation
    costs no more than `epsilon`.

    Raises:
        InputError: the fields do not fit the number of rows or no noise reaches the target.
    """
    if expected_batch_size >= rows:
        raise InputError(
            "expected_batch_size is not smaller than the number of training rows",
            f"choose an expected_batch_size below {rows}",
        )
    require_small_delta(delta, most_rows(rows))
    evaluation_epsilon = min(evaluation_epsilon, epsilon)
    sample_rate = expected_batch_size / rows
    steps = planned_steps(epochs, expected_batch_size, rows)
    noise_multiplier = accounting.noise_multiplier_for(epsilon, delta, sample_rate, steps, rows_per_unit)
    return PrivacyPlan(
        epsilon=epsilon,
        delta=delta,
        epsilon_certified=accounting.epsilon(noise_multiplier, sample_rate, steps, delta, rows_per_unit),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        sample_rate=sample_rate,
        steps=steps,
        rows=rows,
        rows_per_unit=rows_per_unit,
        redo_steps=redo_steps,
        epsilon_at_most=accounting.epsilon(noise_multiplier, sample_rate, steps + redo_steps, delta, rows_per_unit),
        epsilon_replacing=(
            max(accounting.replacing_epsilon(noise_multiplier, sample_rate, steps, delta), 2 * evaluation_epsilon)
            if rows_per_unit == 1
            else None
        ),
        evaluation_epsilon=evaluation_epsilon,
    )


def require_small_delta(delta: float, rows: int) -> None:
    """Refuse a delta with which whoever publishes one of so many rows is called private.

    Raises:
        InputError: it is at least 1/rows.
    """
    limit = 1.0 / max(1, rows)
    if delta >= limit:
        raise InputError(
            "delta is at least 1/rows, which allows publishing a row outright",
            f"choose delta below {0.99 * limit:.2e}",  # rounded, it is below still
        )


def planned_steps(epochs: float, expected_batch_size: int, rows: int) -> int:
    """How many steps a plan with these fields has."""
    return max(1, round(epochs / (expected_batch_size / rows)))
