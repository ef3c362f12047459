"""Faults at the write-like system calls of a process: the n-th one fails, or the process is killed before it.

The kernel itself asks us about each such call (seccomp user notification, seccomp_unotify(2)), so the calls of SQLite,
of Arrow and of every thread count as those of Python do. Calls on files outside of the watched folders are not counted.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pickle
import platform
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Mode = Literal["kill", "EIO", "ENOSPC"]
MODES: tuple[Mode, ...] = ("kill", "EIO", "ENOSPC")

# Numbers of the calls, by machine (asm/unistd.h), and where each names its file: a descriptor, or paths.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "write": 1, "pwrite64": 18, "writev": 20, "pwritev": 296, "pwritev2": 328, "sendfile": 40,
            "copy_file_range": 326, "fsync": 74, "fdatasync": 75, "sync_file_range": 277, "ftruncate": 77,
            "truncate": 76, "fallocate": 285, "rename": 82, "renameat": 264, "renameat2": 316, "link": 86,
            "linkat": 265, "symlink": 88, "symlinkat": 266, "unlink": 87, "unlinkat": 263, "rmdir": 84, "mkdir": 83,
            "mkdirat": 258, "creat": 85, "open": 2, "openat": 257,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "write": 64, "pwrite64": 68, "writev": 66, "pwritev": 70, "pwritev2": 287, "sendfile": 71,
            "copy_file_range": 285, "fsync": 82, "fdatasync": 83, "sync_file_range": 84, "ftruncate": 46,
            "truncate": 45, "fallocate": 47, "renameat": 38, "renameat2": 276, "linkat": 37, "symlinkat": 36,
            "unlinkat": 35, "mkdirat": 34, "openat": 56,
        },
    ),
}  # fmt: skip
_PATH_ARGUMENT = {
    "truncate": 0, "rename": 1, "renameat": 3, "renameat2": 3, "link": 1, "linkat": 3, "symlink": 1, "symlinkat": 2,
    "unlink": 0, "unlinkat": 1, "rmdir": 0, "mkdir": 0, "mkdirat": 1, "creat": 0, "open": 0, "openat": 1,
}  # fmt: skip
_DESCRIPTOR_ARGUMENT = {"copy_file_range": 2}  # else the first
_FLAGS_ARGUMENT = {"open": 1, "openat": 2}
_MAKES_ROOM = frozenset({"unlink", "unlinkat", "rmdir", "ftruncate", "truncate"})  # what a full disk does not refuse
_RANDOM = re.compile(r"[0-9a-f]{12,}|\\d+|(train|holdout)[^/]*")
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# linux/seccomp.h, linux/prctl.h, linux/bpf_common.h
_PR_SET_NO_NEW_PRIVS, _SECCOMP = 38, {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
_ALL_THREADS, _NEW_LISTENER = 1 << 0 | 1 << 4, 1 << 3
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06


@dataclass
class Outcome:
    """What became of one process: `calls` that were counted, whether the fault was `hit`, and what it answered."""

    calls: list[str] = field(default_factory=list)
    hit: str = ""
    answer: Any = None
    """What the operation returned, or the exception; None where it was killed."""
    killed: bool = False


def usable() -> bool:
    """Whether this machine's kernel asks, and lets us answer."""
    try:
        return platform.machine() in _CALLS and in_child(lambda _: 1, watched=[]).answer == 1
    except OSError:
        return False


def in_child(
    operation: Callable[[Any], Any], *, watched: Sequence[Path], mode: Mode = "kill", at: int = 0,
    setup: Callable[[], Any] = lambda: None, timeout_s: float = 300,
) -> Outcome:  # fmt: skip
    """Run `operation` in a forked process whose `at`-th write below `watched` (from 1; 0: none) meets a fault.

    `EIO` fails this one call, `ENOSPC` this one and every later one that needs room, `kill` is `kill -9` before it.
    `setup` runs in that process before, without faults; `operation` gets what it returned.
    """
    ours, theirs = socket.socketpair()
    inbox, outbox = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(inbox)
            ours.close()
            ready = setup()
            listener = _listen()
            socket.send_fds(theirs, [b"!"], [listener])
            os.close(listener)
            os.write(outbox, pickle.dumps(_answer(operation, ready)))
        finally:
            os._exit(0)
    theirs.close()
    os.close(outbox)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    outcome = Outcome()
    with ours, os.fdopen(inbox, "rb") as pipe:
        try:
            if descriptors:
                watch = [f"{path.resolve()}/" for path in watched]
                said = _supervise(child, descriptors[0], pipe.fileno(), watch, mode, at, outcome, timeout_s)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            if not descriptors:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    if not descriptors:
        raise OSError(errno.ENOSYS, "this kernel does not notify of system calls")
    outcome.killed = os.WIFSIGNALED(status)
    outcome.answer = pickle.loads(said) if said else None  # noqa: S301  (our own process's)
    return outcome


def _answer(operation: Callable[[Any], Any], ready: Any) -> Any:
    try:
        return operation(ready)
    except Exception as error:  # noqa: BLE001  (what it is, the parent judges)
        return error


# ---- in the child ----


def _listen() -> int:
    """Put this process under supervision, for good; returns the descriptor that is told of its calls."""
    arch, calls = _CALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    program = _program(arch, calls)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    listener = libc.syscall(_SECCOMP[platform.machine()], _SET_MODE_FILTER, _ALL_THREADS | _NEW_LISTENER, header)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _program(arch: int, calls: dict[str, int]) -> bytes:
    """Classic BPF: notify of these calls, of those that open only if it is for writing, and allow all others."""

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    number, machine, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    steps = [step(_LOAD, machine), step(_IF_EQUAL, arch, 1, 0), step(_RETURN, _ALLOW), step(_LOAD, number)]
    for name, call in calls.items():
        if name in _FLAGS_ARGUMENT:
            steps += [
                step(_IF_EQUAL, call, 0, 4), step(_LOAD, first_argument + 8 * _FLAGS_ARGUMENT[name]),
                step(_IF_ANY_BIT, _TO_WRITE, 0, 1), step(_RETURN, _NOTIFY), step(_RETURN, _ALLOW),
            ]  # fmt: skip
        else:
            steps += [step(_IF_EQUAL, call, 0, 1), step(_RETURN, _NOTIFY)]
    return b"".join([*steps, step(_RETURN, _ALLOW)])


# ---- in the parent ----


def _supervise(
    child: int, listener: int, pipe: int, watched: list[str], mode: Mode, at: int, outcome: Outcome, timeout_s: float
) -> bytes:
    """Answer the kernel's questions until the process is gone; returns what it said."""
    names = {number: name for name, number in _CALLS[platform.machine()][1].items()}
    said, deadline = b"", time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pipe, select.POLLIN)
    open_pipe = True
    while open_pipe:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"it hung at call {len(outcome.calls)}, {outcome.calls[-1:]}")
        for descriptor, event in poll.poll(1000):
            if descriptor == pipe:
                part = os.read(pipe, 1 << 16)
                said, open_pipe = said + part, bool(part)
            elif event & select.POLLIN:
                _one_call(child, listener, names, watched, mode, at, outcome)
            else:
                poll.unregister(listener)  # everybody who was supervised is gone
    return said


def _one_call(
    child: int, listener: int, names: dict[int, str], watched: list[str], mode: Mode, at: int, outcome: Outcome
) -> None:
    question = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, question)
    except FileNotFoundError:  # whoever asked is gone
        return
    key, process, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", question)
    name = names[number]
    place = _place(process, name, arguments)
    refused = 0
    if any(place.startswith(folder) for folder in watched):
        outcome.calls.append(f"{name} {place}")
        count = len(outcome.calls)
        if at and count == at:
            outcome.hit = outcome.calls[-1]
            if mode == "kill":
                os.kill(child, signal.SIGKILL)
                return
            refused = errno.EIO if mode == "EIO" else errno.ENOSPC
        elif at and count > at and mode == "ENOSPC":
            refused = errno.ENOSPC
        if refused == errno.ENOSPC and name in _MAKES_ROOM:
            refused = 0
    answer = struct.pack("QqiI", key, 0, -refused, 0 if refused else _CONTINUE)
    try:
        fcntl.ioctl(listener, _SEND, bytearray(answer))
    except FileNotFoundError:
        return


def _place(process: int, name: str, arguments: list[int]) -> str:
    """The file that a call is about; empty where it is none."""
    try:
        if name not in _PATH_ARGUMENT:
            return str(Path(f"/proc/{process}/fd/{arguments[_DESCRIPTOR_ARGUMENT.get(name, 0)]}").readlink())
        index = _PATH_ARGUMENT[name]
        with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
            memory.seek(arguments[index])
            path = os.fsdecode(memory.read(4096).split(b"\0")[0])
        at = index - 1 if name.endswith(("at", "at2")) else -1  # the descriptor of the folder that it is in
        if not path.startswith("/"):
            folder = arguments[at] & 0xFFFFFFFF if at >= 0 else 0
            here = f"fd/{folder}" if at >= 0 and folder < 1 << 31 else "cwd"
            path = f"{Path(f'/proc/{process}/{here}').readlink()}/{path}"
        return os.path.normpath(path)
    except (OSError, ValueError):
        return ""


def sites(calls: Sequence[str]) -> dict[str, list[int]]:
    """The numbers (from 1) of the calls that do the same to the same kind of file, whatever the file's own name is."""
    found: dict[str, list[int]] = {}
    for number, call in enumerate(calls, start=1):
        found.setdefault(_RANDOM.sub("*", call), []).append(number)
    return found
