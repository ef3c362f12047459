"""Text files: bytes, gunzipped where need be, cut into blocks of whole rows.

Guarantees: memory is bounded by the block and one row, whatever the file holds; a gzip file is read as one member
with text inside, and as long as it does not inflate like a bomb; a row ends where RFC 4180 says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from cloister.datasets.ingest.kinds import HEAD_BYTES, recognise
from cloister.datasets.ingest.limits import MAX_ROW_BYTES, MAX_TEXT_RATIO, TEXT_RATIO_GRACE
from cloister.datasets.ingest.refusal import Place, refuse_row
from cloister.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Text:
    """A text file from its start. `read` is its only way in; `kind` is what it holds."""

    def __init__(self, stream: BinaryIO, kind: str) -> None:
        self._read = _Gunzip(stream).read if kind == "gzip" else stream.read
        self._head = self._read(HEAD_BYTES)
        self.kind = kind
        if kind == "gzip":
            self.kind = recognise(self._head)
            if self.kind not in ("csv", "json lines"):
                raise InputError("the gzip file holds something else than text", "unpack it, and seal the table inside")
        self._head = self._head.removeprefix(BYTE_ORDER_MARK)

    def read(self, size: int) -> bytes:
        """At most `size` bytes more; none at the end of the file."""
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        return self._read(size)


class _Gunzip:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._inflate = zlib.decompressobj(wbits=31)  # 31: a gzip header, RFC 1952
        self._taken = self._given = 0

    def read(self, size: int) -> bytes:
        while not self._inflate.eof:
            fresh = self._inflate.unconsumed_tail or self._stream.read(1 << 18)
            if not fresh and not self._inflate.unconsumed_tail:
                raise InputError("the gzip file is damaged: it ends early", "export the file again")
            self._taken = self._stream.tell()
            try:
                text = self._inflate.decompress(fresh, size)
            except zlib.error:
                text = None
            # Raised outside the handler, here and below: a library's message may quote the data, even as context.
            if text is None:
                raise InputError("the gzip file is damaged", "export the file again")
            self._given += len(text)
            if self._given > TEXT_RATIO_GRACE and self._given > MAX_TEXT_RATIO * self._taken:
                raise InputError(
                    f"the gzip file inflates more than {MAX_TEXT_RATIO} times",
                    "unpack it, if you trust where it is from",
                )
            if text:
                return text
        if self._inflate.unused_data or self._stream.read(1):
            raise InputError("the gzip file goes on after its first member", "unpack it, and seal the table inside")
        return b""


def row_blocks(
    read: Callable[[int], bytes],
    block_bytes: int,
    place: Place,
    last_row_end: Callable[[bytes, Place], int],
) -> Iterator[bytes]:
    """Blocks of whole rows, each at most `block_bytes` and one row long.

    `last_row_end` gives the position after the last whole row of some bytes, or 0. The consumer counts the rows of
    each block into `place` before it asks for the next.

    Raises:
        InputError: a row does not end within `MAX_ROW_BYTES`.
    """
    rest = b""
    while True:
        pieces, size = [rest], 0
        while size < block_bytes and (piece := read(block_bytes - size)):
            pieces.append(piece)
            size += len(piece)
        block = b"".join(pieces)
        if size == 0:
            if block:
                last_row_end(block, place)
                yield block
            return
        end = last_row_end(block, place)
        rest = block[end:]
        if end:
            yield block[:end]
        if len(rest) > MAX_ROW_BYTES:
            problem = f"the row goes on for more than {MAX_ROW_BYTES >> 20} MiB"
            refuse_row(place, 0, None, problem, "is a line end or a quote missing?")
