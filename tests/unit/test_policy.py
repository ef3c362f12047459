"""Policy: nothing is allowed that no rule permits, and an error is a refusal."""

import pytest

from cloister.errors import InputError, PermissionDeniedError
from cloister.policy import Policy, Request


def ask(roles: str, action: str, resource_type: str, resource: str = "x", principal: str = "pat", **attributes: str):
    return Policy.shipped().decide(
        Request(principal=principal, roles=frozenset(roles.split()), action=action, resource_type=resource_type,
                resource=resource, attributes=attributes)
    )  # fmt: skip


def test_nothing_is_allowed_without_a_role() -> None:
    decision = ask("", "model:infer", "Model", author="ann", stage="production")
    assert not decision.allowed
    assert decision.reason == "no rule permits it"


def test_a_decision_names_its_rule() -> None:
    assert ask("consumer", "model:infer", "Model", author="ann", stage="production").rules == (
        "consumers-ask-production-models",
    )


@pytest.mark.parametrize("stage", ["candidate", "retired", ""])
def test_a_model_that_is_not_in_production_answers_nobody(stage: str) -> None:
    assert not ask("consumer", "model:infer", "Model", author="ann", stage=stage).allowed


def test_an_author_cannot_approve_even_as_reviewer() -> None:
    assert ask("reviewer", "model:approve", "Model", author="ann", stage="candidate").allowed
    refused = ask("reviewer engineer", "model:approve", "Model", author="pat", stage="candidate")
    assert not refused.allowed
    assert refused.rules == ("authors-never-approve-their-own-model",)


def test_a_candidate_cannot_be_exported() -> None:
    assert not ask("engineer", "model:export", "Model", author="pat", stage="candidate").allowed
    assert ask("engineer", "model:export", "Model", author="pat", stage="production").allowed


def test_a_workload_acts_only_for_itself() -> None:
    assert ask("run", "run:work", "Run", "run-1", "run-1", author="ann").allowed
    assert not ask("run", "run:work", "Run", "run-2", "run-1", author="ann").allowed
    assert not ask("endpoint", "run:work", "Run", "e-1", "e-1", author="ann").allowed


def test_only_the_owner_seals_the_next_version() -> None:
    assert ask("data-owner", "dataset:seal", "Dataset", owner="pat").allowed
    assert not ask("data-owner", "dataset:seal", "Dataset", owner="olga").allowed


def test_a_missing_attribute_denies_instead_of_skipping_the_forbid() -> None:
    assert not ask("reviewer", "model:approve", "Model", stage="candidate").allowed


def test_an_unknown_action_is_refused() -> None:
    assert not ask("operator", "platform:destroy", "Platform").allowed


def test_a_name_with_quotes_cannot_change_the_question() -> None:
    assert not ask("consumer", 'model:infer"x', "Model", 'm"::"', 'p"\\', author="a", stage="production").allowed


def test_policies_that_do_not_fit_the_schema_are_not_loaded() -> None:
    with pytest.raises(InputError):
        Policy('permit (principal, action == Action::"no:such", resource);', "entity Person;")


def test_refusal_says_who_what_and_why() -> None:
    request = Request(principal="pat", roles=frozenset({"consumer"}), action="audit:read", resource_type="Platform",
                      resource="platform")  # fmt: skip
    with pytest.raises(PermissionDeniedError, match=r"pat .consumer. may not audit:read"):
        Policy.shipped().require(request)
