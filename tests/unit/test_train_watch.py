"""What people see of a run between two reports of its workers."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.cli.train import about

SHOWN: dict[str, Any] = {
    "steps_done": 100, "steps": 420, "rows_per_s": 5000.0, "plan": {"sample_rate": 0.01, "rows": 50_000},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "since_s", "step"),
    [
        ({}, 0.0, 100),
        ({}, 2.0, 120),
        ({}, 600.0, 150),  # it hangs, or died: no further than the next report
        ({"steps_done": 400}, 4.0, 420),
        ({"steps_done": 0, "rows_per_s": None}, 60.0, 0),
    ],
)
def test_between_two_reports_the_bar_goes_on_as_fast_as_before(
    changes: dict[str, Any], since_s: float, step: float
) -> None:
    assert about(SHOWN | changes, since_s) == step
