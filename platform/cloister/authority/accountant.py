"""The authority's side of the process that accounts, `cloister.privacy.accountant_process`.

Guarantees: that process is started afresh, not forked: it has no key and no state of the authority. Its only
descriptors of the authority are two pipes, and over these it gets numbers only. One request is computed at a time.
Callers take turns: a turn is one request, and a caller's requests are computed in the order in which they came. The
authority itself goes before all callers. Equal requests are computed once, and results are remembered. A request that
takes too long or too much memory, or that ends the process, gets an `UnavailableError`. The next one gets a new
process.

Does not guarantee: that somebody who has several names gets one turn only; nor that who has gone away, and waits no
more, loses the turn.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import cloister
from cloister.canonical import canonical_json
from cloister.errors import CloisterError, InputError, UnavailableError
from cloister.process import clean_environment
from cloister.signing.keys import is_run_name

MODULE = "cloister.privacy.accountant_process"
LIMIT_S = 50.0  # of one request; the slowest that was measured takes 10 s on an idle machine. Clients wait for 60 s
START_S = 50.0  # its imports take two seconds there
ITSELF_S = 4.0  # that the authority waits for its turn: it may hold the database, for which others wait 5 s
WAITING_OF_CALLER = 4  # different requests
PLACES = 24  # of the server's 40 threads: who waits holds one. Equal requests too, such as of all workers of a run
PLACES_FOR_RUNS = 8  # beyond these, since what a run is given and charged must not wait for plans
REMEMBERED = 1024  # results of each kind
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR")
_MOST_BYTES = 1 << 16  # of an answer
_ITSELF = ""  # the caller that goes first
_log = logging.getLogger("cloister.authority")

Key = tuple[str, tuple[float, ...]]
Answer = dict[str, Any]


@dataclass(eq=False, slots=True)
class _Request:
    """What somebody waits for, and `answer` once it is there."""

    key: Key
    waiting: int = 0
    answer: Answer | None = None


@dataclass(slots=True)
class _Line:
    """The queues, one of each caller. Those whose turn it is come first."""

    requests: dict[Key, _Request] = field(default_factory=dict)
    queues: OrderedDict[str, deque[_Request]] = field(default_factory=OrderedDict)
    places: Counter[str] = field(default_factory=Counter)
    served: _Request | None = None

    def join(self, key: Key, caller: str) -> _Request:
        """Queue up. Whoever asks for what is computed or waits already gets that answer.

        Raises:
            UnavailableError: too many wait already.
        """
        mine, request = self.queues.get(caller, deque()), self.requests.get(key)
        there = request is not None and (request is self.served or request in mine)
        others = self.places.total() - self.places[_ITSELF] - self.places[caller]
        free = PLACES + (PLACES_FOR_RUNS if is_run_name(caller) else 0) - others
        # Half of what others have left, so that whoever comes next finds a place.
        if caller != _ITSELF and (
            self.places[caller] >= min(free, max(1, free // 2)) or (not there and len(mine) >= WAITING_OF_CALLER)
        ):
            raise UnavailableError("other plans are being computed", "try again in a few seconds")
        if request is None:
            request = self.requests[key] = _Request(key)
        if not there:
            mine.append(request)
            self.queues[caller] = mine
        self.places[caller] += 1
        request.waiting += 1
        return request

    def leave(self, request: _Request, caller: str) -> None:
        """The caller waits for it no more, with an answer or without."""
        self.places[caller] -= 1
        request.waiting -= 1
        if request.answer is None and not request.waiting:
            self.requests.pop(request.key, None)
            self._unqueue(request)

    def next(self) -> _Request | None:
        """Whose turn it is, if nobody is served."""
        if self.served is not None or not self.queues:
            return None
        return self.queues[self._turn()][0]

    def serve(self, request: _Request) -> None:
        """Take it out of all queues. The caller whose turn it was is the last one now."""
        self.served = request
        self.queues.move_to_end(self._turn())
        self._unqueue(request)

    def done(self, request: _Request, answer: Answer) -> None:
        """Tell it to all who wait for it."""
        request.answer = answer
        del self.requests[request.key]
        self.served = None

    def refuse(self, answer: Answer) -> None:
        """Tell it to all who wait for what is not computed yet."""
        for request in list(self.requests.values()):
            if request is not self.served:
                request.answer = answer
                del self.requests[request.key]
        self.queues.clear()

    def _turn(self) -> str:
        return _ITSELF if _ITSELF in self.queues else next(iter(self.queues))

    def _unqueue(self, request: _Request) -> None:
        for caller, queue in list(self.queues.items()):
            if request in queue:
                queue.remove(request)
            if not queue:
                del self.queues[caller]


class Accountant:
    """Plans and accounts. Its process starts when it is first needed, and again after it has died."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._remembered: dict[str, OrderedDict[tuple[float, ...], Any]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._line = _Line()
        self._owner = os.getpid()

    @property
    def pid(self) -> int | None:
        """Of its process, if that has been started."""
        process = self._process
        return process.pid if process else None

    def warm(self) -> None:
        """Start its process now, so that nobody waits for that later."""
        self._ask(_ITSELF, "ready")

    def plan(
        self, *, epsilon: float, delta: float, max_grad_norm: float, epochs: float, expected_batch_size: int, rows: int,
        rows_per_unit: int, redo_steps: int, evaluation_epsilon: float, caller: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """As `make_plan`, as a dictionary; for `caller`, or else for the authority itself.

        Raises:
            InputError: as `make_plan`.
            UnavailableError: others wait already; or it takes too long or too much memory.
        """
        found = self._ask(
            caller, "plan", epsilon, delta, max_grad_norm, epochs, expected_batch_size, rows, rows_per_unit,
            redo_steps, evaluation_epsilon,
        )  # fmt: skip
        return dict(found)

    def accounts(
        self, noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int,
        caller: str | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """As `accounting.accounts`, for `caller`. Raises as `plan`, and ValueError as that does."""
        found = self._ask(caller, "accounts", noise_multiplier, sample_rate, steps, delta, rows_per_unit)
        return {str(name): _number(value) for name, value in found.items()}

    def replacing(
        self, noise_multiplier: float, sample_rate: float, steps: int, delta: float, caller: str | None = None
    ) -> float:
        """As `accounting.replacing_epsilon`, for `caller`. Raises as `accounts`."""
        return _number(self._ask(caller, "replacing", noise_multiplier, sample_rate, steps, delta))

    def prv_of_unit(
        self, noise_multiplier: float, sample_rate: float, steps: int, delta: float, rows_per_unit: int, near: float,
        caller: str | None = None,
    ) -> float:  # fmt: skip
        """As `accounting.prv_of_unit`, for `caller`. Raises as `accounts`."""
        mechanism = noise_multiplier, sample_rate, steps, delta, rows_per_unit
        return _number(self._ask(caller, "prv_of_unit", *mechanism, near))

    def step(
        self, noise_multiplier: float, sample_rate: float, rows_per_unit: int, caller: str | None = None
    ) -> tuple[float, ...]:
        """As `renyi.step_of`, for `caller`. Raises as `accounts`."""
        return tuple(map(_number, self._ask(caller, "step", noise_multiplier, sample_rate, rows_per_unit)))

    def refuse_all(self) -> None:
        """Tell all who wait that the authority stops, and end the process."""
        with self._changed:
            self._line.refuse(_failure("the authority is stopping", "try again once it has started: cloister up"))
            self._changed.notify_all()
        self.close()

    def close(self) -> None:
        """End its process. The next request would start another."""
        if self._process is not None and os.getpid() == self._owner:
            self._end(self._process)

    # ---- who waits ----

    def _ask(self, caller: str | None, name: str, *arguments: float) -> Any:
        if os.getpid() != self._owner:
            self._leave_to_parent()
        asking = caller or _ITSELF
        with self._changed:
            known = self._remembered.setdefault(name, OrderedDict())
            if arguments in known:
                known.move_to_end(arguments)
                return known[arguments]
            request = self._line.join((name, arguments), asking)
            end = time.monotonic() + ITSELF_S
            try:
                while request.answer is None:
                    if self._line.next() is request:
                        self._answer(request)
                    elif not self._changed.wait(end - time.monotonic() if asking == _ITSELF else None):
                        raise UnavailableError("other plans are being computed", "try again in a few seconds")
            finally:
                self._line.leave(request, asking)
                self._changed.notify_all()
        return _told(request.answer)

    def _answer(self, request: _Request) -> None:
        """Have the process compute it, and tell all who wait for it. Meanwhile the lock is free."""
        name, arguments = request.key
        self._line.serve(request)
        answer = _failure("accounting was interrupted", "try again")
        self._changed.release()
        try:
            answer = self._computed(name, arguments)
        finally:
            self._changed.acquire()
            if "value" in answer and name != "ready":
                known = self._remembered[name]
                known[arguments] = answer["value"]
                if len(known) > REMEMBERED:
                    known.popitem(last=False)
            self._line.done(request, answer)
            self._changed.notify_all()

    # ---- the process ----

    def _computed(self, name: str, arguments: tuple[float, ...]) -> Answer:
        try:
            line = canonical_json({"ask": name, "with": list(arguments)}) + b"\n"
            process = self._started()
            with self._ended_by_failure(process):
                _write(process, line)
                answer = _read(process, self._limit_s)
                if answer.get("error", {}).get("kind") == "UnavailableError":  # it is good for nothing any more
                    self._end(process)
        except TimeoutError:
            _log.warning("the process that accounts was ended: %s took more than %g s", name, self._limit_s)
            return _failure(
                f"accounting for this took more than {self._limit_s:g} s",
                "lower training.epochs or raise training.expected_batch_size; or try again when less is going on",
            )
        except (OSError, ValueError) as error:
            _log.warning("the process that accounts has died at %s: %s", name, error)
            return _failure("the process that accounts died while it computed this", "try again in a few seconds")
        except CloisterError as error:
            return {"error": error.to_dict()}
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        """A process that is ready: the one that there is, or a new one."""
        if self._process is not None:
            if self._process.poll() is None:
                return self._process
            self._end(self._process)
        process = self._process = subprocess.Popen(
            # Without the current folder among those that modules come from.
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd="/",
            close_fds=True,
            process_group=0,  # Ctrl-C is the authority's
        )
        with self._ended_by_failure(process):
            try:
                reason = _read(process, START_S).get("error", {}).get("error")
            except TimeoutError:
                reason = f"it was not ready after {START_S:g} s"
            if reason:
                raise UnavailableError(f"the process that accounts does not start: {reason}", "try again in a minute")
        return process

    @contextlib.contextmanager
    def _ended_by_failure(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """End the process if the block fails: the next answer that comes of it might be another request's."""
        try:
            yield
        except BaseException:
            self._end(process)
            raise

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._process is process:
            self._process = None

    def _leave_to_parent(self) -> None:
        """This is a forked copy, without the threads that wait, and the process is the parent's."""
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process else ():
            if pipe is not None:
                pipe.close()
        self._changed, self._line, self._owner = threading.Condition(), _Line(), os.getpid()


def _environment() -> dict[str, str]:
    """No secret, nothing that leads to one, and the modules that this process has."""
    kept = {name: value for name, value in clean_environment().items() if name in _ENVIRONMENT}
    places = [str(Path(cloister.__file__).parents[1]), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    # One thread: accounting takes one core, and the memory that threads reserve is limited.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | threads | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, places)))}


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    requests = cast(IO[bytes], process.stdin)
    requests.write(line)
    requests.flush()


def _read(process: subprocess.Popen[bytes], limit_s: float) -> Answer:
    """Its next answer.

    Raises:
        TimeoutError: it has not come in time.
        OSError, ValueError: the process has died, or what it says is no answer.
    """
    answers = cast(IO[bytes], process.stdout).fileno()
    ready, end, said = select.poll(), time.monotonic() + limit_s, b""
    ready.register(answers, select.POLLIN)
    while not said.endswith(b"\n"):
        if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(answers, _MOST_BYTES)
        said += part
        if not part or len(said) > _MOST_BYTES:
            raise BrokenPipeError("its answer has no end" if said else "it answers nothing")
    answer = json.loads(said)
    if not isinstance(answer, dict) or not isinstance(answer.get("error", {}), dict):
        raise ValueError("its answer is none")
    return answer


def _failure(message: str, hint: str) -> Answer:
    return {"error": UnavailableError(message, hint).to_dict()}


def _told(answer: Answer) -> Any:
    """The value of an answer, or its error."""
    if "value" in answer:
        return answer["value"]
    error = answer.get("error", {})
    message, hint = str(error.get("error", "it said nothing")), str(error.get("hint", ""))
    if error.get("kind") == "ValueError":
        raise ValueError(message)
    raise (InputError if error.get("kind") == "InputError" else UnavailableError)(message, hint)


def _number(value: Any) -> float:
    """An epsilon; null is infinity.

    Raises:
        UnavailableError: it is none.
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UnavailableError("the process that accounts answered with no number", "report this")
    return float(value)


shared = Accountant()
"""The one of this process."""
atexit.register(shared.close)
