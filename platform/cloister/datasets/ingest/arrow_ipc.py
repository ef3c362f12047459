"""Arrow IPC: streams, and files (Feather version 2), which are a stream between two marks.

Guarantees: each message's metadata, body and decompressed size is bounded before Arrow sees it. A file is read as the
stream that it holds and its footer is left alone, so that what was checked is what is decoded.
Source: Arrow columnar format, "Serialization and Interprocess Communication"; FlatBuffers internals.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.ipc

from cloister.datasets.ingest.blocks import Storer, check_arrow_schema
from cloister.datasets.ingest.limits import MAX_DECODED_BYTES, MAX_FOOTER_BYTES
from cloister.datasets.schema import DatasetSchema
from cloister.errors import InputError

FILE_MARK = b"ARROW1\0\0"
_CONTINUATION = b"\xff\xff\xff\xff"
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)


def arrow_tables(
    stream: BinaryIO, size: int, schema: DatasetSchema, block_bytes: int, advance: Callable[[int], None]
) -> Iterator[pa.Table]:
    """The stream's rows as stored tables. `advance` is told how many bytes of the file are done.

    Raises:
        InputError: the stream, or a row of it, does not fit the schema.
    """
    storer = Storer(schema, size, block_bytes)
    for found, batch in arrow_batches(stream):
        if batch is None:
            check_arrow_schema(found, schema)
            continue
        yield from storer.tables(batch)
        advance(stream.tell())


def arrow_batches(stream: BinaryIO) -> Iterator[tuple[pa.Schema, pa.RecordBatch | None]]:
    """The stream's schema with no batch, then with every batch. A batch is as the file has it: not validated.

    Raises:
        InputError: a message is damaged or too large.
    """
    checked = _Checked(stream)
    reader = checked.open()
    yield reader.schema, None
    while (batch := checked.next(reader)) is not None:
        yield reader.schema, batch


class _Checked:
    """The file that Arrow reads: it hands on one message at a time, each checked before its first byte."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._ready: list[bytes] = []
        self._ended = False
        self._refused: InputError | None = None
        if stream.read(len(FILE_MARK)) != FILE_MARK:
            stream.seek(0)

    def open(self) -> pa.RecordBatchStreamReader:
        try:
            return pa.ipc.open_stream(pa.PythonFile(self, mode="r"))
        except _ERRORS:
            pass
        raise self._refused or _damaged()

    def next(self, reader: pa.RecordBatchStreamReader) -> pa.RecordBatch | None:
        try:
            return reader.read_next_batch()
        except StopIteration:
            # An end mark, or the end of the file, between two messages. A message that was refused is no end.
            if self._refused is None and self._ended:
                return None
        except _ERRORS:
            pass
        raise self._refused or _damaged()

    def read(self, size: int = -1) -> bytes:
        """For Arrow: the next bytes of the message at hand, or of the next one."""
        if not self._ready and not self._ended and size:
            try:
                self._ready = self._message()
            except (InputError, struct.error, IndexError) as error:
                # Arrow would turn an error of ours into one of its own: it is kept, and raised by the caller.
                self._refused = error if isinstance(error, InputError) else _damaged()
                self._ended = True
        pieces = []
        while self._ready and size:
            # Arrow asks for a body as a whole: it is then handed on as it is, without a copy.
            piece = self._ready.pop(0)
            if 0 <= size < len(piece):
                self._ready.insert(0, piece[size:])
                piece = piece[:size]
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _message(self) -> list[bytes]:
        prefix = self._stream.read(8)
        if len(prefix) < 8 or prefix[:4] != _CONTINUATION or prefix[4:] == bytes(4):
            self._ended = True
            if prefix and prefix != _CONTINUATION + bytes(4):
                raise _damaged()
            return [prefix]
        (length,) = struct.unpack("<i", prefix[4:])
        if not 0 < length <= MAX_FOOTER_BYTES:
            raise _too_large()
        metadata = self._stream.read(length)
        body_bytes, compressed = _read_message(metadata)
        if not 0 <= body_bytes <= MAX_DECODED_BYTES:
            raise _too_large()
        body = self._stream.read(body_bytes)
        if len(metadata) < length or len(body) < body_bytes:
            raise _damaged()
        decoded = 0
        for offset, size in compressed:
            # A compressed buffer begins with its decompressed length, or -1 where it is not compressed after all.
            (inflated,) = struct.unpack_from("<q", body, offset) if size else (0,)
            if inflated < -1:
                raise _damaged()
            decoded += size if inflated == -1 else inflated
        if decoded > MAX_DECODED_BYTES:
            raise _too_large()
        return [prefix, metadata, body] if body else [prefix, metadata]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def _read_message(data: bytes) -> tuple[int, list[tuple[int, int]]]:
    """The body's length of a `Message` (Message.fbs), and where its compressed buffers are."""
    message = struct.unpack_from("<I", data, 0)[0]
    (body_bytes,) = _scalar(data, message, 3, "<q", 0)
    (kind,) = _scalar(data, message, 1, "<B", 0)
    header = _table(data, message, 2)
    if kind == _DICTIONARY_BATCH and header:
        header = _table(data, header, 1)
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH) or not header or not _field(data, header, 3):
        return body_bytes, []
    vector = _table(data, header, 2)
    if not vector:
        return body_bytes, []
    (count,) = struct.unpack_from("<I", data, vector)
    if vector + 4 + 16 * count > len(data):
        raise _damaged()
    pairs = [struct.unpack_from("<qq", data, vector + 4 + 16 * at) for at in range(count)]
    if any(offset < 0 or size < 0 or offset + size > body_bytes or 0 < size < 8 for offset, size in pairs):
        raise _damaged()
    return body_bytes, pairs


def _field(data: bytes, table: int, index: int) -> int:
    """Where the table's field is, 0 if it is absent (FlatBuffers: a table begins with the way back to its vtable)."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise _damaged()
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * index
    if entry + 2 > vtable_bytes:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + offset if offset else 0


def _scalar(data: bytes, table: int, index: int, form: str, default: int) -> tuple[int, ...]:
    at = _field(data, table, index)
    return struct.unpack_from(form, data, at) if at else (default,)


def _table(data: bytes, table: int, index: int) -> int:
    at = _field(data, table, index)
    return at + struct.unpack_from("<I", data, at)[0] if at else 0


def _damaged() -> InputError:
    return InputError("the Arrow file is damaged", "export the file again")


def _too_large() -> InputError:
    return InputError(
        f"an Arrow message is larger than {MAX_DECODED_BYTES >> 20} MiB",
        "write the table in smaller record batches, if you trust where it is from",
    )
