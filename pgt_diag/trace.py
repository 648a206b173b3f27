"""The on-disk trace: Parquet part files that are written once, merged in the background, and read.

Every tool that reads Parquet reads a trace. A table is a folder of files
`part-<first>-<last>.parquet`, numbered by the first and last row key they hold (an iteration, or
a sequence number). A part appears under its final name only when it is complete and on disk, and
never changes afterwards. Small parts are merged into one that covers them before they are
deleted, so a reader always finds every row exactly once: where parts overlap, the wider one holds
all of the narrower.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pgt_diag.errors import RunDirectoryError, storage_error

NORMS_FOLDER = "trace"
ITERATIONS_FOLDER = "iterations"
EVENTS_FOLDER = "events"
EVENTS_FILE = "events.parquet"
BRIEF_SPELLS_FILE = "brief_spells.parquet"

ROW_GROUP = 1000
_MERGE_AT = 32
_READ_ATTEMPTS = 5
_PART = re.compile(r"part-(\d{12})-(\d{12})\.parquet")

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


def column_name(quantity: str, layer: str | None) -> str:
    """Return a norm table's column name: `weight_norm/layer3.0.conv2`, or the quantity alone."""
    return quantity if layer is None else f"{quantity}/{layer}"


def list_column(values: NDArray[np.generic]) -> pa.FixedSizeListArray:
    """Return (rows, width) values as one fixed-size-list column."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a fixed-size-list column as (rows, width); inverse of `list_column`."""
    flat: NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, put it on disk, and only then give it its name.

    Raises what `storage_error` returns when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise storage_error(path, error) from error


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet file: zstd, byte-stream split for floats, page checksums, atomically."""
    split: list[str] = []
    plain: list[str] = []
    for field in table.schema:
        nested = pa.types.is_fixed_size_list(field.type)
        value_type = field.type.value_type if nested else field.type
        column = f"{field.name}.list.element" if nested else field.name
        (split if pa.types.is_floating(value_type) else plain).append(column)

    def write(target: Path) -> None:
        pq.write_table(
            table,
            target,
            compression="zstd",
            use_dictionary=plain,
            use_byte_stream_split=split,
            row_group_size=ROW_GROUP,
            write_page_checksum=True,
            write_statistics=plain,
        )

    write_atomically(path, write)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file, verifying page checksums; columns it lacks are left out.

    Raises RunDirectoryError, naming the file, when it is damaged, and FileNotFoundError.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = set(file.schema_arrow.names)
            chosen = None if columns is None else [name for name in columns if name in present]
            return file.read(columns=chosen)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise RunDirectoryError(f"{path}: damaged or unreadable: {error}") from None


def part_files(folder: Path) -> list[Path]:
    """Return the parts that together hold every row once, in order."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = [(match, path) for path in paths if (match := _PART.fullmatch(path.name))]
    chosen, covered = [], -1
    for match, path in sorted(matches, key=lambda found: (int(found[0][1]), -int(found[0][2]))):
        if int(match[2]) > covered:
            chosen.append(path)
            covered = int(match[2])
    return chosen


def read_parts(
    folder: Path, columns: Sequence[str] | None = None, *, newest: bool = False
) -> list[pa.Table]:
    """Read the parts of a table, in order, or only the newest one; their columns may differ.

    Raises RunDirectoryError, naming the file, when a part is damaged.
    """
    for attempt in range(_READ_ATTEMPTS):
        try:
            paths = part_files(folder)[-1:] if newest else part_files(folder)
            return [read_table(path, columns) for path in paths]
        except FileNotFoundError:
            # The run goes on, and its writer has just merged a part away: look again.
            if attempt == _READ_ATTEMPTS - 1:
                raise
    raise AssertionError


class PartWriter:
    """Appends rows to a folder of parts, and merges small parts as they pile up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._small: list[Path] = []
        self._schema: pa.Schema | None = None

    def write(self, table: pa.Table, first: int, last: int) -> None:
        """Write the rows with keys `first` to `last` as one part."""
        path = self.folder / f"part-{first:012d}-{last:012d}.parquet"
        write_table(path, table)
        if table.schema != self._schema:
            self._merge(self._small)
            self._small, self._schema = [], table.schema
        if table.num_rows >= ROW_GROUP:
            # A merged part may only cover neighbours: what is small so far is merged without this.
            small, self._small = self._small, []
            self._merge(small)
            return
        self._small.append(path)
        if len(self._small) >= _MERGE_AT:
            self.merge()

    def merge(self) -> None:
        """Merge the small parts at the end of the table into one."""
        small, self._small = self._small, []
        if merged := self._merge(small):
            self._small.append(merged)

    def _merge(self, small: list[Path]) -> Path | None:
        """Replace neighbouring parts by one; return it if it is still a small one."""
        if len(small) < 2:
            return small[0] if small else None
        table = pa.concat_tables([read_table(path) for path in small]).combine_chunks()
        first, last = _PART.fullmatch(small[0].name), _PART.fullmatch(small[-1].name)
        assert first is not None and last is not None
        merged = self.folder / f"part-{first[1]}-{last[2]}.parquet"
        write_table(merged, table)
        for path in small:
            path.unlink()
        return merged if table.num_rows < ROW_GROUP else None
