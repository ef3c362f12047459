"""Policies as their authors check them: files of cases, and `cloister policy` without an authority."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from cloister.cli import cloister
from cloister.cli.policy import test as the_command
from cloister.errors import InputError
from cloister.policy import Policy
from cloister.policy.cases import parse_cases, run_cases
from command_line import CommandLine

CASES = """
- principal: ed
  roles: [engineer]
  action: access:request
  expect: allow
- {name: consumers ask for nothing, principal: carl, roles: [consumer], action: access:request, expect: deny}
- principal: run-1
  kind: run
  roles: [run]
  action: run:work
  resource: Run/run-1
  attributes: {author: ed, owner: olga, region: eu, purpose: research, class: internal}
  expect: deny
  rule: workloads-act-only-from-a-node-over-mutual-tls
"""
SITE = '@id("freeze") forbid (principal, action == Action::"access:request", resource);\n'


@pytest.fixture
def line(tmp_path: Path) -> CommandLine:
    """A machine that knows no authority."""
    return CommandLine(tmp_path / "home")


def sample_in_the_help() -> str:
    """The cases that `cloister policy test --help` shows."""
    _, _, sample = str(the_command.help).partition("\b\n")
    return sample


def test_cases_hold_or_do_not() -> None:
    cases = parse_cases(CASES)
    assert [result.holds for result in run_cases(Policy.shipped(), cases)] == [True, True, True]
    frozen = Policy.shipped().with_site(SITE)
    assert [result.holds for result in run_cases(frozen, cases)] == [False, True, True]
    wrong_rule = parse_cases(CASES.replace("workloads-act-only-from-a-node-over-mutual-tls", "runs-train"))
    assert [result.holds for result in run_cases(Policy.shipped(), wrong_rule)] == [True, True, False]


def test_the_sample_in_the_help_holds() -> None:
    results = run_cases(Policy.shipped(), parse_cases(sample_in_the_help()))
    assert [result.holds for result in results] == [True, True]
    help_text = the_command.get_help(click.Context(the_command, info_name="test", parent=click.Context(cloister)))
    assert "    rule: restricted-data-is-never-trained-on" in help_text  # laid out as it must be typed


@pytest.mark.parametrize(("text", "says"), [
    ("", "the whole"), ("[]", "no case"), ("- [", "not YAML at line 1"), ("principal: ed", "the whole"),
    (CASES.replace("expect: deny", "expect: maybe", 1), "case 2 expect"),
    (CASES.replace("action: run:work", ""), "case 3 action"),
    (CASES.replace("Run/run-1", "run-1"), "case 3 resource"),
    (CASES.replace("kind: run", "knd: run"), "case 3 knd"),
    (CASES.replace("region: eu", "region: [eu]"), "case 3 attributes.region"),
    (CASES.replace("region: eu", "region: 1.5"), "case 3 attributes.region"),
])  # fmt: skip
def test_a_bad_file_of_cases_is_refused_and_the_place_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        parse_cases(text)


def test_validate_and_test_need_no_authority(line: CommandLine, tmp_path: Path) -> None:
    site, cases = tmp_path / "site.cedar", tmp_path / "cases.yaml"
    site.write_text(SITE)
    cases.write_text(CASES)
    assert line.json("policy", "validate", site) == {"shipped": list(Policy.shipped().rules), "site": ["freeze"]}
    assert "All 3 cases hold" in line.run("policy", "test", cases).stdout
    done = line.run("policy", "test", cases, "--policies", site)
    assert done.returncode == 1
    assert "forbidden by freeze" in done.stdout
    assert "error: 1 of 3 cases do not hold" in done.stderr
    done = line.run("policy", "test", cases, "--policies", site, "--json")
    assert done.returncode == 1
    assert [result["holds"] for result in json.loads(done.stdout)] == [False, True, True]
    assert not line.home.exists()


def test_a_bad_site_file_is_refused_in_two_lines(line: CommandLine, tmp_path: Path) -> None:
    site = tmp_path / "site.cedar"
    assert "there is no file of policies" in line.refused("policy", "validate", site)
    site.write_text('\n@id("a") permit (principal in Role::"boss", action, resource);')
    assert "policy a (line 2)" in line.refused("policy", "validate", site)
    site.write_bytes(b"\xff")
    assert "UTF-8" in line.refused("policy", "validate", site)


def test_explain_without_an_authority_asks_the_shipped_rules(line: CommandLine, tmp_path: Path) -> None:
    owner = ("--attribute", "owner=olga", "--attribute", "region=eu", "--attribute", "purpose=2026",
             "--attribute", 'purpose="2026"', "--attribute", "class=internal")  # fmt: skip
    question = ("policy", "explain", "--action", "train:submit", "--resource", "Dataset/adult@1", "--name", "ed")
    said = line.run(*question, "--role", "engineer", *owner, "--attribute", "epsilon_left_millionths=0").stdout
    assert "ed (engineer) may not train:submit on Dataset/adult@1: forbidden by a-spent-budget-trains-nothing" in said
    assert "holds: resource.epsilon_left_millionths is 0" in said
    shown = line.json(*question, "--role", "engineer", *owner, "--attribute", "epsilon_left_millionths=1")
    assert (shown["allowed"], shown["rules"]) == (True, ["engineers-train-and-release"])
    site = tmp_path / "site.cedar"
    site.write_text(SITE)
    shown = line.json("policy", "explain", "--action", "access:request", "--role", "engineer", "--policies", site)
    assert shown["findings"][0] == {"rule": "freeze", "effect": "forbid", "reasons": ["it has no condition"]}
    assert "TYPE/NAME" in line.refused("policy", "explain", "--action", "x", "--resource", "y")
    assert "NAME=VALUE" in line.refused("policy", "explain", "--action", "x", "--attribute", "y")
