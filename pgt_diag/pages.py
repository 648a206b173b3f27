"""What a Parquet file's pages decode to, from their own headers, before any of them is decoded.

A file's footer says how many rows it has, and every page says how large it is: a made-up file need
not say the same in both places, and a reader takes the memory that the page asks for. Page headers
are structs in Thrift's compact protocol.

Source: Parquet format, parquet.thrift (PageHeader); Thrift compact protocol specification.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

_TEXT = "BYTE_ARRAY"
_WIDTHS = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8, "BOOLEAN": 1, _TEXT: 4}
"""How many bytes a value takes in memory; of a text, its number in a dictionary."""
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_OF_TYPE = {0: (5, 2), 2: (7, 2), 3: (8, 4)}
"""By a page's type: the field that tells of its values, and the one therein of their encoding."""
_HEADER_BYTES = 1 << 16
_MAX_DEPTH = 8
_READ_AT_ONCE = 16
"""Columns that a reader's threads unpack at once, each a page at a time."""


def decoded_bytes(file: BinaryIO, metadata: Any, chosen: Callable[[str], bool]) -> int:
    """Return how much memory the columns whose path is `chosen` take, unpacking them included.

    A text that rows have in common counts once for each page.

    Raises ValueError for a file that contradicts itself, and for kinds of column that no trace
    has, of which a little may decode to much.
    """
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    total = largest = packed = 0
    end = file.seek(0, os.SEEK_END)
    for index, column in enumerate(columns):
        if not chosen(column.path):
            continue
        if column.physical_type not in _WIDTHS:
            raise ValueError(f"column {column.path} is of {column.physical_type}")
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if group.num_rows < 0:
                raise ValueError(f"says it has {group.num_rows:,} rows")
            chunk = group.column(index)
            packed += chunk.total_compressed_size
            if chunk.total_compressed_size < 0 or packed > end:
                raise ValueError("its columns say that they are larger than the file")
            pages = list(_pages(file, chunk))
            values = max(group.num_rows, sum(count for _, count in pages))
            total += _WIDTHS[column.physical_type] * values
            if column.physical_type == _TEXT:
                total += sum(size for size, _ in pages)
            largest = max(largest, *(size for size, _ in pages), 0)
    return total + _READ_AT_ONCE * largest


def _pages(file: BinaryIO, chunk: Any) -> Iterator[tuple[int, int]]:
    """Yield how large each page of a column chunk says it is unpacked, and how many values."""
    start = chunk.data_page_offset
    if chunk.dictionary_page_offset and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    while 0 < start < end:  # a chunk without rows begins nowhere
        file.seek(start)
        header, length = _read_header(file.read(_HEADER_BYTES))
        place, encoded_by = _OF_TYPE.get(_count(header.get(1)), (0, 0))
        values = header.get(place)
        if not isinstance(values, dict):
            raise ValueError("a page is of no kind that a trace has")  # noqa: TRY004
        size, packed, count = map(_count, (header.get(2), header.get(3), values.get(1)))
        plain = (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)
        if chunk.physical_type == _TEXT and values.get(encoded_by) not in plain:
            raise ValueError("its text is encoded as in no trace")
        yield size, count
        start += length + packed


def _count(value: object) -> int:
    # Above this Arrow, whose numbers have 32 bits, would see another one.
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError("a page does not say how large it is")
    return value


def _read_header(data: bytes) -> tuple[dict[int, Any], int]:
    """Return a page header's fields by number, and its length."""
    reader = _Compact(data)
    try:
        return reader.struct(), reader.place
    except IndexError:
        raise ValueError("a page header has no end") from None


class _Compact:
    """Reads structs: numbers of 32 bits, truth values, structs; None for what else is in them.

    What Arrow and this might understand differently is refused.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (kind := self._byte()) & 15:
            delta = kind >> 4
            number = number + delta if delta else self._signed()
            if number in fields:
                raise ValueError("a page header has a field twice")
            fields[number] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 5:
                return self._signed()
            case 4 | 6:
                self._varint()
            case 7:
                self._skip(8)
            case 8:
                self._skip(self._varint())
            case 12:
                return self.struct(depth + 1)
            case _:
                raise ValueError("a page header has a field that none has")
        return None

    def _skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise IndexError

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
