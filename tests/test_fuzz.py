"""A stranger's runs and configurations cannot hurt: no traceback, no hang, nothing run or reached.

Checksums hold in all of these: whoever makes a run directory up can make them hold.
"""

import contextlib
import hashlib
import io
import itertools
import json
import random
import shutil
import signal
import string
import subprocess
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pgt_diag import checkpoint, trace
from pgt_diag.config import _RANGES, _TYPES
from pgt_diag.errors import RunDirectoryError
from pgt_diag.run import load_run
from tests import strangers
from tests.damage import (
    COMMANDS,
    EXIT_CODES,
    OPTIONS,
    copy_of,
    files_of,
    finished_run,
    flip,
    interrupted_run,
    outcome,
    read_by,
    rename_to_content,
    vouch,
)

CONFIGURATIONS, RUNS = 200, 300
SECONDS = 60
"""No command may take so long; a loaded machine needs a few."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted_run(tmp_path_factory.mktemp("interrupted") / "run")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`train` in this process takes the signals; put them back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(seconds: int = 7 * SECONDS) -> Iterator[None]:
    """Fail instead of hanging."""

    def fail(*_: object) -> None:
        pytest.fail("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def survive(
    run: Path,
    target: Path,
    change: Callable[[Path], object],
    commands: Iterable[str] = COMMANDS,
) -> dict[str, tuple[int, str]]:
    """Let commands read a changed copy of a run."""
    path = copy_of(run, target / "run")
    try:
        with contextlib.suppress(FileNotFoundError, IndexError):
            change(path)
        with time_limit():
            return read_by(path, commands)
    finally:
        shutil.rmtree(target)


WITNESS = Path("witness")
GROUPS: dict[str, dict[str, strangers.Change]] = {
    "run.json": strangers.odd_info(),
    "entries": strangers.info_changes(),
    "trace": strangers.trace_changes(),
    "events": strangers.event_changes(),
    "metrics": strangers.metrics_changes(),
    "feature maps": strangers.map_changes(WITNESS),
    "checkpoints": strangers.checkpoint_changes(WITNESS),
    "places": strangers.place_changes(),
}
SLOW = ("100,000 layers", "9,999 layers", "many filters", "metrics of 10^6 columns")
SHARE = 20
"""One case in so many is tried each time, of checkpoints one in three; all in the long form."""


def cases() -> Iterator[Any]:
    """Yield the hostile runs: group, name, and whether it is the finished or the other run."""
    for group, changes in GROUPS.items():
        share = 3 if group == "checkpoints" else SHARE
        for place, name in enumerate(changes):
            which = "interrupted" if place % 2 or group == "checkpoints" else "finished"
            # Which ones is the same each time, and spread over the group.
            chosen = zlib.crc32(name.encode()) % share == 0 and name not in SLOW
            marks = () if chosen else pytest.mark.long
            yield pytest.param(group, name, which, id=f"{group}-{place}", marks=marks)


@pytest.mark.parametrize(("group", "name", "which"), list(cases()))
def test_a_hostile_run_ends_in_one_line_at_most(
    group: str,
    name: str,
    which: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    commands = ("resume",) if group == "checkpoints" else ("report", "check", "watch", "dry run")
    survive(request.getfixturevalue(which), tmp_path / "target", GROUPS[group][name], commands)
    assert not (tmp_path / WITNESS).exists(), f"{name}: code was run"


def test_a_pickle_that_numpy_or_torch_would_run_does_run(tmp_path: Path) -> None:
    """The payload works: what keeps it from running is how files are read."""
    import pickle

    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps(strangers.Touch(str(witness))))
    assert witness.exists()


@pytest.mark.parametrize(
    "name", ["trace", "iterations", "events", "feature_maps", "checkpoints", "metrics.csv"]
)
def test_what_a_link_leads_to_is_neither_read_nor_touched(
    name: str, interrupted: Path, tmp_path: Path
) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    strangers.moved_outside(name)(path)
    outside = tmp_path / "outside" / name
    before = sorted((file, file.stat().st_mtime_ns) for file in [outside, *outside.rglob("*")])
    codes = {command: code for command, (code, _) in read_by(path).items()}
    assert codes["check"] == 1
    assert codes["resume"] == 3
    if name in ("iterations", "metrics.csv", "feature_maps"):
        assert codes["report"] == 3
    code, _, error = outcome("train", *options(), "--run-dir", path, "--force")
    assert code == 3 and "is a link" in error
    after = sorted((file, file.stat().st_mtime_ns) for file in [outside, *outside.rglob("*")])
    assert after == before


def options() -> list[str]:
    """Return the tiny run's options."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]


BOMBS: dict[str, strangers.Change] = {
    "rows that are all the same": strangers.part_bytes(
        "iterations",
        strangers.encoded(
            pa.table({"iteration": pa.array(np.zeros(20_000_000, np.int64))}), compression="zstd"
        ),
    ),
    "a snapshot of zeros": strangers.maps_as(
        lambda arrays: arrays.update(maps=np.zeros((4, 64, 600, 600), np.float32))
    ),
    "a compressed checkpoint": strangers.checkpoint_bytes(
        strangers.archive({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(1 << 29)})
    ),
    "synthetic images": strangers.HUGE_IMAGES,
}
LIMITED = """
import json, os, resource, sys
from commands.app import main
from tests.crash import register_net
import torch, pandas, pyarrow
register_net()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
codes = []
for command in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
        sys.exit(main(command))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_unpacks_to_gigabytes_does_not_fill_the_memory(
    bomb: str, interrupted: Path, tmp_path: Path
) -> None:
    path = copy_of(interrupted, tmp_path / "run")
    BOMBS[bomb](path)
    commands = [["show", str(path)], ["train", "--run-dir", str(path), "--resume", "--dry-run"]]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(commands)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,
        check=True,
    )
    codes = json.loads(result.stdout.splitlines()[-1])
    assert len(codes) == len(commands)
    assert set(codes) <= set(EXIT_CODES), result.stderr[-2000:]
    assert "Traceback" not in result.stderr


def storage_of(size: int) -> bytes:
    """Return a torch file with a tensor of four numbers that says its storage has `size` bytes."""
    buffer = io.BytesIO()
    torch.save({"x": torch.arange(4, dtype=torch.uint8)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        records = {entry.filename: file.read(entry) for entry in file.infolist()}
    (name,) = (name for name in records if name.endswith("data.pkl"))
    four = b"K\x04"  # as pickled, of the storage and of the tensor
    assert records[name].count(four) == 2
    records[name] = records[name].replace(four, b"J" + size.to_bytes(4, "little"))
    return strangers.archive_stored(records)


def test_a_checkpoint_cannot_make_memory_beyond_its_bytes_readable(tmp_path: Path) -> None:
    for size, refused in ((4, False), (100_000, True)):
        data = storage_of(size)
        digest = hashlib.sha256(data).hexdigest()
        path = tmp_path / f"checkpoint-{size:012d}-{digest}.pt"
        path.write_bytes(data)
        if refused:
            with pytest.raises(RunDirectoryError, match="is no checkpoint"):
                checkpoint.load(path)
        else:
            assert checkpoint.load(path)["x"].tolist() == [0, 1, 2, 3]


# Configurations


def random_value(choose: random.Random) -> str:
    """Return a value as TOML text: of the right kind, the wrong one, or none at all."""
    plain = [
        "0", "1", "-1", "2", "3.5", "-0.5", "1e400", "nan", "-inf", "9" * 30, "9" * 5000,
        "0x" + "f" * 5000, "true", "false", '""', '"x"', '"pgt"', '"auto"', '"cpu"', "[]", "[1]",
        "[3, 1]", '["a"]', "{}", "{a = 1}", "1979-05-27", "07:32:00", '"\\u0000"', '"../../etc"',
        '"\\u001b[2J"', "'''\na\n'''", '"' + "x" * 3000 + '"', "[[[[1]]]]", "1e-320", "4096",
    ]  # fmt: skip
    return choose.choice(plain)


def misspelt(choose: random.Random, key: str) -> str:
    """Return a key that is nearly right."""
    place = choose.randrange(len(key))
    letter = choose.choice(string.ascii_lowercase)
    return choose.choice(
        [
            key[:place] + key[place + 1 :] or "x",
            key[:place] + letter + key[place:],
            key[:place] + letter + key[place + 1 :],
            key.upper(),
            key.replace("_", "-"),
            key + "s",
        ]
    )


def random_toml(choose: random.Random) -> bytes:
    """Return a configuration file."""
    kind = choose.random()
    if kind < 0.08:
        return choose.randbytes(choose.randint(1, 400))
    if kind < 0.12:
        return b"a = " + b"[" * choose.choice([50, 5_000]) + b"]" * choose.choice([50, 5_000])
    if kind < 0.16:
        return ("[" + ".".join("t" * choose.randint(1, 400)) + "]\nlr = 1").encode()
    keys = [*_TYPES, "preset"]
    lines = []
    for _ in range(choose.randint(1, 4)):
        key = choose.choice(keys)
        key = misspelt(choose, key) if choose.random() < 0.3 else key
        lines.append(f"{key} = {random_value(choose)}")
    if choose.random() < 0.1:
        lines.insert(choose.randint(0, len(lines)), choose.choice(["[train]", "[[runs]]", "[lr]"]))
    return "\n".join(lines).encode()


def check_configurations(count: int, seed: int, folder: Path) -> int:
    """Try so many configurations; return how many were refused."""
    choose = random.Random(seed)
    refused = 0
    for number in range(count):
        file = folder / "run.toml"
        data = random_toml(choose)
        file.write_bytes(data)
        small = [f"--{key}={value}" for key, value in (
            ("dataset", "synthetic"), ("model", "squeezenet1_1"), ("image-size", 32),
            ("threads", 1), ("device", "cpu"), ("synthetic-images", 64), ("workers", 0),
        )]  # fmt: skip
        with time_limit():
            code, _, error = outcome(
                "train", "--config", file, *small, "--run-dir", folder / "run", "--dry-run"
            )
        note = (number, data[:300], code, error)
        assert code in (0, 2, 3, 4), note
        assert len(error.splitlines()) == (code != 0), note
        if code == 2:
            refused += 1
            check_message(data, error, file, note)
    assert not (folder / "run").exists()
    return refused


def check_message(data: bytes, error: str, file: Path, note: object) -> None:
    """A mistake in the file is told with the file, the key and, if there is one, a near key."""
    assert str(file) in error or "--" in error, note
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        assert "cannot be read as TOML" in error, note
        return
    if str(file) in error:
        keys = {key[:50] for key in values} | {key.replace("-", "_")[:50] for key in values}
        assert any(key in error for key in keys), note
    if "did you mean" in error:
        assert any(f"'{key}'" in error.partition("did you mean")[2] for key in (*_TYPES, "preset"))
    elif "unknown key" in error:
        assert "keys are the options" in error or "keys stand at the top level" in error, note


def test_no_configuration_makes_a_traceback_or_a_vague_message(tmp_path: Path) -> None:
    assert check_configurations(CONFIGURATIONS, 0, tmp_path) > CONFIGURATIONS / 2


@pytest.mark.long
def test_no_configuration_of_a_thousand_makes_a_traceback(tmp_path: Path) -> None:
    check_configurations(5 * CONFIGURATIONS, 1, tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate = 0.1", ["lerning_rate", "0.1", "did you mean 'lr'"]),
        ("learning_rate = 0.1", ["learning_rate", "did you mean 'lr'"]),
        ("zzz = 1", ["zzz", "keys are the options"]),
        ("[train]\nlr = 0.1", ["train.lr", "top level", "'lr'"]),
        ("[a.b.c]\nepohcs = 3", ["a.b", "top level"]),
        ("batch-size = 4\nbatch_size = 8", ["batch_size is given twice"]),
        ("momentum = 0", ["nesterov", "momentum is 0"]),
        ("epochs = 3\nwarmup_epochs = 9", ["warmup_epochs is 9.0", "3 epochs"]),
        ("accumulate = 1000", ["accumulate is 1000"]),
        ('presett = "smoke"', ["presett", "'preset'"]),
        ("seed = 1" + "0" * 5000, ["cannot be read as TOML"]),
        ("seed = 0x" + "f" * 5000, ["seed is too large a number"]),
        ("lr = 1" + "0" * 400, ["lr is 1000", "too large"]),
        ("synthetic_images = 1000000\nimage_size = 4096\ndataset = 'synthetic'", ["do not fit"]),
    ],
)
def test_a_mistake_in_a_file_names_file_key_value_and_remedy(
    text: str, parts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, _, error = outcome("train", "--config", file, "--dry-run")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert str(file) in error
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(("key", "low"), [each[:2] for each in _RANGES])
def test_a_value_out_of_range_is_told_as_it_was_given(key: str, low: int, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"{key} = {low - 1}")
    option = f"--{key.replace('_', '-')}"
    for arguments, told in (
        ([f"{option}={low - 1}"], f"{option} is {low - 1}"),
        ([f"--config={file}"], f"{file}: {key} is {low - 1}"),
    ):
        code, _, error = outcome("train", *arguments)
        assert code == 2
        assert error.startswith(f"pgt-diag: error: {told}"), error


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("epochs = 5", ["--epochs=0"], "--epochs is 0"),
        ("nesterov = true", ["--momentum=0"], "{file}: nesterov is on and --momentum is 0"),
        ("momentum = 0", [], "{file}: nesterov is on and momentum is 0"),
        ("momentum = 0", ["--nesterov"], "{file}: --nesterov is on and momentum is 0"),
        ("epochs = 1", ["--warmup-epochs=3"], "--warmup-epochs is 3.0, more than the run's 1"),
        ("model = 'resnet19'", [], "{file}: model is 'resnet19'"),
        ("feature_map_layer = 99", [], "{file}: feature_map_layer is 99"),
        ("alpha = 0.5", ["--alpha=0.25"], "--alpha has no effect with --method baseline"),
    ],
)
def test_a_mistake_is_blamed_on_where_it_was_made(
    text: str, options: list[str], told: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    code, _, error = outcome("train", "--config", file, *options, "--dry-run")
    assert code == 2
    assert error.startswith(f"pgt-diag: error: {told.format(file=file)}"), error


def test_a_configuration_file_without_end_is_not_read_to_the_end() -> None:
    code, _, error = outcome("train", "--config", "/dev/zero", "--dry-run")
    assert (code, "more than" in error) == (2, True)


# Run directories


def mutate_info(choose: random.Random, run: Path) -> None:
    info = strangers.info_of(run)
    for _ in range(choose.randint(1, 3)):
        path = choose.choice(list(strangers.leaf_paths(info)))
        with contextlib.suppress(KeyError, IndexError, TypeError):
            strangers.set_inner(*path, value=choose.choice(strangers.VALUES))(run)


def mutate_part(choose: random.Random, run: Path) -> None:
    found = [
        p for folder in ("trace", "iterations", "events") for p in trace.all_parts(run / folder)
    ]
    part = choose.choice(found)
    table = pq.read_table(part.path)
    names = table.column_names
    place = choose.randrange(len(names))
    column = table.column(place)
    kinds = [pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.bool_()]
    match choose.randrange(6):
        case 0:
            table = table.drop_columns([names[place]])
        case 1:
            table = table.rename_columns([*names[:place], "x", *names[place + 1 :]])
        case 2:
            other = pa.array([choose.choice([0, 1])] * table.num_rows, choose.choice(kinds[:4]))
            table = table.set_column(place, names[place], other)
        case 3:
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                table = table.set_column(place, names[place], column.cast(choose.choice(kinds)))
        case 4:
            table = table.slice(choose.randrange(table.num_rows + 1))
        case _:
            other = table.column(choose.randrange(len(names)))
            table = table.set_column(place, names[place], other)
    rename_to_content(part.path, strangers.encoded(table))


def mutate_names(choose: random.Random, run: Path) -> None:
    files = [file for file in files_of(run) if file.name != "run.json"]
    one, other = choose.sample(files, 2)
    match choose.randrange(5):
        case 0:
            one.unlink()
        case 1:
            content = one.read_bytes()
            for file, data in ((one, other.read_bytes()), (other, content)):
                file.unlink()
                file.write_bytes(data)
        case 2:
            with contextlib.suppress(shutil.SameFileError):
                shutil.copy2(one, other.parent / one.name)
        case 3:
            number = f"{choose.choice([0, 1, 5, 10**6, 10**12 - 1]):012d}"
            parts = one.name.split("-")
            parts[choose.randrange(len(parts))] = number
            one.rename(one.with_name("-".join(parts)))
        case _:
            shutil.rmtree(choose.choice([each for each in run.iterdir() if each.is_dir()]))


def mutate_bytes(choose: random.Random, run: Path) -> None:
    file = choose.choice(files_of(run))
    data = file.read_bytes()
    for _ in range(choose.randint(1, 9)):
        data = flip(data, choose.randrange(8 * len(data)))
    sealed = choose.random() < 0.6
    if sealed and file.suffix in (".parquet", ".npz") and file.parent != run:
        rename_to_content(file, data)
    elif sealed and file.name != "run.json" and file.parent == run:
        vouch(run, file.name, data)
    elif sealed and file.suffix == ".pt":
        strangers.checkpoint_bytes(data)(run)
    else:
        file.unlink()
        file.write_bytes(data)


def mutate_checkpoint(choose: random.Random, run: Path) -> None:
    if checkpoint.found_in(run):
        paths = list(strangers.leaf_paths(checkpoint.load(checkpoint.found_in(run)[0])))
        value = choose.choice(strangers.VALUES)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            strangers.in_checkpoint(*choose.choice(paths), value=value)(run)


MUTATIONS = (mutate_info, mutate_part, mutate_names, mutate_bytes, mutate_checkpoint)


def check_runs(runs: list[Path], count: int, seed: int, folder: Path) -> None:
    """Let one command read each of so many randomly changed runs."""
    choose = random.Random(seed)
    mutations = itertools.cycle(MUTATIONS)
    for number in range(count):
        run, mutate = choose.choice(runs), next(mutations)
        (folder / "target").mkdir()
        resumes = ["resume"] if mutate is mutate_checkpoint else list(COMMANDS)
        commands = [choose.choice(resumes)]
        try:
            survive(
                run,
                folder / "target",
                lambda path, mutate=mutate: mutate(choose, path),
                commands,
            )
        except BaseException as error:
            error.add_note(f"run {number} of seed {seed}: {mutate.__name__}")
            raise


def test_no_changed_run_makes_a_traceback_or_hangs(
    finished: Path, interrupted: Path, tmp_path: Path
) -> None:
    check_runs([finished, interrupted], RUNS, 0, tmp_path)


def test_metrics_without_a_column_epoch_are_of_one_epoch_a_row(
    finished: Path, tmp_path: Path
) -> None:
    path = copy_of(finished, tmp_path / "run")
    strangers.metrics_as("test_accuracy\n12\n34\n")(path)
    assert load_run(path).metrics.to_dict("list") == {"epoch": [0, 1], "test_accuracy": [12, 34]}
    assert {code for code, _ in read_by(path, ["report", "show", "watch"]).values()} == {0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a snapshot many times", "it is of another iteration than its name says"),
        ("every snapshot the same", "it is of another iteration than its name says"),
        ("two snapshots of an iteration", "another snapshot is of the same iteration"),
    ],
)
def test_an_iteration_has_one_snapshot(
    name: str, told: str, finished: Path, tmp_path: Path
) -> None:
    change = GROUPS["feature maps"][name]
    (tmp_path / "target").mkdir()
    code, error = survive(finished, tmp_path / "target", change, ["report"])["report"]
    assert (code, told in error) == (3, True)


@pytest.mark.long
def test_no_changed_run_of_a_thousand_makes_a_traceback(
    finished: Path, interrupted: Path, tmp_path: Path
) -> None:
    check_runs([finished, interrupted], 1_000, 1, tmp_path)
