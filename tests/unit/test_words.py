"""What commands say of budgets and approvals, and that no table cuts off what people copy."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest

from cloister.cli import output
from cloister.cli.approvals import _epsilon
from cloister.cli.budget import _change, _rule, _share
from cloister.cli.data import _delta
from cloister.cli.train import _budget, _verdict

SPENT = {
    "epsilon": 7.0, "delta": 2.5e-5, "rule": "adding", "epsilon_charged": 3.0, "epsilon_left": 4.0,
    "epsilon_added": 3.0, "delta_added": 1e-5, "delta_of_each_rule": 1.25e-5,
}  # fmt: skip
NOTHING = SPENT | {"epsilon_charged": 0.0, "epsilon_left": 7.0, "epsilon_added": 0.0, "delta_added": 0.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(headings: Sequence[str], *rows: Sequence[str]) -> str:
    """A table on a terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("COLUMNS", "80"), ("LINES", "24"), ("TERM", "xterm"), ("NO_COLOR", "1")):
            patch.setenv(name, value)
        patch.setattr("sys.stdout", terminal := Terminal())
        output.table(headings, rows, empty="")
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())


def test_ids_are_whole_however_long_the_rest_is() -> None:
    row = ("run-8d3095f88c", "a-long-name-of-a-dataset-" * 2, "words and " * 20, "x" * 70, "y" * 70, "apr-0123456789")
    said = shown(("run", "on", "why", "who", "else", "approval"), row)
    assert max(map(len, said.splitlines())) <= 80
    assert any("run-8d3095f88c" in line and "apr-0123456789" in line for line in said.splitlines())
    assert "…" not in said
    assert said.count("x") == 70


def test_a_name_that_is_longer_than_the_terminal_is_whole_too() -> None:
    assert "n" * 90 + "  olga" in shown(("dataset", "owner"), ("n" * 90, "olga"), ("m", ""))


def test_words_are_whole_where_there_is_room() -> None:
    row = ("run-8d3095f88c", "adult@1", "ed", "submitted (held)", "508", "3", "0.2", "3.738")
    headings = ("run", "on", "by", "state", "steps", "by itself", "for held-out rows", "all up to it")
    assert set(" ".join((*headings, *row)).split()) <= set(shown(headings, row).split())


def test_what_a_budget_has_spent_is_told_with_its_rule() -> None:
    assert _share(SPENT | {"runs": [{"settled": False}, {"settled": True}]}) == (
        "3 of 7 spent or held (for 1 run that is not over), 4 left"
    )
    assert _share(SPENT | {"runs": []}) == "3 of 7 spent or held, 4 left"
    assert _rule(SPENT) == (
        "adding: the epsilons of all runs. Their deltas come to 1e-05, at most 1.25e-05 (half of the budget's)"
    )
    several = SPENT | {"rule": "renyi", "epsilon_charged": 2.845, "epsilon_added": 6.0}
    assert _rule(several).startswith("Rényi filter, at half of the budget's delta: 2.845; adding would say 6. ")
    assert "more than that half" in _rule(several | {"delta_added": 2e-5})
    assert [_change([0.0, 7.0]), _change([7.0, 7.0]), _change([7.0, 9.0])] == ["7", "7", "7 → 9"]


def planned(after: dict[str, Any], before: dict[str, Any] = NOTHING, **more: Any) -> dict[str, Any]:
    return {
        "budget": {"joined": True, "before": before, "after": before | after}, "affordable": True,
        "affordable_at_most": True, "owner": "olga", "spec": {"dataset": "adult@1"},
        "plan": {"epsilon": 3.0, "delta": 1e-5},
    } | more  # fmt: skip


def test_a_plan_tells_what_the_run_takes() -> None:
    assert _budget(planned(SPENT)) == "epsilon 7.000 left before, 4.000 after"
    alone = planned({"rule": "renyi", "epsilon_charged": 3.803, "epsilon_left": 3.197})
    alone["plan"]["delta"] = 2e-5
    assert _budget(alone).endswith(
        "; this run takes 3.803, more than its 3: its delta 2e-05 is above half of the budget's (1.25e-05), so only "
        "the Rényi filter counts it"
    )
    after = {"rule": "renyi", "epsilon_charged": 4.466, "epsilon_left": 2.534}
    assert _budget(planned(after, before=SPENT)).endswith("; together with the runs before, this one takes 1.466")


def test_a_plan_tells_why_no_budget_pays() -> None:
    assert _verdict(planned(SPENT)) == "the budget pays for it"
    too_much = planned({"epsilon_charged": 7.0001}, affordable=False)
    assert _verdict(too_much) == "the budget does not pay for it: it would come to 7.001 of 7"
    deltas = planned({"epsilon_charged": 6.0, "delta_added": 3e-5, "delta_of_each_rule": 2.5e-5}, affordable=False)
    assert _verdict(deltas).endswith("the deltas would come to 3e-05 of 2.5e-05")
    endless = planned({"epsilon_charged": float("inf")}, affordable=False)
    assert "of 7" in _verdict(endless)
    none = planned({}, before=NOTHING | {"epsilon": 0.0}, affordable=False)
    assert _verdict(none) == "nobody has set a budget: ask olga: cloister budget set adult --epsilon E --delta D"
    none["budget"]["joined"] = False
    assert "until a security officer has answered" in _verdict(none)


def test_a_request_tells_which_of_a_budgets_numbers_grows() -> None:
    assert _epsilon({"epsilon": [7.0, 7.0], "delta": [1e-5, 2.5e-5]}) == "7, delta 1e-05 → 2.5e-05"
    assert _epsilon({"epsilon": [0.0, 11.0], "delta": [0.0, 2.5e-5]}) == "0 → 11"
    assert _epsilon({"epsilon": [7.0, 9.0], "delta": [1e-5, 1e-5]}) == "7 → 9"


@pytest.mark.parametrize(("rows", "delta"), [(1, "2.5e-5"), (32_000, "2.5e-5"), (33_998, "2.3e-5"), (10**6, "8e-7")])
def test_the_delta_that_is_proposed_is_valid(rows: int, delta: str) -> None:
    assert _delta(rows) == delta
    assert float(delta) * rows <= 0.8
