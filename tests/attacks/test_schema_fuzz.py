"""Whatever is sent to the authority, by whomever: an answer in our three fields, never a 500.

schemathesis makes the requests from the OpenAPI document, at the edges of every schema and beyond, and at random; most
of them are made good in part (see `arena`). Each goes out by somebody who may do it, and by all others in turn.
Everything is derived from the requests themselves, so that a run can be repeated.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, seed, settings
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis import Case
from schemathesis.core.transport import Response

from arena import CALLERS, Arena
from authority_world import APP, World

DOCUMENT = APP.openapi()
CONFIG = {
    "checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}},
    "phases": {"stateful": {"inference": {"algorithms": []}}},  # no links but ours
}
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(CONFIG))
OPERATIONS = {each.ok().label: each.ok() for each in SCHEMA.get_all_operations()}
MOST_JOURNEYS = 12
REPEATABLE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def arena(sealed_template: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    world = sealed_template.copy(tmp_path_factory.mktemp("fuzz") / "authority")
    yield Arena(world)
    world.close()


# ---- one request at a time ----


@pytest.mark.long
@SCHEMA.parametrize()
@settings(REPEATABLE, max_examples=6)
def test_no_request_is_answered_badly(case: Case, arena: Arena) -> None:
    if arena.skips(case):
        return
    better = arena.improve(case)
    for caller in arena.callers(better):
        arena.send(better, caller)


ODD_TEXTS = (
    "\x00", "a\x00b", "\ud800", "\U0001f600" * 15, "\ufffe\u202e", "'; DROP TABLE runs; --", "../../keys", "\r\nX: y",
)  # fmt: skip


def texts(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a body the texts are."""
    if isinstance(value, str):
        yield place
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from texts(part, (*place, key))


def replaced(value: Any, place: tuple[Any, ...], text: str) -> Any:
    if not place:
        return text
    if isinstance(value, dict):
        return value | {place[0]: replaced(value[place[0]], place[1:], text)}
    return [replaced(part, place[1:], text) if key == place[0] else part for key, part in enumerate(value)]


@pytest.mark.long
@pytest.mark.parametrize("label", OPERATIONS)
def test_odd_text_in_any_place_is_no_fault(arena: Arena, label: str) -> None:
    """NUL, which PostgreSQL has no form for, half a character, one beyond 16 bits, SQL, a path, a header's end."""
    operation = OPERATIONS[label]
    names = {each.name for each in operation.path_parameters}
    media = next((each.media_type for each in operation.body), None)
    case = operation.Case(path_parameters=dict.fromkeys(names, ""), media_type=media)
    case.path_parameters = path = arena.path_of(case)
    case.body = good = arena.body_of(label, path)
    (caller, *_) = arena.callers(case)
    for text in ODD_TEXTS:
        in_url = not any("\ud800" <= sign <= "\udfff" for sign in text)
        for place in texts(good) if media == "application/json" or in_url else ():
            case.body = replaced(good, place, text)
            arena.send(case, caller)
        case.body = good
        for name in names if in_url else ():
            case.path_parameters = path | {name: text}
            arena.send(case, caller)
        case.path_parameters = path
        for parameter in operation.query if in_url else ():
            case.query = {parameter.name: text}
            arena.send(case, caller)
        case.query = {}


# ---- one request after another ----

LINKS = {
    "POST /v1/runs": ("run", "$response.body#/run", "/v1/runs/"),
    "POST /v1/runs/{run}/leases": ("run", "$request.path.run", "/v1/runs/{run}/[bcpm]"),
    "POST /v1/runs/{run}/attempts": ("run", "$request.path.run", "/v1/runs/{run}/[bl]"),
    "POST /v1/endpoints": ("endpoint", "$response.body#/endpoint", "/v1/endpoints/"),
    "POST /v1/identities": ("name", "$response.body#/name", "/v1/identities/"),
    "POST /v1/access": ("approval", "$response.body#/approval", "/v1/approvals/"),
    "GET /v1/datasets": ("name", "$response.body#/0/dataset#regex:(.+)@", "/v1/datasets/"),
    "GET /v1/models": ("name", "$response.body#/0/model#regex:(.+)@", "/v1/models/"),
}
"""What an answer names, and the operations on it: parameter, where it is, how their paths begin."""


def linked_to(source: str) -> list[str]:
    """The ids of the operations on what an operation's answer names."""
    parameter, _, prefix = LINKS[source]
    return [
        operation["operationId"]
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        if re.match(prefix, path) and f"{{{parameter}}}" in path
    ]


def linked_from(source: str) -> Any:
    """The document with a link from one operation's answer to everything that may be done with what it names."""
    document, (parameter, expression, _) = copy.deepcopy(DOCUMENT), LINKS[source]
    method, path = source.split()
    document["paths"][path][method.lower()]["responses"]["200"]["links"] = {
        name: {"operationId": name, "parameters": {parameter: expression}} for name in linked_to(source)
    }
    return schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(CONFIG))


@pytest.mark.long
@pytest.mark.parametrize("source", LINKS)
def test_no_sequence_of_requests_is_answered_badly(arena: Arena, source: str) -> None:
    """What a request has made or shown, and all that can be done with it, in any order."""
    followed: Counter[str] = Counter()
    parameter = LINKS[source][0]

    class Journey(linked_from(source).as_state_machine()):  # type: ignore[misc]
        def call(self, case: Case, **_options: Any) -> Response:
            better = arena.improve(case, linked=True)
            response, *_others = [arena.send(better, caller) for caller in arena.callers(better)]
            named = better.path_parameters.get(parameter)
            if named is not None and named == case.path_parameters[parameter]:
                followed[case.operation.label] += response.status_code < 300
            case.path_parameters = better.path_parameters
            return response

        def validate_response(self, *_answer: Any, **_options: Any) -> None:
            """`Arena.send` did."""

    targets = len(linked_to(source))
    # The world keeps what a sequence did, so a request may be taken once and refused the next time (an identity is
    # revoked once). Hypothesis calls that flaky, and ends, sometimes at once; every answer until then was a good one.
    for number in range(MOST_JOURNEYS):
        with contextlib.suppress(FlakyStrategyDefinition):
            seed(number)(Journey).run(settings=settings(REPEATABLE, max_examples=1 + targets, stateful_step_count=12))
        if len(+followed) >= targets / 3 and followed.total() >= 2 * targets:
            return
    pytest.fail(f"only {+followed} were followed")


@pytest.mark.long
def test_most_of_that_was_not_refused_at_the_door(arena: Arena) -> None:
    """Last in this file: what the others did. A fuzz that only gets refusals finds nothing."""
    if arena.cases.keys() != OPERATIONS.keys() or arena.offered.keys() != OPERATIONS.keys():
        pytest.skip("only where the whole file runs: some operations were not tried in this selection")
    assert arena.succeeded.keys() == OPERATIONS.keys()
    share = 3 if arena.world.place.server else 1
    assert arena.succeeded.total() >= 900 / share
    assert min(arena.sent[caller] for caller in CALLERS) >= 100 / share
