"""How much of a file ingestion holds or believes at once. All sizes are bytes."""

from __future__ import annotations

MIB = 1 << 20

BLOCK_BYTES = 8 * MIB
"""What is read, checked and handed on at a time."""

MAX_BLOCK_BYTES = 256 * MIB

MAX_CELL_BYTES = MIB
"""Of one text, category or identifier cell, and of one number before it is parsed."""

MAX_ROW_BYTES = 16 * MIB
"""Of one line of CSV or JSON. A line that does not end within it is refused."""

MAX_TEXT_RATIO = 200
TEXT_RATIO_GRACE = 64 * MIB
"""A gzip file holds at most so many times its own size, once it has given out the grace."""

MAX_TABLE_RATIO = 1000
TABLE_RATIO_GRACE = 256 * MIB
"""The same for Parquet and Arrow, which repeat a value at next to no cost."""

MAX_FOOTER_BYTES = 16 * MIB
"""Of a Parquet footer, and of the metadata of one Arrow message."""

MAX_DECODED_BYTES = 256 * MIB
"""Of a Parquet row group's largest pages, one a column, together; and of one Arrow record batch. They are decoded
whole, so that they bound the memory that reading needs."""

MAX_LIST_BYTES = 512 * MIB
"""Of the numbers in one Parquet row group's list columns, whose rows may hide any number of elements."""
