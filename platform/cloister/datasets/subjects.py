"""People in a table: keyed pseudonyms for their identifiers, and tags by which their rows are found again.

Guarantees: without the dataset's keys, neither a pseudonym nor a tag says anything about the value it stands for but
equality; equal identifiers of one dataset have equal pseudonyms, in every column and version, and those of two datasets
have nothing in common, since each dataset has keys of its own. Texts are compared in Unicode's form NFC (UAX #15), and
none has a character that nobody sees: one person is one, however their name was typed.
Not guaranteed: that rare combinations of the other columns do not identify somebody.

HMAC-SHA256 (RFC 2104), cut to 128 bits (its section 5): two of a billion values meet with probability below 2**-68.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cloister.datasets.schema import ORIGINAL_SUFFIX, SUBJECT_COLUMN, Column, DatasetSchema
from cloister.errors import InputError

TAG_BYTES = 16
KEY_BYTES = 32

Tags = npt.NDArray[np.void]
"""One tag a row: [N], 16 bytes each."""
SLICE_ROWS = 8_000_000
"""Of 8 bytes each, while the rows of units are counted."""
_UNSEEN = r"[\p{Cc}\p{Cf}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectKeys:
    """The two keys of one dataset. `repr` shows neither."""

    pseudonym: bytes
    index: bytes

    def __post_init__(self) -> None:
        if len(self.pseudonym) != KEY_BYTES or len(self.index) != KEY_BYTES or self.pseudonym == self.index:
            raise InputError("a dataset has two keys of 32 bytes for its subjects", "ask the authority for them")

    def __repr__(self) -> str:
        return "SubjectKeys()"


def pseudonym(key: bytes, identifier: str) -> str:
    """What stands for `identifier` in the sealed table: 32 hex digits."""
    return _mac(key, unicodedata.normalize("NFC", identifier)).hex()


def subject_tag(key: bytes, column: Column, value: str) -> bytes:
    """The tag of the rows whose `column` (the schema's `subject`) has `value`, as a person writes it.

    Raises:
        InputError: the column never holds such a value.
    """
    text = value.strip()
    if column.type == "integer":
        if not text.removeprefix("-").isdecimal() or not text.isascii() or len(text) > 18:
            raise InputError(
                f"column '{column.name}' holds integers, and this is none", "name the subject by its number"
            )
        text = str(int(text))
    (text,) = _canonical(pa.array([text]), column).to_pylist()
    if column.values is not None and text not in {unicodedata.normalize("NFC", value) for value in column.values}:
        raise InputError(f"column '{column.name}' has no such value", "name the subject as the data does")
    return _mac(key, text)


def protect(table: pa.Table, schema: DatasetSchema, keys: SubjectKeys | None) -> tuple[pa.Table, Tags | None]:
    """A table in stored form, identifiers in clear, to what is sealed: pseudonyms, originals where kept, and tags [N].

    Raises:
        InputError: the schema has a subject, and there are no keys; or a value has a character that nobody sees.
    """
    subject = schema.subject
    if subject is None:
        return table, None
    if keys is None:
        raise InputError("the schema names people, and there are no keys for their pseudonyms", "seal the data again")
    tags = _macs(keys.index, _texts(table.column(subject.name), subject))
    for column in schema.columns:
        if column.role != "identifier":
            continue
        originals = table.column(column.name)
        hidden = _hex(_macs(keys.pseudonym, _canonical(originals, column)))
        table = table.set_column(table.column_names.index(column.name), column.name, hidden)
        if column.keep_original:
            table = table.append_column(column.name + ORIGINAL_SUFFIX, originals)
    return table, tags


def index_table(tags: Tags) -> pa.Table:
    """The sealed form of a shard's tags, in the order of its rows."""
    buffer = pa.py_buffer(np.ascontiguousarray(tags).tobytes())
    return pa.table({SUBJECT_COLUMN: pa.Array.from_buffers(pa.binary(TAG_BYTES), len(tags), [None, buffer])})


def read_index(table: pa.Table) -> Tags:
    """The inverse of `index_table`: tags [N].

    Raises:
        InputError: not an index.
    """
    if table.column_names != [SUBJECT_COLUMN] or table.column(0).type != pa.binary(TAG_BYTES):
        raise InputError("this is not a subject index", "run `cloister data verify`")
    array = table.column(0).combine_chunks()
    data = array.buffers()[1].to_pybytes() if len(array) else b""
    return np.frombuffer(data, dtype=np.dtype((np.void, TAG_BYTES)))[array.offset : array.offset + len(array)]


def check_units(schema: DatasetSchema, rows: int, indexes: Callable[[], Iterable[Tags]]) -> None:
    """Compare how many rows each unit has with what the schema says. `indexes` gives the tags of all `rows` rows.

    It is asked once for each slice of `SLICE_ROWS` rows, so that memory does not grow with the table.

    Raises:
        InputError: a unit has more rows than the schema allows. It is not named.
    """
    if schema.unit == "row":
        return
    slices = max(1, -(-rows // SLICE_ROWS))
    worst = 0
    for part in range(slices):
        numbers = (unit_numbers(tags) for tags in indexes())
        found = np.concatenate([np.empty(0, np.uint64), *(each[each % slices == part] for each in numbers)])
        found.sort()
        # Where a run of equal numbers begins, and where the last one ends.
        begins = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1], [True])))
        worst = max(worst, int(np.diff(begins).max(initial=0)) if len(found) else 0)
    if worst > schema.rows_per_unit:
        raise InputError(
            f"a unit has {worst} rows, and the schema allows {schema.rows_per_unit}",
            "raise unit.max_rows, which costs epsilon, or drop rows of those who have too many",
        )


def held_out(tags: Tags, share: float) -> npt.NDArray[np.bool_]:
    """Which rows [N] are kept for evaluation where a unit has several: all of a unit's or none, in every version."""
    return np.asarray(unit_numbers(tags).astype(np.float64) < share * 2.0**64)


def unit_numbers(tags: Tags) -> npt.NDArray[np.uint64]:
    """The first 64 bits of each tag: two of 40 million meet with probability below 2**-14, and then count as one."""
    return np.ascontiguousarray(tags).view(np.dtype("<u8")).reshape(-1, 2)[:, 0]


def _texts(array: pa.ChunkedArray, column: Column) -> pa.ChunkedArray | pa.Array:
    """A column's values as people write them."""
    if column.values is not None:
        texts = pa.array(column.values, pa.string()).take(array.combine_chunks())
    else:
        texts = array.cast(pa.string())
    return _canonical(texts, column)


def _canonical(texts: pa.ChunkedArray | pa.Array, column: Column) -> pa.ChunkedArray | pa.Array:
    """The same texts in form NFC, without white space around them.

    Raises:
        InputError: a control or format character, which would make two people of one whom nobody can tell apart.
    """
    texts = pc.utf8_trim_whitespace(pc.utf8_normalize(texts, form="NFC"))
    if pc.any(pc.match_substring_regex(texts, _UNSEEN)).as_py():
        raise InputError(
            f"column '{column.name}' has a value with a character that nobody sees (Unicode class Cc or Cf)",
            "remove it where the file was exported: a zero-width or bidirectional mark, or a control character",
        )
    return texts


def _macs(key: bytes, array: pa.ChunkedArray | pa.Array) -> Tags:
    """`_mac` of every value [N], computed once for each distinct one.

    The key's two blocks are hashed once for all of them (RFC 2104 section 4), which makes it 2.5 times faster.
    """
    encoded = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    encoded = encoded.dictionary_encode()
    padded = key.ljust(hashlib.sha256().block_size, b"\0")
    inner_start = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
    outer_start = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))
    found = bytearray()
    for value in encoded.dictionary.cast(pa.binary()).to_pylist():
        inner, outer = inner_start.copy(), outer_start.copy()
        inner.update(value)
        outer.update(inner.digest())
        found += outer.digest()[:TAG_BYTES]
    known = np.frombuffer(bytes(found), dtype=np.dtype((np.void, TAG_BYTES)))
    tags: Tags = known[encoded.indices.to_numpy()]
    return tags


def _hex(tags: Tags) -> pa.Array:
    """Tags as text, which is what `pseudonym` gives."""
    offsets = pa.py_buffer(np.arange(0, 2 * TAG_BYTES * (len(tags) + 1), 2 * TAG_BYTES, dtype=np.int32))
    text = pa.py_buffer(tags.tobytes().hex().encode())
    return pa.Array.from_buffers(pa.string(), len(tags), [None, offsets, text])


def _mac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), hashlib.sha256)[:TAG_BYTES]
