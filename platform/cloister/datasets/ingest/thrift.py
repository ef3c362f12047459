"""Just enough of Thrift's compact protocol to read what Parquet says about itself.

Guarantees: a malformed or hostile message is a `ValueError` or, past the end of the bytes, an `IndexError`; depth and
the number of values are bounded. Source: Apache Thrift, "Thrift Compact protocol encoding". pyarrow's own accessors
end the whole process on some malformed footers, so that they are not asked before a footer has been read here.
"""

from __future__ import annotations

from typing import Any

_MAX_DEPTH = 16
_MAX_VALUES = 2_000_000
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Message:
    """Reads one struct from the start of `data`. Afterwards `at` is the position behind it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._values = 0
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The struct's fields by their numbers: integers, bytes, booleans, lists, and structs as such maps."""
        if depth > _MAX_DEPTH:
            raise ValueError
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._zigzag()
            kind = byte & 15
            # In a struct, a boolean is its own type.
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise ValueError
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET) and depth <= _MAX_DEPTH:
            byte = self._byte()
            count = self._varint() if byte >> 4 == 15 else byte >> 4
            return [self._value(byte & 15, depth + 1) for _ in range(count)]
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise ValueError  # Parquet has no maps

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, count: int) -> bytes:
        if self.at + count > len(self._data):
            raise IndexError
        self.at += count
        return self._data[self.at - count : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
