"""Whoever holds the log's database, or even its signing key, tries to change what it says."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from nacl.signing import SigningKey

from cloister.audit import checkpoint, export
from cloister.audit.cosignature import WitnessKey, cosign
from cloister.audit.event import Event
from cloister.audit.merkle import CompactTree
from cloister.audit.verify import LogReport, Witnessed, verify_log
from cloister.errors import InputError, IntegrityError

WITNESS_KEY = SigningKey(b"\x07" * 32)
WITNESS = WitnessKey("witness.example", bytes(WITNESS_KEY.verify_key))
KEY = SigningKey(bytes(32))
PUBLIC = bytes(KEY.verify_key)
ORIGIN = "cloister.example/log"


def entry(index: int) -> bytes:
    return Event(
        time=f"2026-11-22T09:30:{index:02d}.000Z",
        actor="ada",
        action="lease.grant",
        resource="adult@1",
        outcome="success",
        details={"step": index},
    ).to_bytes()


def note_over(entries: Sequence[bytes], key: SigningKey = KEY, origin: str = ORIGIN) -> str:
    tree = CompactTree()
    for one in entries:
        tree.append(one)
    return checkpoint.sign(checkpoint.Checkpoint(origin, tree.size, tree.root()), key, origin)


LOG = [entry(index) for index in range(11)]
NOTES = [note_over(LOG[:size]) for size in (0, 1, 4, 7, 11)]


def check(entries: Sequence[bytes], notes: Sequence[str] = NOTES, trusted: str | None = None) -> LogReport:
    return verify_log(iter(entries), notes, PUBLIC, ORIGIN, trusted=trusted)


def refuse(
    entries: Sequence[bytes], notes: Sequence[str] = NOTES, trusted: str | None = None, word: str | None = None
) -> None:
    with pytest.raises(IntegrityError, match=word):
        check(entries, notes, trusted)


def test_an_honest_log_verifies_with_and_without_memory() -> None:
    report = check(LOG)
    assert (report.size, report.checkpoints_checked) == (11, 5)
    assert bytes.fromhex(report.root_hex) == checkpoint.verify(NOTES[-1], PUBLIC, ORIGIN).root
    for remembered in [*NOTES, note_over(LOG[:5])]:
        assert check(LOG, trusted=remembered) == report
    assert check([], [note_over([])]).size == 0


def test_every_flipped_bit_of_every_entry_is_refused() -> None:
    for index in (0, 3, 10):
        for bit in range(len(LOG[index]) * 8):
            changed = bytearray(LOG[index])
            changed[bit // 8] ^= 1 << bit % 8
            refuse([*LOG[:index], bytes(changed), *LOG[index + 1 :]])


def test_a_deleted_entry_is_refused() -> None:
    for index in range(len(LOG)):
        refuse(LOG[:index] + LOG[index + 1 :], word="cut")


def test_a_replaced_or_repeated_entry_is_refused() -> None:
    for index in range(len(LOG)):
        refuse([*LOG[:index], entry(50), *LOG[index + 1 :]])
        refuse([*LOG[:index], LOG[index - 1], *LOG[index + 1 :]])


def test_reordered_entries_are_refused() -> None:
    for index in range(len(LOG) - 1):
        refuse([*LOG[:index], LOG[index + 1], LOG[index], *LOG[index + 2 :]])
    refuse(LOG[::-1])


def test_an_added_or_spliced_entry_is_refused() -> None:
    for index in range(len(LOG) + 1):
        refuse([*LOG[:index], entry(50), *LOG[index:]], word="more entries")
    refuse([*LOG[:4], *LOG[7:]], word="cut")
    # Two entries run together, and one cut in two.
    refuse([*LOG[:2], LOG[2] + LOG[3], *LOG[4:]])
    refuse([*LOG[:2], LOG[2][:9], LOG[2][9:], *LOG[3:]])


def test_a_truncated_log_is_refused() -> None:
    for size in range(len(LOG)):
        refuse(LOG[:size], word="cut")


def test_an_entry_that_no_checkpoint_covers_yet_is_refused() -> None:
    refuse([*LOG, entry(11)], word="more entries")


def test_a_log_cut_back_together_with_its_checkpoints_is_a_rollback() -> None:
    assert check(LOG[:7], NOTES[:4]).size == 7  # nobody who remembers nothing can tell
    refuse(LOG[:7], NOTES[:4], trusted=NOTES[-1], word="rollback")


def test_a_log_rewritten_and_signed_again_by_the_key_holder_is_a_fork() -> None:
    for at in range(4):
        rewritten = [*LOG[:at], entry(50), *LOG[at + 1 :]]
        notes = [note_over(rewritten[:size]) for size in (0, 1, 4, 7, 11)]
        assert check(rewritten, notes).size == 11  # nobody who remembers nothing can tell
        refuse(rewritten, notes, trusted=NOTES[2], word="fork")
        refuse(rewritten, notes, trusted=NOTES[-1], word="fork")
        refuse(rewritten, [*NOTES[:-1], notes[-1]], word="do not match")


def test_two_checkpoints_of_one_size_that_differ_are_refused() -> None:
    other = note_over([*LOG[:10], entry(50)])
    refuse(LOG, [*NOTES, other])
    refuse(LOG, [*NOTES[:-1], other, NOTES[-1]])
    refuse(LOG, trusted=other, word="fork")


def test_checkpoints_out_of_order_are_refused() -> None:
    refuse(LOG, NOTES[::-1], word="rollback")
    refuse(LOG[:7], [*NOTES, NOTES[3]], word="rollback")


def test_checkpoints_of_another_key_or_another_log_are_refused() -> None:
    stranger = SigningKey(b"\x01" * 32)
    for bad in (note_over(LOG, stranger), note_over(LOG, origin="other.example/log"), "", "junk"):
        refuse(LOG, [*NOTES, bad])
        refuse(LOG, trusted=bad)


def test_a_log_that_no_witness_has_seen_is_told_from_one_that_it_has() -> None:
    text = checkpoint.split(NOTES[3])[0]
    seen = NOTES[3] + cosign(text, WITNESS_KEY, WITNESS.name, 1_795_339_800)
    report = verify_log(iter(LOG), [*NOTES[:3], seen, NOTES[4]], PUBLIC, ORIGIN, witnesses=[WITNESS])
    assert report.witnessed == (Witnessed("witness.example", 7, 1_795_339_800),)
    with pytest.raises(IntegrityError, match="cosigned"):
        verify_log(iter(LOG), NOTES, PUBLIC, ORIGIN, witnesses=[WITNESS])
    stolen = NOTES[4] + seen.removeprefix(NOTES[3])  # the line of another checkpoint
    with pytest.raises(IntegrityError, match="does not hold"):
        verify_log(iter(LOG), [stolen], PUBLIC, ORIGIN, witnesses=[WITNESS])


# ---- the same log as a file ----

SHORT, SHORT_NOTES = LOG[:4], NOTES[1:3]
EXPORT = export.Header(checkpoint.verifier_key_text(ORIGIN, PUBLIC), SHORT_NOTES).to_line() + b"".join(
    one + b"\n" for one in SHORT
)


def check_file(data: bytes) -> LogReport:
    header, entries = export.open_export(io.BytesIO(data))
    if header.verifier_key != checkpoint.verifier_key_text(ORIGIN, PUBLIC):
        raise IntegrityError("another log's key")  # as the command line finds
    return export.verify_export(header, entries)


def refuse_file(data: bytes) -> None:
    with pytest.raises((IntegrityError, InputError)):
        check_file(data)


def test_an_honest_file_verifies() -> None:
    assert check_file(EXPORT) == check(SHORT, SHORT_NOTES)
    assert EXPORT.count(b"\n") == len(SHORT) + 1


def test_every_flipped_bit_of_a_file_is_refused() -> None:
    for bit in range(len(EXPORT) * 8):
        changed = bytearray(EXPORT)
        changed[bit // 8] ^= 1 << bit % 8
        refuse_file(bytes(changed))


def test_a_file_that_is_cut_anywhere_is_refused() -> None:
    for size in range(len(EXPORT)):
        refuse_file(EXPORT[:size])


def test_lines_that_are_dropped_repeated_swapped_or_added_are_refused() -> None:
    lines = EXPORT.splitlines(keepends=True)
    for index in range(len(lines)):
        refuse_file(b"".join(lines[:index] + lines[index + 1 :]))
        refuse_file(b"".join([*lines[: index + 1], *lines[index:]]))
        refuse_file(b"".join([*lines[:index], b"\n", *lines[index:]]))
        if index:
            refuse_file(b"".join([*lines[: index - 1], lines[index], lines[index - 1], *lines[index + 1 :]]))
    refuse_file(EXPORT + b"\n")
    refuse_file(EXPORT + b"x")
    refuse_file(EXPORT[:-1] + b"x" * export.MAX_ENTRY_BYTES + b"\n")
    refuse_file(EXPORT.replace(b"\n", b"\r\n"))


def test_a_log_without_a_checkpoint_is_refused() -> None:
    refuse(LOG, [])
    refuse([], [])
