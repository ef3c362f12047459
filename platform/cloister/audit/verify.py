"""A whole log against its signed checkpoints.

Guarantees: when `verify_log` returns, the entries are exactly those under the last checkpoint, every earlier
checkpoint was true of the log when it was made, and the log extends the checkpoint that the verifier remembered.
An entry that was changed, dropped, added, moved or replaced makes it raise. Memory does not grow with the log.

Does not guarantee: that there is no other log. A key holder can rewrite everything and sign again; only a `trusted`
checkpoint, kept where that key holder cannot reach, tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cloister.audit import checkpoint, cosignature
from cloister.audit.checkpoint import Checkpoint
from cloister.audit.cosignature import WitnessKey
from cloister.audit.merkle import CompactTree
from cloister.errors import IntegrityError

_HINT = "keep a copy of the log and of both checkpoints, stop relying on it, and compare with a witness"


@dataclass(frozen=True, slots=True)
class Witnessed:
    """The most that a witness has cosigned: `size` entries, at `timestamp` (Unix time, seconds)."""

    witness: str
    size: int
    timestamp: int


@dataclass(frozen=True, slots=True)
class LogReport:
    """What was checked. `checkpoints_checked` counts the notes, without the trusted one."""

    size: int
    root_hex: str
    checkpoints_checked: int
    witnessed: tuple[Witnessed, ...] = ()


def verify_log(
    entries: Iterable[bytes],
    notes: Sequence[str],
    verify_key: bytes,
    origin: str,
    *,
    trusted: str | None = None,
    witnesses: Sequence[WitnessKey] = (),
) -> LogReport:
    """Check `entries`, in log order, against signed `notes`, oldest first; the last note covers every entry.

    1. Every note is signed by `verify_key`, is about `origin`, and is no smaller than the one before it.
    2. The entries are as many as the last note says.
    3. At the size of each note, and of the trusted one, the recomputed root equals the signed root.
    4. Each of `witnesses` has cosigned one of the notes; no line that claims to be theirs is false.

    Raises:
        IntegrityError: one of these fails. The message says which, and `rollback` or `fork` where that is what it is.
    """
    if not notes:
        raise IntegrityError("a log without a signed checkpoint proves nothing", "make a checkpoint first")
    # 1.
    signed = [checkpoint.verify(note, verify_key, origin) for note in notes]
    if any(later.size < earlier.size for earlier, later in pairwise(signed)):
        raise IntegrityError("rollback: a later checkpoint is smaller than an earlier one", _HINT)
    final = signed[-1]
    remembered = checkpoint.verify(trusted, verify_key, origin) if trusted is not None else None
    if remembered is not None and remembered.size > final.size:
        raise IntegrityError(f"rollback: {remembered.size} entries were signed, now there are {final.size}", _HINT)

    witnessed = tuple(_witnessed(key, notes, signed) for key in witnesses)  # 4.
    roots = _roots_at({known.size for known in [*signed, *([remembered] if remembered else [])]}, entries, final)
    # 3.
    if remembered is not None and roots[remembered.size] != remembered.root:
        raise IntegrityError(f"fork: the first {remembered.size} entries are not those that were trusted", _HINT)
    for known in signed:
        if roots[known.size] != known.root:
            raise IntegrityError(f"the first {known.size} entries do not match the checkpoint over them", _HINT)
    return LogReport(size=final.size, root_hex=final.root.hex(), checkpoints_checked=len(signed), witnessed=witnessed)


def _witnessed(key: WitnessKey, notes: Sequence[str], signed: Sequence[Checkpoint]) -> Witnessed:
    found = [
        Witnessed(one.witness, known.size, one.timestamp)
        for note, known in zip(notes, signed, strict=True)
        for one in cosignature.cosigned(note, [key])
    ]
    if not found:
        raise IntegrityError(f"no checkpoint is cosigned by {key.name}", "ask that witness what it has seen")
    return max(found, key=lambda one: (one.size, one.timestamp))


def _roots_at(sizes: set[int], entries: Iterable[bytes], final: Checkpoint) -> dict[int, bytes]:
    """The recomputed root at each of `sizes`; reads the entries once."""
    tree = CompactTree()
    roots = {0: tree.root()}
    size = 0
    for entry in entries:
        if size == final.size:
            raise IntegrityError(f"there are more entries than the {final.size} of the last checkpoint", _HINT)
        tree.append(entry)
        size += 1
        if size in sizes:
            roots[size] = tree.root()
    # 2.
    if size != final.size:
        raise IntegrityError(f"the log is cut: {final.size} entries were signed, {size} are here", _HINT)
    return roots
