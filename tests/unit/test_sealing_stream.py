from __future__ import annotations

import os

import pytest

from cloister.errors import InputError, IntegrityError
from cloister.sealing import stream
from cloister.sealing.envelope import new_key

CONTEXT = {"kind": "model", "name": "income@1"}
CHUNK = stream.CHUNK_BYTES


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_every_size_comes_back(size: int) -> None:
    key, plaintext = new_key(), bytes(index % 251 for index in range(min(size, 1000))) * (size // 1000 + 1)
    plaintext = plaintext[:size]
    sealed = stream.seal(key, plaintext, CONTEXT)
    assert stream.plaintext_bytes(sealed) == size
    assert len(sealed) == stream.HEADER_BYTES + size + stream.TAG_BYTES * max(1, -(-size // CHUNK))
    assert stream.open_sealed(key, sealed, CONTEXT) == plaintext
    assert stream.open_sealed(key, memoryview(bytearray(sealed)), CONTEXT) == plaintext


def test_one_key_seals_twice_without_repeating_itself() -> None:
    key = new_key()
    first, second = stream.seal(key, b"same", CONTEXT), stream.seal(key, b"same", CONTEXT)
    assert first[stream.HEADER_BYTES :] != second[stream.HEADER_BYTES :]


def test_a_buffer_is_reused_and_its_rest_left_alone() -> None:
    key, buffer = new_key(), bytearray(b"\xaa" * 100)
    assert stream.open_into(key, stream.seal(key, b"first", CONTEXT), CONTEXT, buffer) == 5
    assert stream.open_into(key, stream.seal(key, b"2nd", CONTEXT), CONTEXT, buffer) == 3
    assert bytes(buffer[:5]) == b"2ndst"
    assert bytes(buffer[5:]) == b"\xaa" * 95


def test_a_small_buffer_is_refused_untouched() -> None:
    key, buffer = new_key(), bytearray(b"\xaa" * 4)
    with pytest.raises(InputError):
        stream.open_into(key, stream.seal(key, b"12345", CONTEXT), CONTEXT, buffer)
    assert bytes(buffer) == b"\xaa" * 4


def test_the_order_of_the_context_does_not_matter() -> None:
    key = new_key()
    sealed = stream.seal(key, b"x", {"a": "1", "b": "2"})
    assert stream.open_sealed(key, sealed, {"b": "2", "a": "1"}) == b"x"


@pytest.mark.parametrize("context", [{"a": 1}, {1: "a"}, {"a": None}, {"a": ["b"]}])
def test_a_context_that_is_not_text_is_refused(context: dict[str, str]) -> None:
    with pytest.raises(InputError):
        stream.seal(new_key(), b"x", context)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_keys_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(InputError):
        stream.seal(bytes(size), b"x", CONTEXT)
    with pytest.raises(InputError):
        stream.open_sealed(bytes(size), stream.seal(new_key(), b"x", CONTEXT), CONTEXT)


@pytest.mark.parametrize("junk", [b"", b"C", b"CLSTREAM", b"CLSTREAM\x01", b"PAR1" * 20, b"CLSTREAM\x02" + bytes(80)])
def test_what_is_not_a_sealed_file_is_refused(junk: bytes) -> None:
    with pytest.raises(IntegrityError):
        stream.open_sealed(new_key(), junk, CONTEXT)


SIZES = [0, 1, stream.CHUNK_BYTES - 1, stream.CHUNK_BYTES, stream.CHUNK_BYTES + 1, 3 * stream.CHUNK_BYTES]


def in_pieces(data: bytes, bytes_each: int) -> list[bytes]:
    return [data[start : start + bytes_each] for start in range(0, len(data), bytes_each)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [100_003, 5 * stream.CHUNK_BYTES])
def test_in_pieces_it_is_the_same_format(size: int, piece: int) -> None:
    key, plaintext = new_key(), os.urandom(size)
    writer = stream.SealingStream(key, CONTEXT)
    sealed = b"".join(map(writer.update, in_pieces(plaintext, piece))) + writer.finish()
    assert stream.open_sealed(key, sealed, CONTEXT) == plaintext
    reader = stream.OpeningStream(key, CONTEXT)
    whole = stream.seal(key, plaintext, CONTEXT)
    assert b"".join(map(reader.update, in_pieces(whole, piece))) + reader.finish() == plaintext


def test_in_pieces_nothing_that_was_changed_cut_or_extended_opens() -> None:
    key = new_key()
    sealed = stream.seal(key, bytes(2 * stream.CHUNK_BYTES + 5), CONTEXT)
    middle = len(sealed) // 2
    flipped = bytes([*sealed[:middle], sealed[middle] ^ 1, *sealed[middle + 1 :]])
    chunk = stream.CHUNK_BYTES + stream.TAG_BYTES
    header = stream.HEADER_BYTES
    swapped = sealed[:header] + sealed[header + chunk : header + 2 * chunk] + sealed[header : header + chunk]
    cuts = [sealed[:end] for end in (0, 5, header, header + 3, header + chunk, header + 2 * chunk, len(sealed) - 1)]
    for broken in (flipped, swapped + sealed[header + 2 * chunk :], sealed + b"x", *cuts):
        reader = stream.OpeningStream(key, CONTEXT)
        with pytest.raises(IntegrityError):
            [*map(reader.update, in_pieces(broken, 999_999)), reader.finish()]
    reader = stream.OpeningStream(key, {"kind": "another"})
    with pytest.raises(IntegrityError):
        reader.update(sealed)
