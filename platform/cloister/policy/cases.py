"""Tests of policies, written by those who write policies: who asks what, and what the answer must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from cloister.errors import InputError
from cloister.policy.decide import Decision, Kind, Policy, Request, Value
from cloister.validation import first_problem

_Value = StrictBool | StrictInt | StrictStr


class Case(BaseModel):
    """One line of a test file. `resource` is written `Type/name`; `rule` is the id that must be among the deciding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StrictStr = ""
    principal: StrictStr
    kind: Kind = "person"
    roles: list[StrictStr] = []
    action: StrictStr
    resource: Annotated[StrictStr, Field(pattern=r"^[A-Za-z]+/.+$")] = "Platform/platform"
    attributes: dict[StrictStr, _Value] = {}
    context: dict[StrictStr, _Value] = {}
    expect: Literal["allow", "deny"]
    rule: StrictStr = ""

    def request(self) -> Request:
        """What is asked of the policies."""
        resource_type, _, resource = self.resource.partition("/")
        attributes: dict[str, Value] = dict(self.attributes)
        context: dict[str, Value] = dict(self.context)
        return Request(
            principal=self.principal, kind=self.kind, roles=frozenset(self.roles), action=self.action,
            resource_type=resource_type, resource=resource, attributes=attributes, context=context,
        )  # fmt: skip

    def title(self) -> str:
        """Its name, or the question in short."""
        return self.name or f"{self.principal} ({', '.join(self.roles) or 'no role'}) {self.action} {self.resource}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`holds` if the decision, and the rule where one is named, are as expected."""

    case: Case
    decision: Decision
    holds: bool


def parse_cases(text: str) -> list[Case]:
    """Read a YAML list of cases.

    Raises:
        InputError: not YAML, no list of cases, or an empty one, which would prove nothing.
    """
    try:
        cases = TypeAdapter(list[Case]).validate_python(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise InputError(f"the cases are not YAML{where}", "check the indentation and the quotes") from None
    except ValidationError as error:
        found = first_problem(error)
        number, *place = found.location or ("whole",)
        where = f"case {number + 1} {'.'.join(map(str, place))}" if isinstance(number, int) else "the whole"
        raise InputError(f"{where.strip()}: {found.reason}", "see a whole one: cloister policy test --help") from None
    if not cases:
        raise InputError("there is no case in it", "see one: cloister policy test --help")
    return cases


def run_cases(policy: Policy, cases: Sequence[Case]) -> list[Result]:
    """Decide every case."""
    results = []
    for case in cases:
        decision = policy.decide(case.request())
        holds = decision.allowed == (case.expect == "allow") and (not case.rule or case.rule in decision.rules)
        results.append(Result(case=case, decision=decision, holds=holds))
    return results
