"""What a run costs: its plan before, and what its committed steps have come to after.

Guarantees: epsilon is what is certified of all the steps, those that were run again too, and never less; no
step costs less than it did before. Accounting takes a core for seconds. It is done in a process of its own, one request
at a time (`accountant`), and results are remembered. Whoever asks for a new one names the caller that it is for. Within
a transaction no caller is named: the transaction then waits at most for the one request that is being computed.
"""

from __future__ import annotations

import math
from typing import Any

from cloister.authority import accountant
from cloister.datasets.manifest import DatasetManifest
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError
from cloister.privacy import accounting, renyi
from cloister.privacy.evaluation import MOST_LABELS
from cloister.privacy.plan import BLOCK_STEPS, PrivacyPlan, planned_steps
from cloister.privacy.spec import TrainingSpec

_MOST_ROWS = 1000  # of a person
MAX_STEPS = 50_000  # accounting for this many takes up to 10 s of a core, inside one request


def plan_for(spec: TrainingSpec, manifest: DatasetManifest, caller: str | None = None) -> PrivacyPlan:
    """The plan of a spec over a dataset's training rows, of which it knows the published number alone.

    Raises:
        InputError: too many steps, or as `make_plan`.
        UnavailableError: too many requests wait; or as `Accountant.plan`.
    """
    training, privacy = spec.training, spec.privacy
    rows = manifest.published_rows("train")
    rows_per_unit = used_of_unit(spec, manifest)
    labels, _ = manifest.evaluated(spec.label)
    if len(labels) > MOST_LABELS:
        raise InputError(
            f"{spec.label} has {len(labels):,} values, and a label at most {MOST_LABELS:,}", "choose another label"
        )
    if training.epochs * rows / training.expected_batch_size > MAX_STEPS:
        raise InputError(
            f"a run has at most {MAX_STEPS:,} steps", "lower training.epochs or raise training.expected_batch_size"
        )
    found = accountant.shared.plan(
        epsilon=privacy.epsilon, delta=privacy.delta, max_grad_norm=privacy.max_grad_norm, epochs=training.epochs,
        expected_batch_size=training.expected_batch_size, rows=rows, rows_per_unit=rows_per_unit,
        # A death costs the block that was open, or all there is.
        redo_steps=training.retries
        * min(BLOCK_STEPS, planned_steps(training.epochs, training.expected_batch_size, rows)),
        evaluation_epsilon=privacy.evaluation, caller=caller,
    )  # fmt: skip
    return PrivacyPlan.from_dict(found)


def used_of_unit(spec: TrainingSpec, manifest: DatasetManifest) -> int:
    """How many rows of a unit of privacy a run uses at most: all that it may have, or as many as the spec says.

    Raises:
        InputError: a unit never has as many; or its rows have no ordinals, so that none can be chosen.
    """
    schema, wanted = DatasetSchema.from_mapping(manifest.dataset_schema), spec.privacy.rows_per_unit
    most = schema.rows_per_unit
    if wanted is None or wanted == most:
        return most
    if schema.unit == "row":
        raise InputError(
            f"privacy.rows_per_unit is {wanted}, and the unit of {spec.dataset} is a row",
            "take it out of the spec; where a person has several rows, their column is the unit in the schema",
        )
    if wanted > most:
        raise InputError(
            f"privacy.rows_per_unit is {wanted}, and a unit of {spec.dataset} has at most {most} rows",
            f"lower it to less than {most}, or take it out of the spec to use all of them",
        )
    if not manifest.numbered:
        raise InputError(
            f"{spec.dataset} was sealed without ordinals, by which privacy.rows_per_unit chooses rows",
            "ask its owner to seal it again: cloister data seal; or take it out of the spec",
        )
    return wanted


def accounts(plan: dict[str, Any], steps: int, caller: str | None = None) -> dict[str, float]:
    """What each accountant says of `steps` steps of a plan."""
    known = PrivacyPlan.from_dict(plan)
    mechanism = known.noise_multiplier, known.sample_rate, steps, known.delta, known.rows_per_unit
    return accountant.shared.accounts(*mechanism, caller=caller)


def replacing(plan: dict[str, Any], steps: int, caller: str | None = None) -> float | None:
    """The epsilon of `steps` steps of a plan for a row that is replaced by another; None for units of several rows."""
    known = PrivacyPlan.from_dict(plan)
    if known.rows_per_unit > 1:
        return None
    mechanism = known.noise_multiplier, known.sample_rate, steps, known.delta
    return max(accountant.shared.replacing(*mechanism, caller=caller), 2 * known.evaluation_epsilon)


def for_rows(run: Any, trained: int, held_out: int, caller: str | None = None) -> tuple[float, float]:
    """What holds for so many rows together of a run that has ended, whose unit is one row: (epsilon, delta); delta is 1
    where nothing is known to.

    Those that were trained on count as one unit, by PRV alone, which takes no more than a second for `_MOST_ROWS`. Each
    of those that were held out had a part in an evaluation.
    """
    plan, steps = PrivacyPlan.from_dict(run.plan), int(run.steps_committed)
    one, delta = float(run.epsilon_charged), float(run.delta_charged)
    if steps == 0:
        return one, delta
    together = one if trained == 1 else 0.0
    if trained > 1:
        mechanism = plan.noise_multiplier, plan.sample_rate, steps, delta, trained
        together = math.inf
        if trained <= _MOST_ROWS:
            together = accountant.shared.prv_of_unit(*mechanism, near=trained * one, caller=caller)
    if math.isinf(together):
        return (trained + held_out) * one, 1.0
    return together + held_out * plan.evaluation_epsilon, delta


def curve(plan: dict[str, Any], steps: int, caller: str | None = None) -> renyi.Curve:
    """The Rényi divergences that so many committed steps of a plan come to. One step is accounted for, once."""
    known = PrivacyPlan.from_dict(plan)
    if steps == 0:
        return renyi.NOTHING
    one = accountant.shared.step(known.noise_multiplier, known.sample_rate, known.rows_per_unit, caller)
    return renyi.of_steps(one, steps, known.evaluation_epsilon)


def so_far(plan: dict[str, Any], steps: int) -> float:
    """The epsilon of a run that is under way, after so many committed steps: a look-up, once one step is accounted for.
    It may be more than what is charged when the run ends there, never less.
    """
    known = PrivacyPlan.from_dict(plan)
    if steps == 0:
        return 0.0
    if steps == known.steps:
        return max(known.epsilon_certified, known.evaluation_epsilon)
    most = known.epsilon if steps < known.steps else known.epsilon_at_most
    return min(renyi.epsilon_of_one(curve(plan, steps), known.delta), most)


def settle(plan: dict[str, Any], steps: int, caller: str | None = None) -> tuple[float, float]:
    """The (epsilon, delta) that `steps` committed steps of a plan cost, those that were run again counted again.

    Nothing for none; never above the plan for as many as planned, nor above what it is at most.
    """
    if steps == 0:
        return 0.0, 0.0
    known = PrivacyPlan.from_dict(plan)
    whole = max(known.epsilon_certified, known.evaluation_epsilon)
    if steps == known.steps:
        return whole, known.delta
    epsilon = accounting.certified(accounts(plan, steps, caller))
    # Two accountants on two grids: fewer steps never cost more, whatever their last digits say.
    if steps < known.steps:
        return min(epsilon, known.epsilon), known.delta
    most = known.epsilon_at_most if steps <= known.steps + known.redo_steps else epsilon
    return max(min(epsilon, most), whole), known.delta


def rest_of(run: Any) -> int:
    """How many steps a run comes to, over all attempts, if the one that is under way does all of its rest."""
    return int(run.steps_committed + run.plan["steps"] - run.position)


def again(run: Any) -> int:
    """How many steps a run comes to, over all attempts, if it goes on from its checkpoint."""
    return int(run.steps_committed + run.plan["steps"] - resumes_from(run))


def resumes_from(run: Any) -> int:
    """After how many steps of the plan a run's next attempt goes on."""
    return int(run.checkpoint["step"]) if run.checkpoint else 0
