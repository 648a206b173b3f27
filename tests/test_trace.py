"""The on-disk trace: readable by any Parquet tool, merged without loss, damage found."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgt_diag.encoder import STORED_ROWS, default_record_every, stored_mask
from pgt_diag.errors import RunDirectoryError
from pgt_diag.trace import (
    ROW_GROUP,
    PartWriter,
    column,
    encode_table,
    matrix,
    parts,
    read_parts,
    rewind,
    write_part,
)


def rows(first: int, count: int) -> pa.Table:
    numbers = np.arange(first, first + count)
    values = np.stack((numbers, -numbers), axis=1).astype(np.float32)
    return pa.table({"iteration": numbers, "weight_norm/a.b": column(values)})


def test_rows_come_back_once_and_in_order_however_parts_were_merged(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    writer = PartWriter(tmp_path)
    position = 0
    for _ in range(150):
        count = int(generator.choice([1, 7, 60, ROW_GROUP + 5]))
        writer.write(rows(position, count), position, position + count - 1)
        position += count
        if generator.random() < 0.1:
            table = pa.concat_tables(read_parts(tmp_path))
            assert table["iteration"].to_pylist() == list(range(position))
    assert len(parts(tmp_path)) < 100
    values = matrix(pa.concat_tables(read_parts(tmp_path))["weight_norm/a.b"])
    np.testing.assert_array_equal(values[:, 0], np.arange(position))
    np.testing.assert_array_equal(values[:, 1], -np.arange(position))


def test_a_merge_that_was_killed_before_it_deleted_counts_nothing_twice(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path)
    for first in (0, 10, 20):
        writer.write(rows(first, 10), first, first + 9)
    write_part(tmp_path, rows(0, 20), 0, 19)
    table = pa.concat_tables(read_parts(tmp_path))
    assert table["iteration"].to_pylist() == list(range(30))


def test_an_unfinished_file_is_no_part(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path)
    writer.write(rows(0, 10), 0, 9)
    (tmp_path / ".part-000000000010-000000000019-0123456789abcdef.parquet.tmp").write_bytes(
        b"PAR1 half of"
    )
    assert pa.concat_tables(read_parts(tmp_path)).num_rows == 10


def test_any_parquet_reader_reads_a_part(tmp_path: Path) -> None:
    write_part(tmp_path, rows(0, 5), 0, 4)
    frame = pq.read_table(tmp_path).to_pandas()
    assert frame["weight_norm/a.b"][3].tolist() == [3, -3]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated"])
def test_a_damaged_part_is_named_and_not_read(tmp_path: Path, damage: str) -> None:
    part = write_part(tmp_path, rows(0, 2000), 0, 1999)
    content = bytearray(part.path.read_bytes())
    if damage == "truncated":
        content = content[:-20]
    else:
        content[len(content) // 3] ^= 0x10
    part.path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=part.path.name):
        part.read()


def test_a_damaged_page_is_found_by_any_reader_that_verifies_page_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    content = bytearray(encode_table(rows(0, 2000)))
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)
    with (
        pq.ParquetFile(path, page_checksum_verification=True) as file,
        pytest.raises(OSError, match="checksum"),
    ):
        file.read()


@pytest.mark.parametrize("end", [0, 1, 10, 13, 29, 30, 31])
def test_a_table_is_cut_at_any_row_and_the_rest_set_aside(tmp_path: Path, end: int) -> None:
    folder, aside = tmp_path / "table", tmp_path / "aside"
    writer = PartWriter(folder)
    for first in (0, 10, 20):
        writer.write(rows(first, 10), first, first + 9)
    write_part(folder, rows(0, 20), 0, 19)  # a merge that was killed before it deleted
    rewind(folder, end, aside)
    kept = [row for table in read_parts(folder) for row in table["iteration"].to_pylist()]
    assert kept == list(range(min(end, 30)))
    moved = {row for table in read_parts(aside) for row in table["iteration"].to_pylist()}
    assert moved | set(kept) == set(range(30))


def test_float_columns_are_smaller_than_raw_and_lossless(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    walk = 1 + np.cumsum(generator.normal(scale=1e-4, size=(1000, 512)), axis=0)
    values = walk.astype(np.float32)
    part = write_part(tmp_path, pa.table({"weight_norm/a": column(values)}), 0, 999)
    assert part.path.stat().st_size < values.nbytes / 1.5
    np.testing.assert_array_equal(matrix(part.read()["weight_norm/a"]), values)


def test_a_run_of_unknown_length_keeps_a_few_thousand_rows() -> None:
    iterations = np.arange(500_000)
    kept = stored_mask(iterations, None)
    assert kept[: 2 * STORED_ROWS].all()
    assert kept.sum() < 10 * STORED_ROWS


@pytest.mark.parametrize("iterations", [1, 2048, 2049, 4096, 10_000, 500_000])
def test_a_run_of_known_length_keeps_all_rows_or_well_over_a_thousand(iterations: int) -> None:
    kept = stored_mask(np.arange(iterations), default_record_every(iterations)).sum()
    assert min(iterations, 1000) <= kept <= STORED_ROWS
