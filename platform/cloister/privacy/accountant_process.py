"""The process that accounts: `python -m cloister.privacy.accountant_process`, a child of an authority.

Guarantees: it is given numbers and answers with numbers. It imports no part of the authority and opens no state of it.
It ends when its standard input ends, also while it computes. It leaves no core file. It takes at most `HEADROOM_BYTES`
of memory beyond what it takes after its imports. It has a lower priority than the process that started it.

Requests and answers are lines of canonical JSON. A request is `{"ask": NAME, "with": [NUMBER, …]}`, and an answer
`{"value": …}` or `{"error": …}`, where null stands for infinity. The first line is an answer to no request: it says
that the process is ready, or why it is not. `authority/accountant.py` is the other side.

Does not guarantee: safety from somebody who takes the process over. It runs as the authority's user, and the authority
believes its answers.
"""

from __future__ import annotations

import json
import math
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from cloister.canonical import canonical_json
from cloister.errors import CloisterError, UnavailableError
from cloister.privacy import accounting, renyi
from cloister.privacy.plan import make_plan

HEADROOM_BYTES = 2 << 30  # the largest of all measured plans took 0.3 GB
NICER = 5
_PLAN = {
    "epsilon": float, "delta": float, "max_grad_norm": float, "epochs": float, "expected_batch_size": int, "rows": int,
    "rows_per_unit": int, "redo_steps": int, "evaluation_epsilon": float,
}  # fmt: skip
_MECHANISM = (float, float, int, float)


def _plan(*fields: Any) -> dict[str, Any]:
    return make_plan(**dict(zip(_PLAN, fields, strict=True))).to_dict()


def _ready() -> None:
    """Nothing: whoever has an answer knows that the process is ready."""


# What may be asked, and the types of its arguments: JSON has one kind of number.
_ASKED: Mapping[str, tuple[Callable[..., Any], tuple[Callable[[Any], Any], ...]]] = {
    "ready": (_ready, ()),
    "plan": (_plan, tuple(_PLAN.values())),
    "accounts": (accounting.accounts, (*_MECHANISM, int)),
    "replacing": (accounting.replacing_epsilon, _MECHANISM),
    "prv_of_unit": (accounting.prv_of_unit, (*_MECHANISM, int, float)),
    "step": (renyi.step_of, (float, float, int)),
}


def main() -> int:
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICER)
    answers = os.dup(1)
    os.dup2(2, 1)  # a library that prints must not write into the answers
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    try:
        accounting.warm()
        _limit_memory()
    except Exception as error:  # noqa: BLE001  (whatever it is, the authority has to hear of it)
        _write(answers, _unexpected(error))
        return 1
    _write(answers, {"value": None})
    while True:
        _write(answers, _answer_to(requests.get()))


def _answer_to(line: bytes) -> dict[str, Any]:
    """The answer to one request. After an `UnavailableError` nobody asks this process again, and it is ended."""
    try:
        request = json.loads(line)
        function, types = _ASKED[request["ask"]]
        arguments = [kind(value) for kind, value in zip(types, request["with"], strict=True)]
        value = _without_infinity(function(*arguments))
        canonical_json(value)
    except CloisterError as error:
        return {"error": error.to_dict()}
    except ValueError as error:
        return {"error": {"kind": "ValueError", "error": str(error)[:1000]}}
    except MemoryError:
        refused = UnavailableError(
            f"accounting for this takes more than the {HEADROOM_BYTES >> 30} GB of memory that it may take",
            "lower training.epochs, or the rows of a unit",
        )
        return {"error": refused.to_dict()}
    except Exception as error:  # noqa: BLE001  (a fault, which must not end this process without a word)
        return _unexpected(error)
    return {"value": value}


def _unexpected(error: Exception) -> dict[str, Any]:
    name = type(error).__name__
    return {"error": UnavailableError(f"accounting was stopped by an unexpected {name}", "report this").to_dict()}


def _without_infinity(value: Any) -> Any:
    """With null in place of an infinity, or of what is no number, which is taken for one."""
    if isinstance(value, dict):
        return {name: _without_infinity(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_without_infinity(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(requests: queue.SimpleQueue[bytes]) -> None:
    """Take requests in. A thread of its own, since whoever computes would not notice that the authority has died."""
    with os.fdopen(0, "rb") as lines:
        for line in lines:
            requests.put(line)
    os._exit(0)


def _write(answers: int, answer: Mapping[str, Any]) -> None:
    try:
        left = memoryview(canonical_json(answer) + b"\n")
        while left:
            left = left[os.write(answers, left) :]
    except BrokenPipeError:
        os._exit(0)


def _limit_memory() -> None:
    """From here on. Imports take much more with one build of torch than with another."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  (no library that may itself take memory)
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM_BYTES, taken + HEADROOM_BYTES))


if __name__ == "__main__":
    sys.exit(main())
