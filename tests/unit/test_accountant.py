"""Accounting is done beside the authority and not in it: without its keys, in turn, within limits, and after deaths."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from authority_world import World
from cloister.authority import accountant as accountant_module
from cloister.authority.accountant import PLACES, PLACES_FOR_RUNS, WAITING_OF_CALLER, Accountant, _Line
from cloister.errors import InputError, UnavailableError
from cloister.privacy import accounting
from cloister.privacy.plan import make_plan
from waiting import wait_for

TESTS = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(TESTS.parent / "platform"), str(TESTS)])
FIELDS: dict[str, Any] = {
    "epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0, "epochs": 2.0, "expected_batch_size": 64, "rows": 300,
    "rows_per_unit": 1, "redo_steps": 10, "evaluation_epsilon": 0.2,
}  # fmt: skip
SECRET = "a-secret-of-the-authority's"
SMALL = 1.0, 0.01, 10, 1e-5, 1
TOO_LARGE = 1.0, 0.5, 10, 1e-5, 10**9  # a table of all counts of so many rows has 800 GB
# What belongs to keys and state: in no process that accounts.
KEPT_OUT = (
    "cloister.authority", "cloister.sealing", "cloister.signing", "cloister.stores", "cryptography", "nacl", "sqlite3",
    "sqlalchemy", "pg8000", "hvac", "uvicorn",
)  # fmt: skip
IMPORTED = """
import sys
from cloister.privacy import accountant_process, accounting
accounting.warm()
print(*sorted({name for name in sys.modules}))
"""
PLANS = """
import sys, tempfile
from pathlib import Path
from authority_world import World, training_spec
with tempfile.TemporaryDirectory() as folder:
    directory = Path(folder, "authority")
    directory.mkdir()
    world = World(directory)
    world.register_everybody()
    world.seal()
    world.set_budget(10, 1e-3)
    plan = world.post("ed", "/v1/plans", {"spec": training_spec()})["plan"]
    world.close()
print(plan["epsilon"], *sorted({name.partition(".")[0] for name in sys.modules}))
"""
DIES = """
import threading, time
from cloister.authority.accountant import Accountant
accountant = Accountant()
accountant.warm()
threading.Thread(target=lambda: accountant.accounts(1.0, 0.5, 10, 1e-5, 1000), daemon=True).start()
while accountant._line.served is None:
    time.sleep(0.01)
print(accountant.pid, flush=True)
time.sleep(600)
"""


NUMBERS = itertools.count(10)


def slow() -> tuple[float, float, int, float, int]:
    """A request that takes a core for about a second: another each time, since the process remembers too."""
    return 1.0, 0.5, next(NUMBERS), 1e-5, 500


@pytest.fixture(scope="module")
def ready() -> Iterator[Accountant]:
    accountant = Accountant()
    accountant.warm()
    yield accountant
    accountant.close()


@pytest.fixture
def accountant(ready: Accountant) -> Accountant:
    """One that remembers nothing, whatever has become of its process."""
    ready._remembered.clear()
    return ready


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def served(accountant: Accountant) -> bool:
    return accountant._line.served is not None


def queued(accountant: Accountant, caller: str) -> int:
    return len(accountant._line.queues.get(caller, ()))


# ---- what it has ----


def test_its_process_has_nothing_of_the_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An authority has keys in memory and on the disk, and a database that is open."""
    world = World(tmp_path)
    world.register_everybody()
    monkeypatch.setenv("CLOISTER_KEY_PASSPHRASE", SECRET)
    monkeypatch.setenv("CLOISTER_HOME", str(world.directory))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    accountant = Accountant()
    with socket.create_server(("127.0.0.1", 0)), (world.directory / "log.pub").open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        accountant.warm()
        process = Path(f"/proc/{accountant.pid}")
        environment = dict(each.partition("=")[::2] for each in (process / "environ").read_text().split("\0") if each)
        descriptors = {int(each.name): str(each.readlink()) for each in (process / "fd").iterdir()}
        mapped = (process / "maps").read_text()
        limits = (process / "limits").read_text()
        assert psutil.Process(accountant.pid).nice() > psutil.Process().nice()
        accountant.close()
    world.close()
    assert SECRET not in environment.values()
    assert environment.keys() <= {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR",
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
    }  # fmt: skip
    pipes = [name for name in descriptors.values() if name.startswith("pipe:")]
    assert len(pipes) == len(set(pipes)) == 2
    assert set(descriptors.values()) - set(pipes) == {"/dev/null"}
    assert str(world.directory) not in mapped
    assert not [name for name in ("_sqlite3", "_sodium", "cryptography", "nacl") if name in mapped]
    found = dict(line.rsplit(None, 3)[:2] for line in limits.splitlines() if line.startswith("Max core"))
    assert found == {"Max core file size": "0"}
    assert "Max address space         unlimited" not in limits


def test_its_process_imports_nothing_that_knows_keys() -> None:
    names = set(run(IMPORTED).split())
    assert {"dp_accounting", "opacus"} <= names
    assert [each for each in KEPT_OUT if each in names] == []


def test_the_authority_makes_a_plan_without_importing_an_accountant() -> None:
    epsilon, *names = run(PLANS).split()
    assert epsilon == "3.0"
    assert "sqlalchemy" in names
    assert {"dp_accounting", "opacus", "torch"} & set(names) == set()


def test_its_process_ends_with_the_authority_also_while_it_computes() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DIES], env=os.environ | {"PYTHONPATH": PATHS}, stdout=subprocess.PIPE, text=True
    ) as authority:
        assert authority.stdout
        process = psutil.Process(int(authority.stdout.readline()))
        assert process.ppid() == authority.pid
        authority.send_signal(signal.SIGKILL)
        authority.wait()
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the end of the process")


# ---- what it answers ----


def test_its_answers_are_those_of_the_accountants(accountant: Accountant) -> None:
    assert accountant.plan(**FIELDS) == pytest.approx(make_plan(**FIELDS).to_dict(), rel=1e-9)
    assert accountant.accounts(*SMALL) == pytest.approx(accounting.accounts(*SMALL), rel=1e-9)
    assert accountant.replacing(*SMALL[:4]) == pytest.approx(accounting.replacing_epsilon(*SMALL[:4]), rel=1e-9)
    unit = 1.0, 0.01, 10, 1e-5, 5, 3.0
    assert accountant.prv_of_unit(*unit) == pytest.approx(accounting.prv_of_unit(*unit), rel=1e-9)
    assert accountant.accounts(0.0, 0.01, 10, 1e-5, 1) == dict.fromkeys(("prv", "pld", "rdp"), float("inf"))


def test_errors_come_back_as_they_were_raised(accountant: Accountant) -> None:
    before = accountant.pid
    for wrong in ({"expected_batch_size": 300}, {"delta": 0.5}, {"rows": 2**60}):
        with pytest.raises(InputError) as expected:
            make_plan(**FIELDS | wrong)
        with pytest.raises(InputError) as found:
            accountant.plan(**FIELDS | wrong)
        if "rows" not in wrong:
            assert found.value.to_dict() == expected.value.to_dict()
    with pytest.raises(ValueError, match="the noise multiplier is finite"):
        accountant.accounts(-1.0, *SMALL[1:])
    assert accountant.pid == before


def test_what_was_computed_is_remembered(accountant: Accountant, monkeypatch: pytest.MonkeyPatch) -> None:
    found = accountant.accounts(*SMALL)
    monkeypatch.setattr(accountant, "_computed", lambda *_: pytest.fail("it is known"))
    found["prv"] = 0.0  # the caller's own copy
    assert accountant.accounts(*SMALL, caller="ed") == accountant.accounts(*SMALL) != found


def test_no_more_is_remembered_than_there_is_room_for(
    accountant: Accountant, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(accountant_module, "REMEMBERED", 2)
    for steps in (1, 2, 1, 3):
        accountant.replacing(1.0, 0.01, steps, 1e-5)
    assert [arguments[2] for arguments in accountant._remembered["replacing"]] == [1, 3]


# ---- in turn ----


def test_many_slow_requests_of_one_caller_do_not_keep_another_waiting(
    accountant: Accountant, pool: ThreadPoolExecutor
) -> None:
    order: list[str] = []

    def ask(name: str, caller: str | None, mechanism: Any) -> None:
        accountant.accounts(*mechanism, caller=caller)
        order.append(name)

    waiting = [pool.submit(ask, "ed 0", "ed", slow())]
    wait_for(lambda: served(accountant))
    waiting += [pool.submit(ask, f"ed {steps}", "ed", slow()) for steps in (1, 2, 3)]
    wait_for(lambda: queued(accountant, "ed") == 3)
    waiting.append(pool.submit(ask, "eve", "eve", slow()))
    wait_for(lambda: queued(accountant, "eve") == 1)
    waiting.append(pool.submit(ask, "itself", None, slow()))
    wait_for(lambda: queued(accountant, "") == 1)
    done(waiting)
    # The queue of a caller is in the order in which threads came to it: any.
    assert [name.partition(" ")[0] for name in order] == ["ed", "itself", "ed", "eve", "ed", "ed"]


def test_callers_take_turns() -> None:
    line = _Line()
    for caller, key in [("ed", "1"), ("ed", "2"), ("ed", "3"), ("eve", "4"), ("eve", "5"), ("rob", "6"), ("", "7")]:
        line.join((key, ()), caller)
    order = []
    while request := line.next():
        line.serve(request)
        assert line.next() is None
        order.append(request.key[0])
        line.done(request, {"value": None})
    assert order == ["7", "1", "4", "6", "2", "5", "3"]
    assert (line.requests, line.queues) == ({}, {})


def test_equal_requests_are_computed_once(
    accountant: Accountant, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = counted(accountant, monkeypatch)
    one, other = slow(), slow()
    first = pool.submit(accountant.accounts, *one, caller="ed")
    wait_for(lambda: served(accountant))
    equal = [pool.submit(accountant.accounts, *other, caller=caller) for caller in ("ed", "ed", "eve", None)]
    same = [pool.submit(accountant.accounts, *one, caller=caller) for caller in ("ed", "eve", None)]
    answers = done([first, *same, *equal])
    assert all(answer == answers[0] for answer in answers[:4])
    assert all(answer == answers[4] for answer in answers[4:])
    assert sorted(steps for _, steps in computed.elements()) == [one[2], other[2]]


def test_who_wants_what_another_waits_for_has_it_in_their_own_turn() -> None:
    line = _Line()
    for number in range(4):
        line.join((str(number), ()), "ed")
    wanted = line.join(("3", ()), "eve")
    first = line.next()
    assert first
    line.serve(first)
    line.done(first, {"value": None})
    assert line.next() is wanted


def test_too_many_are_refused(accountant: Accountant, pool: ThreadPoolExecutor) -> None:
    waiting = [pool.submit(accountant.accounts, *slow(), caller="ed")]
    wait_for(lambda: served(accountant))
    for steps in range(WAITING_OF_CALLER):
        waiting.append(pool.submit(accountant.replacing, 1.0, 0.01, 10 + steps, 1e-5, caller="ed"))
    wait_for(lambda: queued(accountant, "ed") == WAITING_OF_CALLER)
    with pytest.raises(UnavailableError, match="other plans are being computed") as refused:
        accountant.replacing(1.0, 0.01, 20, 1e-5, caller="ed")
    assert refused.value.hint == "try again in a few seconds"
    waiting.append(pool.submit(accountant.replacing, 1.0, 0.01, 10, 1e-5, caller="ed"))  # waited for already
    waiting.append(pool.submit(accountant.replacing, 1.0, 0.01, 20, 1e-5, caller="eve"))
    done(waiting)
    assert accountant._line == _Line()


def test_neither_one_caller_nor_all_together_take_all_threads_of_the_server() -> None:
    """Each takes at most half of what others have left: whoever comes next finds a place, and runs most of all."""
    line = _Line()

    def places(caller: str) -> int:
        taken = 0
        with contextlib.suppress(UnavailableError):
            for _ in range(PLACES + PLACES_FOR_RUNS):
                line.join(("the same", ()), caller)
                taken += 1
        return taken

    assert [places(f"engineer {number}") for number in range(7)] == [12, 6, 3, 1, 1, 1, 0]
    assert [places(f"run-{number:010x}") for number in range(9)] == [4, 2, 1, 1, 0, 0, 0, 0, 0]
    for number in range(100, 150):  # the authority itself is within a transaction
        line.join((str(number), ()), "")
    with pytest.raises(UnavailableError):
        line.join(("another", ()), "somebody else")


def test_different_requests_of_one_caller_are_few() -> None:
    line = _Line()
    for number in range(WAITING_OF_CALLER):
        line.join((str(number), ()), "ed")
    with pytest.raises(UnavailableError):
        line.join(("another", ()), "ed")
    line.join(("another", ()), "eve")


def test_a_transaction_waits_for_its_turn_only_as_long_as_others_wait_for_the_database(
    accountant: Accountant, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(accountant_module, "ITSELF_S", 0.2)
    accountant.warm()
    pid = accountant.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        slow = pool.submit(accountant.accounts, *SMALL, caller="ed")
        wait_for(lambda: served(accountant))
        with pytest.raises(UnavailableError):
            accountant.replacing(*SMALL[:4])
    finally:
        os.kill(pid, signal.SIGCONT)
    assert slow.result() == accounting.accounts(*SMALL)


def test_who_waits_is_told_that_the_authority_stops(accountant: Accountant, pool: ThreadPoolExecutor) -> None:
    accountant.warm()
    assert accountant.pid
    os.kill(accountant.pid, signal.SIGSTOP)
    waiting = [pool.submit(accountant.replacing, *SMALL[:2], steps, SMALL[3], caller="ed") for steps in (1, 2, 3)]
    wait_for(lambda: served(accountant) and queued(accountant, "ed") == 2)
    accountant.refuse_all()
    errors = [each.exception() for each in waiting]
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert [str(error) for error in errors].count("the authority is stopping") == 2
    assert accountant.accounts(*SMALL) == accounting.accounts(*SMALL)


def test_who_does_not_wait_any_more_is_forgotten() -> None:
    line = _Line()
    request = line.join(("1", ()), "ed")
    line.join(("1", ()), "eve")
    line.leave(request, "ed")
    assert line.next() is request
    line.leave(request, "eve")
    assert line == _Line()


# ---- deaths and limits ----


def test_a_death_fails_the_request_in_flight_and_no_other(accountant: Accountant, pool: ThreadPoolExecutor) -> None:
    accountant.warm()
    flying = pool.submit(accountant.accounts, *slow(), caller="ed")
    wait_for(lambda: served(accountant))
    waiting = pool.submit(accountant.accounts, *SMALL, caller="ed")
    wait_for(lambda: queued(accountant, "ed"))
    before = accountant.pid
    assert before
    os.kill(before, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="died"):
        flying.result()
    assert waiting.result().keys() == {"prv", "pld", "rdp"}
    assert accountant.pid != before


def test_a_death_while_nobody_asks_is_not_noticed(accountant: Accountant) -> None:
    accountant.warm()
    process = accountant._process
    assert process
    process.kill()
    process.wait()
    assert accountant.accounts(*SMALL).keys() == {"prv", "pld", "rdp"}


def test_what_takes_too_much_memory_is_refused(accountant: Accountant) -> None:
    accountant.warm()
    before = accountant.pid
    with pytest.raises(UnavailableError, match="more than the 2 GB of memory") as refused:
        accountant.accounts(*TOO_LARGE, caller="ed")
    assert "lower training.epochs" in refused.value.hint
    assert accountant.accounts(*SMALL, caller="ed").keys() == {"prv", "pld", "rdp"}
    assert accountant.pid not in (None, before)


def test_what_takes_too_long_is_refused(accountant: Accountant, monkeypatch: pytest.MonkeyPatch) -> None:
    accountant.warm()
    process = psutil.Process(accountant.pid)
    with monkeypatch.context() as patch:
        patch.setattr(accountant, "_limit_s", 0.1)
        with pytest.raises(UnavailableError, match=r"took more than 0\.1 s") as refused:
            accountant.accounts(*slow(), caller="ed")
    assert "lower training.epochs" in refused.value.hint
    assert not process.is_running()
    assert accountant.accounts(*SMALL).keys() == {"prv", "pld", "rdp"}


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    accountant = Accountant()
    monkeypatch.setattr(accountant_module, "MODULE", "cloister.no_such_module")
    for _ in range(2):
        with pytest.raises(UnavailableError, match="the process that accounts died"):
            accountant.warm()
        assert accountant.pid is None


def test_a_forked_copy_has_a_process_of_its_own(accountant: Accountant) -> None:
    accountant.warm()
    pid, known = accountant.pid, accountant.accounts(*SMALL)
    child = os.fork()
    if child == 0:
        try:
            same = accountant.accounts(*SMALL) == known and accountant.pid is None
            other = accountant.accounts(1.0, 0.01, 11, 1e-5, 1).keys() == known.keys() and accountant.pid != pid
            accountant.close()
            os._exit(0 if same and other else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert accountant.accounts(1.0, 0.01, 12, 1e-5, 1).keys() == known.keys()
    assert accountant.pid == pid


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": PATHS}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def done(waiting: list[Future[Any]]) -> list[Any]:
    return [each.result() for each in waiting]


def counted(accountant: Accountant, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, float]]:
    """What is computed from now on, and for how many steps."""
    original: Callable[[str, tuple[float, ...]], Any] = accountant._computed
    lock, computed = threading.Lock(), Counter[tuple[str, float]]()

    def computing(name: str, arguments: tuple[float, ...]) -> Any:
        with lock:
            computed[name, arguments[2]] += 1
        return original(name, arguments)

    monkeypatch.setattr(accountant, "_computed", computing)
    return computed
