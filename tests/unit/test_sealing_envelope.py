from __future__ import annotations

import pytest

from cloister.errors import InputError, IntegrityError
from cloister.sealing import envelope


def test_a_wrapped_key_opens_under_the_same_key_and_data() -> None:
    kek, key = envelope.new_key(), envelope.new_key()
    wrapped = envelope.wrap_key(kek, key, b"adult@1/restricted/0")
    assert len(wrapped) == envelope.WRAPPED_BYTES
    assert key not in wrapped
    assert envelope.unwrap_key(kek, wrapped, b"adult@1/restricted/0") == key


def test_two_wraps_of_one_key_differ() -> None:
    kek, key = envelope.new_key(), envelope.new_key()
    assert envelope.wrap_key(kek, key, b"x") != envelope.wrap_key(kek, key, b"x")


@pytest.mark.parametrize("other", [b"", b"adult@1/restricted/1", b"adult@1/restricted/0\x00"])
def test_a_wrapped_key_that_was_moved_is_refused(other: bytes) -> None:
    kek = envelope.new_key()
    wrapped = envelope.wrap_key(kek, envelope.new_key(), b"adult@1/restricted/0")
    with pytest.raises(IntegrityError):
        envelope.unwrap_key(kek, wrapped, other)


def test_another_key_encryption_key_is_refused() -> None:
    wrapped = envelope.wrap_key(envelope.new_key(), envelope.new_key(), b"x")
    with pytest.raises(IntegrityError):
        envelope.unwrap_key(envelope.new_key(), wrapped, b"x")


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    kek = envelope.new_key()
    wrapped = envelope.wrap_key(kek, envelope.new_key(), b"x")
    for bit in range(len(wrapped) * 8):
        changed = bytearray(wrapped)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            envelope.unwrap_key(kek, bytes(changed), b"x")
    for size in range(len(wrapped)):
        with pytest.raises(IntegrityError):
            envelope.unwrap_key(kek, wrapped[:size], b"x")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_keys_of_another_length_are_refused(size: int) -> None:
    good, bad = envelope.new_key(), bytes(size)
    with pytest.raises(InputError):
        envelope.wrap_key(bad, good, b"")
    with pytest.raises(InputError):
        envelope.wrap_key(good, bad, b"")
    with pytest.raises(InputError):
        envelope.unwrap_key(bad, envelope.wrap_key(good, good, b""), b"")
