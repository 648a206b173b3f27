"""Damage of any file of a run is found, named, and never trained on; an older checkpoint is used.

Bit flips anywhere, and truncations at every byte of the last two records of every kind of file.
"""

import json
import os
import random
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pgt_diag import checkpoint, storage, trace
from pgt_diag.check import check_run
from pgt_diag.directory import RunDirectory
from pgt_diag.errors import RunDirectoryError
from pgt_diag.reading import read_snapshots
from pgt_diag.resuming import resume_point
from pgt_diag.run import Run, load_run
from pgt_diag.training import train
from tests import runs
from tests.damage import (
    copy_of,
    files_of,
    finished_run,
    flip,
    interrupted_run,
    outcome,
    replaced,
    reseal,
)

FLIPS = 1_000
SAMPLED = 4_000
"""Of a file with more places to cut it at, so many evenly spread ones are taken."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted_run(tmp_path_factory.mktemp("interrupted") / "run")


def test_a_deleted_snapshot_is_missed(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    gone = sorted((run / "feature_maps").iterdir())[1]
    gone.unlink()
    assert [problem for problem in check_run(run).problems if gone.name in problem]


def kind_of(run: Path, file: Path) -> str:
    """Return what kind of file this is."""
    place = file.relative_to(run)
    return place.parts[0] + ("/" + place.parts[-2] if len(place.parts) > 2 else "")


def readings(run: Run) -> dict[str, Callable[[], object]]:
    """Return what `load_run` reads, by the file or folder that it comes from."""
    return {
        "metrics.csv": lambda: run.metrics,
        "trace": lambda: [run.weight_norms(layer.name) for layer in run.layers],
        "iterations": lambda: run.iterations,
        "events.parquet": lambda: run.events,
        "brief_spells.parquet": lambda: run.brief_spells,
        "feature_maps": lambda: run.feature_maps,
    }


def find_silent(run: Path, damaged: dict[Path, bytes]) -> list[str]:
    """Put damaged content in files; return those that are not named, or read all the same."""
    silent = []
    with replaced(damaged):
        problems = "\n".join(check_run(run).problems)
        silent += [f"{file}: not named" for file in damaged if str(file) not in problems]
        kinds = {kind_of(run, file) for file in damaged}
        try:
            loaded = load_run(run)
        except RunDirectoryError as error:
            return silent if "run.json" in str(error) else [*silent, str(error)]
        if "run.json" in kinds:
            silent.append("run.json was read")
        for kind in kinds & readings(loaded).keys():
            try:
                readings(loaded)[kind]()
            except RunDirectoryError:
                continue
            silent.append(f"{kind} was read")
    return silent


def find_silent_flips(runs_to_damage: list[Path], count: int, seed: int) -> tuple[list[str], int]:
    """Flip bits, one in each of some files at a time; return what was silent, and how many."""
    choose = random.Random(seed)
    silent: list[str] = []
    done = 0
    while done < count:
        run = choose.choice(runs_to_damage)
        files = files_of(run)
        small = [file for file in files if file.stat().st_size < 10_000]
        # run.json vouches for others, so it is damaged alone.
        single = choose.random() < 0.4
        chosen = [run / "run.json"] if single else choose.sample(files, 12) + small
        contents = {}
        for file in set(chosen) - (set() if single else {run / "run.json"}):
            data = file.read_bytes()
            last = len(data) - 1
            edge = min(200, last)
            byte = choose.choice(
                [
                    choose.randint(0, last),
                    choose.randint(0, edge),
                    choose.randint(last - edge, last),
                ]
            )
            contents[file] = flip(data, 8 * byte + choose.randrange(8))
        silent += find_silent(run, contents)
        done += len(contents)
    return silent, done


def test_no_bit_flip_in_any_file_is_silent(finished: Path, interrupted: Path) -> None:
    silent, count = find_silent_flips([finished, interrupted], FLIPS, seed=0)
    assert count >= FLIPS
    assert silent == []
    assert not check_run(finished).problems and not check_run(interrupted).problems


@pytest.mark.long
def test_no_bit_flip_is_silent_in_five_times_as_many(finished: Path, interrupted: Path) -> None:
    assert find_silent_flips([finished, interrupted], 5 * FLIPS, seed=1)[0] == []


def last_two_records(file: Path) -> int:
    """Return where the last two records of a file begin: pages, rows, entries or members."""
    data = file.read_bytes()
    if file.suffix == ".parquet":
        metadata = pq.read_metadata(file)
        starts = []
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                starts.append(column.dictionary_page_offset or column.data_page_offset)
        return sorted(starts)[-2] if len(starts) > 1 else 0
    if file.suffix in (".npz", ".pt"):
        with zipfile.ZipFile(file) as archive:
            return sorted(entry.header_offset for entry in archive.infolist())[-2]
    lines = data.splitlines(keepends=True)
    return len(data) - sum(map(len, lines[-2 if file.suffix == ".csv" else -4 :]))


def cuts(file: Path, limit: int) -> list[int]:
    """Return the lengths to cut a file to: every byte of its last two records, or so many."""
    lengths = range(last_two_records(file), file.stat().st_size)
    return list(lengths[:: -(-len(lengths) // limit)])


def find_silent_cuts(run: Path, limit: int) -> tuple[list[str], int]:
    """Cut one file of every kind, at each place; return what was silent, and how many."""
    kinds = {kind_of(run, file): file for file in files_of(run)}
    left = {file: cuts(file, limit) for file in kinds.values()}
    count = sum(map(len, left.values()))
    silent = []
    for length in left.pop(run / "run.json"):
        silent += find_silent(run, {run / "run.json": (run / "run.json").read_bytes()[:length]})
    contents = {file: file.read_bytes() for file in left}
    while any(left.values()):
        damaged = {file: contents[file][: where.pop()] for file, where in left.items() if where}
        silent += find_silent(run, damaged)
    return silent, count


@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_no_truncation_in_the_last_two_records_is_silent(
    which: str, request: pytest.FixtureRequest
) -> None:
    silent, count = find_silent_cuts(request.getfixturevalue(which), limit=100)
    assert count > 500
    assert silent == []


@pytest.mark.long
@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_no_truncation_at_any_byte_of_the_last_two_records_is_silent(
    which: str, request: pytest.FixtureRequest
) -> None:
    assert find_silent_cuts(request.getfixturevalue(which), limit=SAMPLED)[0] == []


def reader_of(file: Path) -> Callable[[], object] | None:
    """Return what reads a file that has its fingerprint in its name."""
    if file.suffix == ".pt":
        return lambda: checkpoint.load(file)
    if file.suffix == ".npz":
        return lambda: read_snapshots([file])
    found = [part for part in trace.all_parts(file.parent) if part.path == file]
    return found[0].read if found else None


@pytest.mark.long
@pytest.mark.parametrize("which", ["finished", "interrupted"])
def test_no_file_cut_at_any_byte_of_its_last_two_records_is_read(
    which: str, request: pytest.FixtureRequest
) -> None:
    """The other kinds of file are small enough for the tests above to have every byte of them."""
    run = request.getfixturevalue(which)
    count, silent = 0, []
    for file in {kind_of(run, file): file for file in files_of(run)}.values():
        read = reader_of(file)
        if read is None:
            assert file.stat().st_size - last_two_records(file) <= SAMPLED
            continue
        with replaced({file: file.read_bytes()}):
            for length in reversed(cuts(file, file.stat().st_size)):
                os.truncate(file, length)
                count += 1
                try:
                    read()
                except RunDirectoryError as error:
                    silent += [] if str(file) in str(error) else [str(error)]
                else:
                    silent.append(f"{file}: read, cut to {length:,} bytes")
    print(f"{count} truncations")
    assert count > 10_000
    assert silent == []


def test_a_flip_that_keeps_the_time_of_the_file_is_found(finished: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy2(next((finished / "trace").iterdir()), tmp_path))
    part = trace.Part(file, 0, 1, re.findall(r"-([0-9a-f]{16})\.", file.name)[0])
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    data = file.read_bytes()
    part.verify()
    with file.open("r+b") as stream:
        stream.write(flip(data[:1], 3))
    os.utime(file, ns=times)
    with pytest.raises(RunDirectoryError, match=re.escape(file.name)):
        part.verify()
    file.write_bytes(data)
    part.verify()


def test_a_file_that_did_not_change_for_long_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    found = (storage.fingerprint(b"content"),)
    read = []
    digest = storage.hashlib.file_digest
    monkeypatch.setattr(
        storage.hashlib, "file_digest", lambda *each: read.append(each) or digest(*each)
    )
    later = time.time_ns() + 10**11
    monkeypatch.setattr(storage.time, "time_ns", lambda: later)
    storage.verify(file, found)
    storage.verify(file, found)
    assert len(read) == 1


def test_entries_that_could_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"would have .* most of them bad_images"):
        directory.update({"bad_images": [{"path": "x" * 1000}] * 20_000})
    directory.unlock()
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.fixture(scope="module")
def whole(interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path = copy_of(interrupted, tmp_path_factory.mktemp("whole") / "run")
    return resumed(path)


def resumed(path: Path) -> dict[str, object]:
    """Go on to the end; return all that was recorded."""
    point = resume_point(path)
    train(point.config, path, resume=point)
    return runs.contents(path)


def damage(file: Path) -> None:
    """Flip a bit in the middle, in a file of its own."""
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(flip(data, 4 * len(data)))


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(
    interrupted: Path, whole: dict[str, object], tmp_path: Path
) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    newest, older = checkpoint.found_in(path)
    damage(newest)
    point = resume_point(path)
    assert point.checkpoint == older
    assert any(newest.name in each for each in point.damaged)
    assert runs.difference(resumed(path), whole) is None
    assert (path / "set-aside" / "checkpoints" / newest.name).exists()


def test_without_an_intact_checkpoint_each_one_is_named(interrupted: Path, tmp_path: Path) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    before = checkpoint.found_in(path)
    for file in before:
        damage(file)
    code, _, error = outcome("train", "--run-dir", path, "--resume")
    assert code == 3
    assert len(error.splitlines()) == 1
    assert all(file.name in error for file in before)
    assert checkpoint.found_in(path) == before


@pytest.mark.parametrize("folder", ["iterations", "trace", "events"])
def test_what_was_recorded_before_a_checkpoint_must_be_intact(
    folder: str, interrupted: Path, tmp_path: Path
) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    first = trace.parts(path / folder)[0].path
    damage(first)
    code, _, error = outcome("train", "--run-dir", path, "--resume")
    assert code == 3
    assert first.name in error
    assert str(first) in "\n".join(check_run(path).problems)


def test_a_checkpoint_whose_trace_is_damaged_gives_way_to_the_one_before(
    interrupted: Path, whole: dict[str, object], tmp_path: Path
) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    newest, older = checkpoint.found_in(path)
    damage(trace.parts(path / "iterations")[-1].path)
    assert resume_point(path).checkpoint == older
    assert newest.exists()


def test_a_changed_number_in_run_json_is_found(finished: Path) -> None:
    file = finished / "run.json"
    text = file.read_text()
    changed = text.replace('"lr": 0.005', '"lr": 0.006')
    assert changed != text and json.loads(changed)
    assert find_silent(finished, {file: changed.encode()}) == []
    with replaced({file: text.encode()}):
        reseal(finished, iterations=7)
        assert "8 of 7 iterations" in "\n".join(check_run(finished).problems)
