"""How large a Parquet file's pages are once decoded, read from footer and page headers before anything is decoded.

A page of a few kilobytes may say that it inflates to two gigabytes, and a decoder allocates what it says. The column
chunk's metadata may say something else, so that the headers themselves are read: the same bytes, in the same order, as
the decoder will read. Source: Apache Parquet, `parquet.thrift`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

from cloister.datasets.ingest.limits import MAX_DECODED_BYTES, MAX_FOOTER_BYTES
from cloister.datasets.ingest.thrift import Message
from cloister.errors import InputError

_MAX_HEADER_BYTES = 8 << 20  # it may hold two statistics, each as long as a cell
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN = 0
_DICTIONARY_ENCODINGS = {2, 8}  # PLAIN_DICTIONARY, RLE_DICTIONARY
_DELTA_BYTE_ARRAY = 7


@dataclass(slots=True)
class Pages:
    """What the page headers of one column chunk say."""

    largest: int = 0
    """Decoded bytes of the largest page."""
    values: int = 0
    """Values in all data pages, gaps and list elements counted."""
    bytes_per_value: float = 0.0
    """Of the data page that has most; prefixes and dictionary values that repeat are not in it."""
    dictionary: int = 0
    """Decoded bytes of the dictionary page."""
    encodings: list[int] = field(default_factory=list)
    """Of the data pages, in order, none twice."""

    @property
    def has_dictionary(self) -> bool:
        return bool(_DICTIONARY_ENCODINGS & set(self.encodings))

    @property
    def begins_with_dictionary(self) -> bool:
        return bool(self.encodings) and self.encodings[0] in _DICTIONARY_ENCODINGS

    @property
    def reads_as_dictionary(self) -> bool:
        """Arrow reads no other encodings as dictionaries."""
        return set(self.encodings) <= _DICTIONARY_ENCODINGS | {_PLAIN}

    @property
    def has_shared_prefixes(self) -> bool:
        return _DELTA_BYTE_ARRAY in self.encodings


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group: its rows, and each column's pages in the order of the file's leaf columns."""

    rows: int
    columns: tuple[Pages, ...]


def read_groups(stream: BinaryIO, size: int) -> list[RowGroup]:
    """Read the footer and every page header of a file of `size` bytes.

    Raises:
        InputError: no whole Parquet file in clear, or pages too large to decode one a column at a time.
    """
    try:
        # FileMetaData 4: row_groups. RowGroup 1: columns, 3: num_rows. ColumnChunk 3: meta_data.
        footer = Message(_footer(stream, size)).struct()
        found = [RowGroup(group[3], tuple(_pages(stream, size, chunk[3]) for chunk in group[1])) for group in footer[4]]
    except (ValueError, LookupError, TypeError, AttributeError):
        found = None
    if found is None:
        raise damaged()
    if any(sum(pages.largest for pages in group.columns) > MAX_DECODED_BYTES for group in found):
        raise InputError(
            f"the Parquet file's pages inflate to more than {MAX_DECODED_BYTES >> 20} MiB at a time",
            "write it with smaller pages (data_page_size), if you trust where it is from",
        )
    return found


def damaged() -> InputError:
    return InputError("the Parquet file is damaged or encrypted", "export the file again, in clear")


def _footer(stream: BinaryIO, size: int) -> bytes:
    stream.seek(max(0, size - 8))
    tail = stream.read(8)
    if tail[4:] == b"PARE":
        raise InputError("the Parquet file is encrypted", "decrypt it first: Cloister seals it under its own keys")
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length + 12 > size:
        raise damaged()
    if length > MAX_FOOTER_BYTES:
        raise InputError(f"the Parquet footer is larger than {MAX_FOOTER_BYTES >> 20} MiB", "write fewer row groups")
    stream.seek(size - 8 - length)
    return stream.read(length)


def _pages(stream: BinaryIO, size: int, chunk: dict[int, Any]) -> Pages:
    """Walk the page headers of a column chunk until its values are seen."""
    # ColumnMetaData 5: num_values, 7: total_compressed_size, 9: data_page_offset, 11: dictionary_page_offset
    values, length, at = chunk[5], chunk[7], chunk[9]
    if 0 < chunk.get(11, 0) < at:
        at = chunk[11]
    end = at + length
    if type(values) is not int or at < 4 or length < 0 or end > size:
        raise ValueError
    pages = Pages()
    while pages.values < values:
        header, header_bytes = _header(stream, at, end)
        # PageHeader 1: type, 2: uncompressed_page_size, 3: compressed_page_size, 5 and 8: data page, version 1 and 2
        kind, decoded, encoded = header[1], header[2], header[3]
        if not type(kind) is type(decoded) is type(encoded) is int:
            raise ValueError
        if kind in (_DATA_PAGE, _DATA_PAGE_V2):
            data = header[5 if kind == _DATA_PAGE else 8]
            count = data[1]
            pages.values += count
            pages.bytes_per_value = max(pages.bytes_per_value, decoded / max(1, count))
            encoding = data[2 if kind == _DATA_PAGE else 4]
            if type(count) is not int or type(encoding) is not int:
                raise ValueError
            if encoding not in pages.encodings:
                pages.encodings.append(encoding)
            if count < 0:
                raise ValueError
        if kind == _DICTIONARY_PAGE:
            pages.dictionary = decoded
        pages.largest = max(pages.largest, decoded)
        at += header_bytes + encoded
        if decoded < 0 or encoded < 0 or at > end:
            raise ValueError
    return pages


def _header(stream: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    window = 1 << 10
    while True:
        stream.seek(at)
        data = stream.read(min(window, end - at))
        message = Message(data)
        try:
            return message.struct(), message.at
        except IndexError:
            if window >= _MAX_HEADER_BYTES or len(data) < window:
                raise
            window *= 16
