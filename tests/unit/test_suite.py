"""The gate: what has a second try, what has none, and what turns it red."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITE = [sys.executable, str(ROOT / "tools" / "suite.py")]
PREAMBLE = """
import pathlib, socket, subprocess, pytest, httpx

def first_time(name):
    file = pathlib.Path("tried-" + name)
    before, _ = file.exists(), file.touch()
    return not before
"""


def suite(folder: Path, files: dict[str, str]) -> tuple[int, str]:
    """Run the gate over a small suite of its own: the exit code, and what it printed."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  story: one\n  long: another\n")
    for name, text in files.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PREAMBLE + text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": "-p outcomes -p no:cacheprovider"}
    done = subprocess.run([*SUITE, "gate"], cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def test_what_the_environment_failed_once_passes_and_is_listed(tmp_path: Path) -> None:
    code, said = suite(tmp_path, {
        "unit/test_one.py": """
@pytest.fixture
def server():
    if first_time("server"):
        raise LookupError("the server did not start")

def test_set_up(server): pass

def test_refused():
    if first_time("refused"):
        httpx.get("http://127.0.0.1:1", trust_env=False)

def test_slow():
    if first_time("slow"):
        subprocess.run(["sleep", "9"], timeout=0.01)

def test_good(): pass
""",
        "attacks/test_two.py": "def test_good(): pass\n",
    })  # fmt: skip
    assert code == 0, said
    listed = said.partition("Passed on the second try:")[2]
    for test, why in {"test_set_up": "a fixture's set-up", "test_refused": "a refused connection",
                      "test_slow": "a time-out"}.items():  # fmt: skip
        assert f"tests/unit/test_one.py::{test}: {why}" in listed
    assert "the server did not start" in listed, "the first failure is shown"
    assert "tests/attacks, 1 tests" in said
    assert said.splitlines()[-1] == "5 passed, 0 failed, 0 skipped"


def test_what_may_not_fail_once_turns_the_gate_red(tmp_path: Path) -> None:
    once = "def test_once():\n    if first_time({0!r}):\n        raise TimeoutError\n"
    code, said = suite(tmp_path, {
        "attacks/test_attack.py": once.format("attack"),
        "properties/test_property.py": once.format("property"),
        "unit/test_privacy_of_noise.py": once.format("privacy"),
        "unit/test_some_kills.py": once.format("kill"),
        "unit/test_faults.py": once.format("fault"),
        "unit/test_wrong.py": "def test_once():\n    assert not first_time('wrong')\n",
        "unit/test_twice.py": "def test_twice():\n    raise TimeoutError\n",
    })  # fmt: skip
    assert code == 1
    red = {line for line in said.splitlines() if line.startswith("RED: ")}
    assert red == {
        "RED: failed: tests/attacks/test_attack.py::test_once",
        "RED: failed: tests/properties/test_property.py::test_once",
        "RED: failed: tests/unit/test_privacy_of_noise.py::test_once",
        "RED: failed: tests/unit/test_some_kills.py::test_once",
        "RED: failed: tests/unit/test_faults.py::test_once",
        "RED: failed: tests/unit/test_wrong.py::test_once",
        "RED: failed twice: tests/unit/test_twice.py::test_twice",
    }
    assert said.splitlines()[-1] == "0 passed, 7 failed, 0 skipped"


def test_more_than_three_failures_of_the_environment_turn_the_gate_red(tmp_path: Path) -> None:
    test = """
@pytest.mark.parametrize("n", range(4))
def test_it(n):
    if first_time(str(n)):
        raise TimeoutError
"""
    code, said = suite(tmp_path, {"unit/test_four.py": test})
    assert code == 1
    assert "RED: 4 failures of the environment, more than 3" in said
    assert "Once more" not in said


def test_a_run_without_tests_and_one_that_does_not_start_are_red(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    code, said = suite(tmp_path / "none", {"unit/test_none.py": ""})
    assert (code, "RED: no test ran" in said) == (1, True)
    code, said = suite(tmp_path / "broken", {"unit/test_broken.py": "import no_such_module\n"})
    assert code == 1


def test_a_race_in_the_ledger_that_shows_in_one_of_three_runs_turns_the_gate_red(tmp_path: Path) -> None:
    test = "tests/unit/test_authority_runs.py::test_two_submits_at_once_cannot_both_take_the_last_epsilon[sqlite]"
    counter = tmp_path / "runs"
    environment = os.environ | {"PYTEST_ADDOPTS": "-p seeded_race", "CLOISTER_SEEDED_RACE": str(counter)}
    codes = []
    for _ in range(2):
        done = subprocess.run(
            [*SUITE, "gate", "--", "-n", "0", test],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        codes.append(done.returncode)
        assert "Once more" not in done.stdout
        assert (f"RED: failed: {test}" in done.stdout) == (done.returncode == 1), done.stdout
    assert codes == [1, 0], "the first run has the race, the second has not: a second try would have hidden it"
