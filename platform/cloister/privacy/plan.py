"""The privacy of one training run, decided before it touches data.

Guarantees: `make_plan` is the one place that couples sampling, clipping, noise and accounting; the plan that it
returns was certified by both accountants at or below the target epsilon; every field is public (the number of
training rows is declared public), so a plan may be approved, logged and signed. Averages divide by the public
`sample_rate * rows`, never by a realised batch size, which is private.

Not promised: anything about steps that are run twice. Redone steps are charged as additional steps: see
`epsilon_after`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cloister.errors import InputError
from cloister.privacy import accounting


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
    rows_per_unit: int = 1
    """How many rows the unit of privacy may own: epsilon and delta are promised to it, not to each row."""

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise InputError("the sample rate of a plan lies in (0, 1]", "lower expected_batch_size")
        if self.steps < 1 or self.rows < 1 or self.rows_per_unit < 1:
            raise InputError("a plan needs at least one row, a step and a row for each unit", "raise epochs")
        if not 0.0 < self.max_grad_norm < math.inf or not 0.0 <= self.noise_multiplier < math.inf:
            raise InputError("clipping norm and noise multiplier are finite and positive", "make the plan again")

    @property
    def expected_batch_size(self) -> float:
        """The public denominator q·N of every averaged gradient."""
        return self.sample_rate * self.rows

    @property
    def epochs(self) -> float:
        """Expected number of times that a row is used."""
        return self.sample_rate * self.steps

    def epsilon_after(self, steps: int) -> float:
        """The certified epsilon once this many steps have been released, redone ones counted again."""
        return accounting.epsilon(self.noise_multiplier, self.sample_rate, steps, self.delta, self.rows_per_unit)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            InputError: a field is missing, unknown or of the wrong type.
        """
        plan = {"rows_per_unit": 1, **values}  # plans of before there were units have none
        if set(plan) != {field.name for field in fields(cls)}:
            raise InputError("this is not a privacy plan", "make the plan again with `cloister train plan`")
        for name, value in plan.items():
            whole = name in ("steps", "rows", "rows_per_unit")
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
) -> PrivacyPlan:
    """The plan for these spec fields over `rows` training rows, of which one unit owns up to `rows_per_unit`.

    Raises:
        InputError: the fields do not fit the number of rows or no noise reaches the target.
    """
    if expected_batch_size >= rows:
        raise InputError(
            "expected_batch_size is not smaller than the number of training rows",
            f"choose an expected_batch_size below {rows}",
        )
    if delta >= 1.0 / rows:
        raise InputError(
            "delta is at least 1/rows, which allows publishing a row outright", f"choose delta below {1.0 / rows:.1e}"
        )
    sample_rate = expected_batch_size / rows
    steps = max(1, round(epochs / sample_rate))
    try:
        noise_multiplier = accounting.noise_multiplier_for(epsilon, delta, sample_rate, steps, rows_per_unit)
    except ValueError as error:
        raise InputError("no amount of noise reaches this epsilon", "raise epsilon or lower epochs") from error
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
    )
