"""What is certified about the privacy of a run that has done all of its steps, for the provenance of its model.

Guarantees: epsilon is the authority's own figure, of the steps that it has on record; each accountant's is told
beside it, and what they assume, in words. What the worker saw in its audits is taken as it told it, within limits;
what that means is computed here. A run that its audits falsify gets no certificate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cloister.authority.costs import accounts, replacing, settle
from cloister.errors import IntegrityError
from cloister.privacy.auditing import AuditReport, Guesses, MechanismAudit, one_run_audit


def privacy_of(run: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate; `seen` is what the run's audits saw (`bodies.Audit`).

    Raises:
        IntegrityError: the audits falsify what it would say.
    """
    epsilon, delta = settle(run.plan, run.steps_committed)
    report = _report(run.plan, epsilon, seen)
    if report.falsified:
        raise IntegrityError(
            f"the audits of {run.id} falsify its epsilon of {epsilon:.4g}: there is no model",
            "do not train with this software, and report it",
        )
    return {
        "epsilon": epsilon, "delta": delta, "steps": run.steps_committed,
        "redone_steps": run.steps_committed - run.plan["steps"], "attempts": run.attempt, "plan": run.plan,
        "epsilon_replacing": replacing(run.plan, run.steps_committed),
        "accountants": accounts(run.plan, run.steps_committed), "assumptions": _assumptions(run.plan, run.spec),
        "audit": report.to_dict(),
    }  # fmt: skip


def _report(plan: Mapping[str, Any], epsilon: float, seen: Mapping[str, Any]) -> AuditReport:
    mechanism = dict(seen["mechanism"])
    if mechanism["noise_multiplier_at_most"] is None:
        mechanism["noise_multiplier_at_most"] = math.inf
    return AuditReport(
        epsilon=epsilon,
        mechanism=MechanismAudit(epsilon_theory=float(plan["epsilon_certified"]), **mechanism),
        one_run=one_run_audit(Guesses(**seen["one_run"]), epsilon=epsilon, delta=float(plan["delta"])),
    )


def _assumptions(plan: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    most = f"at most {plan.get('rows_per_unit', 1):,}"
    capped = spec["privacy"].get("rows_per_unit") is not None
    unit = f"one unit, of which {most} of its rows are used," if capped else f"one unit of {most} row(s)"
    return [
        f"Epsilon bounds what can be told of whether {unit} is in the data.",
        "Public is the number of rows, rounded down to two digits when rows were sealed or appended last.",
        "Where it is known to be there, and only its values are hidden, epsilon is larger: of a row that is replaced.",
        "Each row is in each batch independently with the same probability, and an empty batch is a step.",
        "Each step adds fresh Gaussian noise, from a cryptographic generator whose keys are stored nowhere.",
        "A row adds a gradient of at most the clipping norm; the average is by the expected size of a batch.",
        "The workers of the run trust each other and see each other's noisy sums; all others see their sum only.",
        "The evaluation is of rows that nobody trains on, and has an epsilon of its own.",
    ]
