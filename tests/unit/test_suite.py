"""The gate: what has a second try, what has none, and what turns it red."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = [sys.executable, str(ROOT / "tools" / "suite.py")]
PREAMBLE = """
import pathlib, socket, ssl, subprocess, threading, pytest, httpx

def first_time(name):
    file = pathlib.Path("tried-" + name)
    before, _ = file.exists(), file.touch()
    return not before
"""


def suite(folder: Path, files: dict[str, str], *tiers: str) -> tuple[int, list[str], str]:
    """Run the gate, or these tiers, over a small suite of its own: the exit code, what is red, and what was printed."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  story: one\n  long: another\n")
    for name, text in files.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PREAMBLE + text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_ADDOPTS": "-p outcomes -p no:cacheprovider"}
    command = [*SUITE, *(tiers or ["gate"])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    red = sorted(line.removeprefix("RED: ") for line in done.stdout.splitlines() if line.startswith("RED: "))
    assert (done.returncode == 1) == bool(red), done.stdout + done.stderr
    return done.returncode, red, done.stdout


def test_what_the_environment_failed_once_passes_and_is_listed(tmp_path: Path) -> None:
    code, red, said = suite(tmp_path, {
        "unit/test_one.py": """
def test_refused():
    if first_time("refused"):
        httpx.get("http://127.0.0.1:1", trust_env=False)

def test_slow():
    if first_time("slow"):
        subprocess.run(["sleep", "9"], timeout=0.01)

def test_good(): pass
""",
        "unit/test_server.py": """
@pytest.fixture(scope="module")
def server():
    assert not first_time("server"), "the server did not start"

@pytest.mark.parametrize("name", ["a", "b::c", "[d]", "é", ""])
def test_set_up(server, name): pass
""",
        "attacks/test_two.py": "def test_good(): pass\n",
    })  # fmt: skip
    assert (code, red) == (0, []), said
    listed = said.partition("Passed on the second try:")[2]
    for test, why in {"one.py::test_refused": "a refused connection", "one.py::test_slow": "a time-out",
                      "server.py::test_set_up[a]": "a fixture's set-up",
                      "server.py::test_set_up[[d]]": "a fixture's set-up"}.items():  # fmt: skip
        assert f"tests/unit/test_{test}: {why}" in listed
    assert "the server did not start" in listed, "the first failure is shown"
    assert "tests/attacks, 1 tests" in said
    assert said.splitlines()[-1] == "9 passed, 0 failed, 0 skipped"


def test_what_may_not_fail_once_turns_the_gate_red(tmp_path: Path) -> None:
    once = "def test_once():\n    if first_time({0!r}):\n        raise TimeoutError\n"
    _, red, said = suite(tmp_path, {
        "attacks/test_attack.py": once.format("attack"),
        "properties/test_property.py": once.format("property"),
        "unit/test_privacy_of_noise.py": once.format("privacy"),
        "unit/test_some_kills.py": once.format("kill"),
        "unit/test_faults.py": once.format("fault"),
        "unit/test_others.py": """
def test_a_killed_process_leaves_nothing():
    if first_time("named"):
        raise TimeoutError

def test_wrong():
    assert not first_time("wrong")

def test_wrong_after_a_time_out():
    if first_time("after"):
        raise AssertionError("spent twice") from TimeoutError()

def test_in_a_circle():
    if first_time("circle"):
        error = ValueError()
        raise error from error

def test_a_part(subtests):
    for name in "abc":
        with subtests.test(name):
            assert name != "b" or not first_time("part")

def test_nobody_knows_the_certificate():
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"no TLS"), daemon=True).start()
        httpx.get("https://127.0.0.1:%d" % listener.getsockname()[1], trust_env=False)
""",
        "unit/test_twice.py": "def test_twice():\n    raise TimeoutError\n",
    })  # fmt: skip
    assert red == sorted([
        "failed: tests/attacks/test_attack.py::test_once",
        "failed: tests/properties/test_property.py::test_once",
        "failed: tests/unit/test_privacy_of_noise.py::test_once",
        "failed: tests/unit/test_some_kills.py::test_once",
        "failed: tests/unit/test_faults.py::test_once",
        "failed: tests/unit/test_others.py::test_a_killed_process_leaves_nothing",
        "failed: tests/unit/test_others.py::test_wrong",
        "failed: tests/unit/test_others.py::test_wrong_after_a_time_out",
        "failed: tests/unit/test_others.py::test_in_a_circle",
        "failed: tests/unit/test_others.py::test_a_part",
        "failed: tests/unit/test_others.py::test_nobody_knows_the_certificate",
        "not passed on the second try: tests/unit/test_twice.py::test_twice",
    ]), said  # fmt: skip
    assert said.splitlines()[-1] == "0 passed, 12 failed, 0 skipped"


def test_more_than_three_failures_of_the_environment_turn_the_gate_red(tmp_path: Path) -> None:
    test = """
@pytest.mark.parametrize("n", range(4))
def test_it(n):
    if first_time(str(n)):
        raise TimeoutError
"""
    _, red, said = suite(tmp_path, {"unit/test_four.py": test})
    assert "4 failures of the environment, more than 3" in red
    assert "Once more" not in said


def test_a_file_that_does_not_load_is_red_beside_a_failure_of_the_environment(tmp_path: Path) -> None:
    _, red, _ = suite(tmp_path, {
        "unit/test_broken.py": "import no_such_module\n",
        "unit/test_once.py": "def test_once():\n    if first_time('x'):\n        raise TimeoutError\n",
    })  # fmt: skip
    assert red == ["failed: tests/unit/test_broken.py"]


def test_a_second_try_that_ends_badly_is_red(tmp_path: Path) -> None:
    _, red, _ = suite(tmp_path, {
        "unit/test_end.py": """
@pytest.fixture
def ends():
    yield
    import os
    if not first_time("end"):
        os.abort()

def test_once(ends):
    if first_time("once"):
        raise TimeoutError
""",
    })  # fmt: skip
    assert red == [
        "not passed on the second try: tests/unit/test_end.py::test_once", "the second try: pytest ended with -6",
    ]  # fmt: skip


def test_a_tier_in_which_nothing_ran_is_red(tmp_path: Path) -> None:
    test = """
def test_taken():
    if first_time("port"):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.socket() as other:
            other.bind(one.getsockname())
"""
    _, red, said = suite(tmp_path, {"unit/test_one.py": test}, "gate", "story")
    assert red == ["no test ran: story"]
    assert "tests/unit/test_one.py::test_taken: a taken port" in said
    assert said.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"


def test_a_run_that_stops_before_its_end_is_red(tmp_path: Path) -> None:
    files = {"unit/test_one.py": """
import os

def test_slow():
    if first_time("slow"):
        raise TimeoutError

def test_end():
    if first_time("end"):
        os._exit(0)

def test_wrong(): assert False
"""}  # fmt: skip
    for more in ("-xq", "-q"):  # stops at the first failure; then the process ends in the middle
        _, red, said = suite(tmp_path, files, "gate", "--", "-n", "0", more)
        assert [line for line in red if "did not come to their end" in line], said
    _, red, _ = suite(tmp_path, {"unit/test_one.py": """
def test_thread():
    thread = threading.Thread(target=lambda: pytest.fail("in a thread"))
    thread.start()
    thread.join()
"""}, "gate", "--", "-W", "error::pytest.PytestUnhandledThreadExceptionWarning")  # fmt: skip
    assert red == ["failed: tests/unit/test_one.py::test_thread"]
    elsewhere = tmp_path / "tests" / "unit"
    done = subprocess.run([*SUITE, "gate"], cwd=elsewhere, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "root of the project" in done.stderr) == (2, True)


@pytest.mark.timeout(1200)
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
