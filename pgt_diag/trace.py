"""The on-disk trace: Parquet part files that are written once, merged in the background, and read.

Every tool that reads Parquet reads a trace. A table is a folder of files
`part-<first>-<last>-<fingerprint>.parquet`, numbered by the first and last row key they hold (an
iteration, or a sequence number). A part appears under its final name only when it is complete and
on disk, and never changes afterwards. Small parts are merged into one that covers them before they
are deleted, so a reader always finds every row exactly once: where parts overlap, the wider one
holds all of the narrower.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pgt_diag import storage
from pgt_diag.errors import RunDirectoryError
from pgt_diag.pages import decoded_bytes

NORMS_FOLDER = "trace"
ITERATIONS_FOLDER = "iterations"
EVENTS_FOLDER = "events"
EVENTS_FILE = "events.parquet"
BRIEF_SPELLS_FOLDER = "brief_spells"
BRIEF_SPELLS_FILE = "brief_spells.parquet"

ROW_GROUP = 1000
_MERGE_AT = 32
_LITTLE = 1 << 20
"""Bytes of a table that is kept for its merge; a larger one is read again."""
_READ_ATTEMPTS = 5
_MAX_DECODED_BYTES = 1 << 32
_FREE_DECODED_BYTES, _MAX_RATIO = 1 << 26, 1 << 14
"""What any part may decode to, and how many times its size beyond: constant columns pack well."""
_PART = re.compile(r"part-(\d{12})-(\d{12})-([0-9a-f]{16})\.parquet")

EVENT_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("layer", pa.string()),
        ("layer_index", pa.int32()),
        ("filter", pa.int32()),
        ("start_iteration", pa.int64()),
        ("end_iteration", pa.int64()),
    ]
)
BRIEF_SPELLS_SCHEMA = pa.schema(
    [*(EVENT_SCHEMA.field(name) for name in EVENT_SCHEMA.names[:4]), ("spells", pa.int64())]
)


def column_name(quantity: str, layer: str | None) -> str:
    """Return a norm table's column name: `weight_norm/layer3.0.conv2`, or the quantity alone."""
    return quantity if layer is None else f"{quantity}/{layer}"


def column(values: NDArray[np.generic]) -> pa.Array:
    """Return numbers, (rows,) or (rows, width), as a column, the latter of fixed-size lists.

    Made from the memory itself: `pa.array` would import pandas, while training goes on.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    numbers = pa.Array.from_buffers(
        pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)]
    )
    return (
        numbers if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(numbers, values.shape[1])
    )


def text_column(names: Sequence[str], chosen: NDArray[np.integer[Any]]) -> pa.Array:
    """Return `names[chosen]` as a column of text."""
    indices = column(chosen.astype(np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names))).dictionary_decode()


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a fixed-size-list column as (rows, width); inverse of `column`."""
    flat: NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)


def encode_table(table: pa.Table) -> bytes:
    """Return a Parquet file: zstd, byte-stream split for floats, page checksums."""
    split: list[str] = []
    plain: list[str] = []
    for field in table.schema:
        nested = pa.types.is_fixed_size_list(field.type)
        value_type = field.type.value_type if nested else field.type
        column = f"{field.name}.list.element" if nested else field.name
        (split if pa.types.is_floating(value_type) else plain).append(column)
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=plain,
        use_byte_stream_split=split,
        row_group_size=ROW_GROUP,
        write_page_checksum=True,
        write_statistics=plain,
    )
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def read_table(
    path: Path,
    fingerprints: tuple[str, ...],
    columns: Sequence[str] | None = None,
    limit: float | None = None,
) -> pa.Table:
    """Read one Parquet file whose content has one of these fingerprints.

    Columns it lacks are left out. limit: bytes of memory that its content may take; by default
    those of a whole table; infinite for a file that this process has written. Raises
    RunDirectoryError, naming the file, when it is damaged or would take more, and
    FileNotFoundError.
    """
    limit = max_table_bytes() if limit is None else limit
    with storage.verified(path, fingerprints) as file:
        try:
            return _decode(file, columns, limit)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None


def _decode(file: BufferedReader, columns: Sequence[str] | None, limit: float) -> pa.Table:
    """Return the table; ValueError when it would take more than `limit` bytes of memory."""
    # The same file, by its descriptor. A file of Python's would not do: Arrow's threads ask for it,
    # and one that asks while Python ends takes the whole process down.
    with pa.OSFile(f"/dev/fd/{file.fileno()}") as source:
        return _decode_from(source, file, columns, limit)


def _decode_from(
    source: pa.NativeFile, file: BufferedReader, columns: Sequence[str] | None, limit: float
) -> pa.Table:
    metadata = pq.read_metadata(source)
    # Read as a dictionary, a long text that many rows have is there once.
    texts = [
        column.path
        for column in map(metadata.schema.column, range(metadata.num_columns))
        if column.physical_type == "BYTE_ARRAY"
    ]
    with pq.ParquetFile(
        source, metadata=metadata, page_checksum_verification=True, read_dictionary=texts
    ) as parquet:
        names = parquet.schema_arrow.names
        chosen = [name for name in names if columns is None or name in columns]
        if limit < math.inf:
            paths = tuple(f"{name}." for name in chosen)
            needed = decoded_bytes(file, metadata, lambda path: f"{path}.".startswith(paths))
            packed = _FREE_DECODED_BYTES + _MAX_RATIO * os.fstat(file.fileno()).st_size
            if needed > min(limit, packed):
                raise ValueError(f"says it holds {needed:,} bytes; not read")
        return _decode_texts(parquet.read(columns=chosen), limit)


def _decode_texts(table: pa.Table, limit: float) -> pa.Table:
    """Return the table with each row's text in place of its number in a dictionary."""
    for place, field in enumerate(table.schema):
        if not pa.types.is_dictionary(field.type):
            continue
        column = table.column(place)
        for chunk in column.chunks:
            limit -= len(chunk) * (pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0)
            if limit < 0:
                raise ValueError(f"column {field.name} holds too much text; not read")
        column = column.cast(field.type.value_type)
        table = table.set_column(place, field.name, column)
    return table


def max_table_bytes() -> int:
    """Return how much memory the parts of one table may take, together."""
    return min(_MAX_DECODED_BYTES, storage.memory_share())


@dataclass(frozen=True)
class Part:
    """One part file: the keys of its first and last row, and its content's fingerprint."""

    path: Path
    first: int
    last: int
    fingerprint: str

    def read(self, columns: Sequence[str] | None = None, limit: float | None = None) -> pa.Table:
        """Read it, as `read_table` does."""
        return read_table(self.path, (self.fingerprint,), columns, limit)

    def verify(self) -> None:
        """Raise RunDirectoryError when its content is not what was written."""
        storage.verify(self.path, (self.fingerprint,))


def all_parts(folder: Path) -> list[Part]:
    """Return every part in a folder, also those that wider ones cover, in order."""
    return sorted(_parts_in(folder), key=lambda part: (part.first, -part.last, part.path.name))


def _parts_in(folder: Path) -> Iterator[Part]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _PART.fullmatch(path.name):
            yield Part(path, int(match[1]), int(match[2]), match[3])


def parts(folder: Path) -> list[Part]:
    """Return the parts that together hold every row once, in order."""
    chosen, covered = [], -1
    for part in all_parts(folder):
        if part.last > covered:
            chosen.append(part)
            covered = part.last
    return chosen


def read_parts(
    folder: Path, columns: Sequence[str] | None = None, *, newest: bool = False
) -> list[pa.Table]:
    """Read the parts of a table, in order, or only the newest one; their columns may differ.

    Raises RunDirectoryError, naming the file, when a part is damaged, or they would take more
    memory together than a table may.
    """
    for attempt in range(_READ_ATTEMPTS):
        try:
            return _read_all(parts(folder)[-1:] if newest else parts(folder), columns)
        except FileNotFoundError:
            # The run goes on, and its writer has just merged a part away: look again.
            if attempt == _READ_ATTEMPTS - 1:
                raise
    raise AssertionError


def _read_all(chosen: list[Part], columns: Sequence[str] | None) -> list[pa.Table]:
    tables, left = [], max_table_bytes()
    for part in chosen:
        tables.append(part.read(columns, left))
        left -= tables[-1].nbytes
    return tables


def write_part(folder: Path, table: pa.Table, first: int, last: int) -> Part:
    """Write the rows with keys `first` to `last` as one part."""
    data = encode_table(table)
    fingerprint = storage.fingerprint(data)
    path = folder / f"part-{first:012d}-{last:012d}-{fingerprint}.parquet"
    storage.write(path, data)
    return Part(path, first, last, fingerprint)


def rewind(folder: Path, end: int, aside: Path) -> None:
    """Keep exactly the rows with keys below `end`; move every part that has others to `aside`.

    What is kept of a part is written before the part is moved, so nothing is lost at a kill; from
    the last part to the first, so that a kill leaves no gap, and what was kept before it is made
    again.
    Rows without a column `iteration` are numbered one by one.
    """
    kept = set(parts(folder))
    for part in reversed(all_parts(folder)):
        if part in kept and part.last < end:
            continue
        if part in kept and part.first < end:
            table = part.read()
            numbered = "iteration" in table.column_names
            keys = (
                table["iteration"].to_numpy()
                if numbered
                else np.arange(part.first, part.first + table.num_rows)
            )
            head = table.filter(pa.array(keys < end))
            write_part(folder, head, part.first, int(keys[keys < end][-1]))
        storage.move(part.path, aside)


Small = tuple[Part, pa.Table | None]
"""A part that is to be merged, and its table if that is kept until then."""


class PartWriter:
    """Appends rows to a folder of parts, and merges small parts as they pile up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage.make_folder(folder)
        self._small: list[Small] = []
        self._schema: pa.Schema | None = None

    def write(self, table: pa.Table, first: int, last: int) -> None:
        """Write the rows with keys `first` to `last` as one part."""
        part = write_part(self.folder, table, first, last)
        if table.schema != self._schema:
            self._merge(self._small)
            self._small, self._schema = [], table.schema
        if table.num_rows >= ROW_GROUP:
            # A merged part may only cover neighbours: what is small so far is merged without this.
            small, self._small = self._small, []
            self._merge(small)
            return
        self._small.append((part, _if_little(table)))
        if len(self._small) >= _MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Merge the small parts at the end of the table into one."""
        small, self._small = self._small, []
        if merged := self._merge(small):
            self._small.append(merged)

    def _merge(
        self, small: list[tuple[Part, pa.Table | None]]
    ) -> tuple[Part, pa.Table | None] | None:
        """Replace neighbouring parts by one; return it if it is still a small one."""
        if len(small) < 2:
            return small[0] if small else None
        # Whatever these take, it was in memory when they were written.
        tables = [part.read(limit=math.inf) if table is None else table for part, table in small]
        table = pa.concat_tables(tables).combine_chunks()
        merged = write_part(self.folder, table, small[0][0].first, small[-1][0].last)
        for part, _ in small:
            storage.remove(part.path)
        return (merged, _if_little(table)) if table.num_rows < ROW_GROUP else None


def _if_little(table: pa.Table) -> pa.Table | None:
    """Return the table if it is small enough to be kept until it is merged."""
    return table if table.nbytes <= _LITTLE else None
