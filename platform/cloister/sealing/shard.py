"""Sealed tables: Parquet Modular Encryption with a key of its own for each file (FORMAT.md, "Shard").

Apache Parquet format, "Encryption.md": AES_GCM_V1 with a 256-bit key, encrypted footer, uniform encryption, and an
AAD prefix that is *not* stored, so the reader must state which shard it expects.

Guarantees: a shard opens only under its own key and as the shard that it was sealed as; a plaintext file, a swapped
file, a swapped page, a cut file are refused and no row is released; no error holds a value.

Does not guarantee: hiding sizes (of the file, its pages, its number of columns); that bytes of columns which were
not asked for are intact (compare the file's digest with the manifest for that); freshness.

The bytes are parsed by a large C++ library. Check their digest against the signed manifest before opening them.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe

from cloister.canonical import canonical_json
from cloister.errors import InputError, IntegrityError

KEY_BYTES = 32
MAGIC = b"PARE"  # Parquet format, Encryption.md section 5.1: encrypted footer mode
# The file crypto metadata, in Thrift's compact encoding, around the file's 8 random bytes: AES_GCM_V1, the AAD prefix
# comes from the reader. It is the one part of such a file that no tag covers, so anything else is refused.
_CRYPTO_METADATA = (b"\x1c\x1c\x28\x08", b"\x11\x00\x00\x00")
_FILE_UNIQUE_BYTES = 8
# What a page holds: large enough that its tag and header cost nothing, small enough to stay in a core's cache between
# decrypting and decoding, which reads wide rows about 1.5 times faster.
_PAGE_BYTES = 1 << 19
_AAD_LABEL = b"cloister.dev/shard/v2\x00"


def shard_aad(dataset: str, version: int, part: str, shard: str, region: str) -> bytes:
    """The AAD prefix of one file: what it is and where it belongs, so that it cannot pass for another.

    Raises:
        InputError: an empty name or a version below one.
    """
    if not dataset or not part or not shard or not region or version < 1:
        raise InputError("a shard has a dataset, a version from 1 up, a part, a name and a region", "name all five")
    named = {"dataset": dataset, "part": part, "region": region, "shard": shard, "version": version}
    return _AAD_LABEL + canonical_json(named)


def seal_table(table: pa.Table, key: bytes, aad: bytes) -> bytes:
    """Seal `table` under `key`, which must never seal another file, bound to `aad` (see `shard_aad`).

    Raises:
        InputError: a key that is not 32 bytes, an empty AAD, or a table that Parquet cannot hold.
    """
    _check(key, aad)
    properties = pe.create_encryption_properties(
        key, aad_prefix=aad, store_aad_prefix=False, encryption_algorithm="AES_GCM_V1", plaintext_footer=False
    )
    return _written(table, properties)


def open_table(sealed: bytes | pa.Buffer, key: bytes, aad: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table, or only `columns` of it. Uses one thread; open several shards in several threads.

    Raises:
        InputError: a key that is not 32 bytes, an empty AAD, or a column that the shard does not have.
        IntegrityError: another key, another shard, plaintext, or changed or cut bytes.
    """
    _check(key, aad)
    pages_end = _check_frame(memoryview(sealed))
    # allow_plaintext_files=False is the default; it is stated because everything hangs on it.
    properties = pe.create_decryption_properties(
        key, aad_prefix=aad, check_footer_integrity=True, allow_plaintext_files=False
    )
    try:
        file = pq.ParquetFile(pa.BufferReader(sealed), decryption_properties=properties)
        if len(MAGIC) + _page_bytes(file.metadata) != pages_end:
            raise ValueError("bytes that belong to no page")
        known = set(file.schema_arrow.names)
        if columns is not None and not known.issuperset(columns):
            raise InputError("the shard does not have every column that was asked for", "compare with the schema")
        found = file.read(columns=columns, use_threads=False)
        return pa.Table.from_arrays(found.columns, names=found.column_names)  # nullable, as tables usually are
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError):
        raise IntegrityError(
            "the sealed shard does not open: it was changed, cut, swapped, or sealed under another key",
            "run `cloister data verify`; restore the blob from a backup",
        ) from None


def _written(table: pa.Table, properties: pe.FileEncryptionProperties | None) -> bytes:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(
            _without_nulls(table),
            sink,
            encryption_properties=properties,
            compression="NONE",  # tensors do not shrink, and reading them is five times faster
            use_dictionary=[field.name for field in table.schema if pa.types.is_string(field.type)],
            write_statistics=False,
            data_page_size=_PAGE_BYTES,
            write_batch_size=_rows_at_once(table.schema),
        )
    except (pa.ArrowException, OSError, ValueError):
        raise InputError("this table cannot be written as Parquet", "use flat columns of plain types") from None
    return bytes(sink.getvalue())


def _without_nulls(table: pa.Table) -> pa.Table:
    """The same columns, those without a gap marked so: without definition levels they are read twice as fast."""
    fields = [
        field.with_nullable(column.null_count > 0) for field, column in zip(table.schema, table.columns, strict=True)
    ]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields, table.schema.metadata))


def _rows_at_once(schema: pa.Schema) -> int:
    """Rows between two looks at a page's size. It is looked at no more often, so wide rows would make huge pages."""
    widest = max((field.type.byte_width for field in schema if pa.types.is_fixed_size_binary(field.type)), default=1)
    return min(1024, max(1, _PAGE_BYTES // widest))


def _check(key: bytes, aad: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InputError("the data key is not 32 bytes", "make it with cloister.sealing.envelope.new_key()")
    if not aad:
        raise InputError("a shard without associated data could be swapped for another", "make it with shard_aad()")


def _page_bytes(metadata: pq.FileMetaData) -> int:
    """How many bytes of pages the (authenticated) footer knows of."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return sum(group.column(index).total_compressed_size for group in groups for index in range(group.num_columns))


def _check_frame(view: memoryview) -> int:
    """Check what no tag covers and the reader skips or reads leniently (Encryption.md 5.1); return where pages end."""
    before, after = _CRYPTO_METADATA
    module = len(before) + _FILE_UNIQUE_BYTES + len(after)
    footer = int.from_bytes(view[-8:-4], "little")
    start = len(view) - 8 - footer
    if (
        bytes(view[:4]) != MAGIC
        or bytes(view[-4:]) != MAGIC
        or start < len(MAGIC)
        or bytes(view[start : start + len(before)]) != before
        or bytes(view[start + module - len(after) : start + module]) != after
        or int.from_bytes(view[start + module : start + module + 4], "little") != footer - module - 4
    ):
        raise IntegrityError(
            "this is not a sealed shard, or it is cut or changed", "name a file that `cloister data seal` wrote"
        )
    return start
