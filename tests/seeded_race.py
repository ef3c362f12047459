"""A seeded bug: in one of three runs, submissions see the budget as it was before the others took from it.

A pytest plugin, for `test_suite`: `$CLOISTER_SEEDED_RACE` names a file that counts the runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cloister.authority import resources, runs
from cloister.authority.ledger import Budget, budget_of


@pytest.fixture(autouse=True)
def seeded_race(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Path(os.environ["CLOISTER_SEEDED_RACE"])
    run = len(counter.read_text()) if counter.exists() else 0
    counter.write_text("x" * (run + 1))
    if run % 3:
        return
    seen: dict[tuple[str | None, float], Budget] = {}

    def stale(connection: Any, ledger: str | None) -> Budget:
        now = budget_of(connection, ledger)
        return seen.setdefault((ledger, now.epsilon), now)

    for module in (resources, runs):
        monkeypatch.setattr(module, "budget_of", stale)
