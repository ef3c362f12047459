"""The end of a training run, in its own words: a DSSE statement signed by the run's key.

Guarantees: `verify` returns only what the run's own key signed, about this run and exactly this plan. It is what the
ledger demands before it gives back what a run did not use.

Does not guarantee: that `steps_done` is true. The ledger settles by what it has on record itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from cloister.canonical import canonical_json, sha256_hex
from cloister.errors import InputError, IntegrityError
from cloister.signing import dsse
from cloister.signing.keys import SigningKey, key_id, public_from_pem

RUN_END_PREDICATE = "https://cloister.dev/run-end/v1"
Outcome = Literal["failed", "stopped"]
ENDED = frozenset({"finished", "failed", "stopped"})
"""The states of a run that change only by `train resume`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """What a run says: which attempt was its last (0: none), how it went, and how far in the plan it came."""

    run: str
    attempt: int
    outcome: Outcome
    steps_done: int

    def __post_init__(self) -> None:
        whole = all(type(number) is int and number >= 0 for number in (self.attempt, self.steps_done))
        if not whole or self.outcome not in ("failed", "stopped") or not isinstance(self.run, str):
            raise InputError("this is not the end of a run", "name the run, an attempt, an outcome and a step")


def make(end: RunEnd, plan: Mapping[str, Any], key: SigningKey) -> dict[str, Any]:
    """The envelope that ends a run of this plan, signed by the run's key."""
    return dsse.sign(dsse.statement(end.run, _digest(plan), RUN_END_PREDICATE, asdict(end)), key)


def verify(envelope: Mapping[str, Any], public_key_pem: bytes, *, run: str, plan: Mapping[str, Any]) -> RunEnd:
    """What a run said, once it is known to have said it.

    Raises:
        IntegrityError: another key signed it, it was changed, or it is about another run or plan.
    """
    trusted = {key_id(public_key_pem): public_from_pem(public_key_pem)}
    verified = dsse.verify(envelope, trusted, predicate_type=RUN_END_PREDICATE, subject_digest=_digest(plan))
    said = verified.predicate
    if not isinstance(said, dict) or set(said) != {"run", "attempt", "outcome", "steps_done"} or said["run"] != run:
        raise IntegrityError("this is not the end of this run", "let the run itself say that it has ended")
    try:
        return RunEnd(
            run=run, attempt=said["attempt"], outcome=cast(Outcome, said["outcome"]), steps_done=said["steps_done"]
        )
    except InputError as error:
        raise IntegrityError(error.message, error.hint) from None


def _digest(plan: Mapping[str, Any]) -> str:
    return sha256_hex(canonical_json(dict(plan)))
