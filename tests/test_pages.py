"""What a Parquet file decodes to is known, and bounded, before any of it is decoded."""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgt_diag import pages, storage, trace
from pgt_diag.errors import RunDirectoryError

ROWS = 2_500  # several row groups


def encoded(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def norms(rows: int = ROWS, width: int = 64) -> pa.Table:
    values = np.random.default_rng(0).random((rows, width), dtype=np.float32)
    return pa.table(
        {
            "iteration": trace.column(np.arange(rows)),
            "norm/layer3.0.conv2": trace.column(values),
            "norm/layer3.0.conv22": trace.column(values),
        }
    )


def events(rows: int = ROWS, text: str = "silent") -> pa.Table:
    return pa.table({"kind": pa.array([text] * rows), "filter": pa.array(range(rows), pa.int32())})


def needed(data: bytes, chosen: Callable[[str], bool] = lambda _: True) -> int:
    return pages.decoded_bytes(io.BytesIO(data), pq.read_metadata(io.BytesIO(data)), chosen)


def part(folder: Path, data: bytes, first: int = 0, last: int = 0) -> trace.Part:
    fingerprint = storage.fingerprint(data)
    path = folder / f"part-{first:012d}-{last:012d}-{fingerprint}.parquet"
    path.write_bytes(data)
    return trace.Part(path, first, last, fingerprint)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_what_a_table_takes_is_known_from_its_pages(
    version: str, compression: str, dictionary: bool
) -> None:
    options = {"data_page_version": version, "compression": compression}
    data = encoded(norms(), use_dictionary=dictionary, row_group_size=1000, **options)
    size = pq.read_table(io.BytesIO(data)).nbytes
    # A page has about 1 MB at most.
    assert size <= needed(data) <= size + pages._READ_AT_ONCE * 1_100_000
    one = needed(data, lambda path: path.startswith("norm/layer3.0.conv22"))
    assert needed(data) - one > 0.4 * size


def test_only_the_columns_that_are_read_count(tmp_path: Path) -> None:
    found = part(tmp_path, trace.encode_table(norms(rows=900)))
    assert found.read(["iteration"], limit=200_000).num_rows == 900
    with pytest.raises(RunDirectoryError, match=r"says it holds [\d,]+ bytes; not read"):
        found.read(["iteration", "norm/layer3.0.conv2"], limit=200_000)


def long_list() -> bytes:
    zeros = pa.array(np.zeros(30_000_000, np.float32))
    return encoded(pa.table({"x": pa.ListArray.from_arrays([0, len(zeros)], zeros)}))


def alike(kind: pa.DataType, **options: object) -> bytes:
    rows = pa.array(["x" * 20_000] * 5_000).cast(pa.binary()).cast(kind)
    return encoded(pa.table({"x": rows}), **options)


BOMBS: dict[str, Callable[[], bytes]] = {
    # Few rows, and what they hold is not in the footer, or a hundred times what it says.
    "a row that is a long list": long_list,
    "rows that have one long text": lambda: alike(pa.string()),
    "texts that begin alike": lambda: alike(
        pa.string(), use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"}
    ),
    "wide values that are alike": lambda: alike(pa.binary(20_000)),
}


POOLS: list[pa.MemoryPool] = []
"""Kept for good: what was allocated in one is given back to it later, and may outlive the test."""


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_decodes_to_more_than_it_says_is_not_decoded(
    bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_MAX_DECODED_BYTES", 90_000_000)
    found = part(tmp_path, BOMBS[bomb]())
    assert found.path.stat().st_size < 1_000_000
    pool = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(pool)
    POOLS.append(counted)
    pa.set_memory_pool(counted)
    try:
        with pytest.raises(RunDirectoryError, match=found.path.name):
            found.read()
    finally:
        pa.set_memory_pool(pool)
    assert counted.max_memory() < 20_000_000


def test_parts_that_fit_one_by_one_have_to_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in range(0, 9_000, 900):
        part(tmp_path, trace.encode_table(norms(900, 512)), first, first + 899)
    assert len(trace.read_parts(tmp_path)) == 10
    monkeypatch.setattr(trace, "_MAX_DECODED_BYTES", pq.read_table(tmp_path).nbytes * 3 // 4)
    assert len(trace.read_parts(tmp_path, newest=True)) == 1
    with pytest.raises(RunDirectoryError, match="not read"):
        trace.read_parts(tmp_path)


def header(*fields: tuple[int, int, bytes]) -> bytes:
    """Return a struct in Thrift's compact protocol, with long field headers."""
    return b"".join(bytes([kind, 2 * number]) + data for number, kind, data in fields) + b"\0"


SIZES = ((1, 5, b"\0"), (2, 5, b"\x08"), (3, 5, b"\x08"))
COUNT = (5, 12, header((1, 5, b"\x06"), (2, 5, b"\0")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(*SIZES), "of no kind"),
        (header(*SIZES[:2], COUNT), "how large"),
        (header((1, 5, b"\x02"), *SIZES[1:], COUNT), "of no kind"),  # an index page
        (header(*SIZES, (3, 5, b"\x7e"), COUNT), "twice"),
        (header(*SIZES[:2], (3, 6, b"\x08"), COUNT), "how large"),
        (header(*SIZES[:2], (3, 5, b"\xfe\xff\xff\xff\x7f"), COUNT), "how large"),
        (header(*SIZES[:2], (3, 5, b"\x07"), COUNT), "how large"),  # -4
        (header(*SIZES, (9, 9, b"\0"), COUNT), "that none has"),
        (b"\x1c" * 20, "too deep"),
        (header(*SIZES, COUNT)[:-1], "no end"),
        (b"\x18\xff\xff\x7f", "no end"),
    ],
)
def test_a_page_header_that_readers_may_take_for_different_ones_is_refused(
    data: bytes, message: str
) -> None:
    class Chunk:
        data_page_offset, dictionary_page_offset, total_compressed_size = 4, None, 8
        physical_type = "FLOAT"

    right = b"PAR1" + header(*SIZES, COUNT)
    assert list(pages._pages(io.BytesIO(right), Chunk)) == [(4, 3)]
    with pytest.raises(ValueError, match=message):
        list(pages._pages(io.BytesIO(b"PAR1" + data), Chunk))


# What is read is what was verified


def test_a_file_that_takes_anothers_place_is_not_read_in_its_stead(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"right")
    other.write_bytes(b"wrong")
    with storage.verified(file, (storage.fingerprint(b"right"),)) as opened:
        os.replace(other, file)  # noqa: PTH105
        assert opened.read() == b"right"


@pytest.mark.parametrize("age", [0, 10**11])
def test_a_file_that_changes_while_it_is_read_is_damaged(
    age: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"right")
    later = time.time_ns() + age
    monkeypatch.setattr(storage.time, "time_ns", lambda: later)
    with (
        pytest.raises(RunDirectoryError, match="not what was written"),
        storage.verified(file, (storage.fingerprint(b"right"),)) as opened,
    ):
        with file.open("r+b") as changed:
            changed.write(b"wrong")
        opened.read()


def test_a_file_that_memory_cannot_hold_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as sparse:
        sparse.truncate(storage.memory_share() + 1)
    with pytest.raises(RunDirectoryError, match="more than there is memory for"):
        storage.read(file, 1 << 60)
