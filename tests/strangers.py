"""What somebody may have put in a run directory that they hand over, with checksums that hold."""

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pgt_diag import checkpoint, trace
from pgt_diag.directory import open_info, seal_info
from pgt_diag.storage import fingerprint
from tests.damage import rename_to_content, reseal, vouch

Change = Callable[[Path], object]

VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**18, 2**63, 10**400, float("nan"), float("inf"), 1e308, "", "text",
    "x" * 100_000, "a\nb\x1b[2J", "\udcff", [], [1], [[]] * 9, {}, {"a": {"b": [None]}}, [None],
]  # fmt: skip


def info_of(run: Path) -> dict[str, Any]:
    """Return run.json's entries."""
    return open_info((run / "run.json").read_bytes())


def nested(depth: int, inner: Any = 1, *, key: str | None = None) -> Any:
    """Return lists, or dicts, within each other."""
    for _ in range(depth):
        inner = [inner] if key is None else {key: inner}
    return inner


def set_entry(key: str, value: Any) -> Change:
    """Return the change of one entry of run.json."""
    return lambda run: reseal(run, **{key: value})


def set_inner(*path: str | int, value: Any) -> Change:
    """Return the change of an entry within entries."""

    def change(run: Path) -> None:
        info = info_of(run)
        place: Any = info
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (run / "run.json").write_bytes(seal_info(info))

    return change


def raw_info(text: str) -> Change:
    """Return the change of run.json to any text; no checksum."""
    return lambda run: (run / "run.json").write_text(text)


def many_layers(count: int, filters: int = 1) -> Change:
    """Return the change to layers that the trace does not have."""
    layers = [
        {"name": f"l{i}", "filters": filters, "weight_shape": [1, 1, 1, 1], "activation": ""}
        for i in range(count)
    ]
    return set_entry("layers", layers)


def named_layer(name: Any) -> Change:
    """Return the change of one layer's name, in run.json and in the tables."""

    def change(run: Path) -> None:
        info = info_of(run)
        old, info["layers"][2]["name"] = info["layers"][2]["name"], name
        (run / "run.json").write_bytes(seal_info(info))
        edit_parts(run, "trace", lambda table: table.rename_columns(
            [column.replace(old, str(name)) for column in table.column_names]
        ))  # fmt: skip
        table = pq.read_table(run / "events.parquet")
        texts = [str(name) if each == old else each for each in table["layer"].to_pylist()]
        vouch(run, "events.parquet", trace.encode_table(
            table.set_column(1, "layer", pa.array(texts, pa.string()))
        ))  # fmt: skip

    return change


def edit_parts(run: Path, folder: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Write every part of a table anew, under a name that vouches for it."""
    for part in trace.all_parts(run / folder):
        rename_to_content(part.path, trace.encode_table(edit(pq.read_table(part.path))))


def part_edit(folder: str, edit: Callable[[pa.Table], pa.Table]) -> Change:
    """Return the change of a folder's parts."""
    return lambda run: edit_parts(run, folder, edit)


def part_bytes(folder: str, data: bytes) -> Change:
    """Return the change of a folder's parts to any content."""

    def change(run: Path) -> None:
        for part in trace.all_parts(run / folder):
            rename_to_content(part.path, data)

    return change


def column_as(name: str, make: Callable[[pa.Table], Any]) -> Callable[[pa.Table], pa.Table]:
    """Return an edit that puts something else in the place of a column."""

    def edit(table: pa.Table) -> pa.Table:
        chosen = next((each for each in table.column_names if each.startswith(name)), None)
        if chosen is None:
            return table
        return table.set_column(table.column_names.index(chosen), chosen, make(table))

    return edit


def encoded(table: pa.Table, **options: Any) -> bytes:
    """Return a Parquet file with any options."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def events_as(**columns: Callable[[pa.Table], Any]) -> Change:
    """Return the change of columns of the event log."""

    def change(run: Path) -> None:
        table = pq.read_table(run / "events.parquet")
        for name, make in columns.items():
            values = make(table)
            table = table.set_column(table.column_names.index(name), name, values)
        vouch(run, "events.parquet", encoded(table))

    return change


def full(value: Any, kind: pa.DataType) -> Callable[[pa.Table], pa.Array]:
    """Return a column of one value, as long as the table."""
    return lambda table: pa.array([value] * table.num_rows, kind)


def metrics_as(text: str) -> Change:
    """Return the change of metrics.csv."""
    return lambda run: vouch(run, "metrics.csv", text.encode("utf-8", "surrogateescape"))


def maps_as(edit: Callable[[dict[str, Any]], Any], **options: Any) -> Change:
    """Return the change of every snapshot's arrays; `edit` may return the file's bytes."""

    def change(run: Path) -> None:
        for file in sorted((run / "feature_maps").iterdir()):
            with np.load(file) as stored:
                arrays = dict(stored)
            data = edit(arrays)
            if not isinstance(data, bytes):
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **arrays, **options)
                data = buffer.getvalue()
            rename_to_content(file, data)

    return change


def header_only(shape: tuple[int, ...], stored: bytes = b"") -> bytes:
    """Return an array file that says more than it holds."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue() + stored


def archive(members: dict[str, bytes]) -> bytes:
    """Return a compressed archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def checkpoint_bytes(data: bytes) -> Change:
    """Return the change of every checkpoint to any content, vouched for by its name."""

    def change(run: Path) -> None:
        for file in checkpoint.found_in(run):
            file.unlink()
            digest = hashlib.sha256(data).hexdigest()
            (file.parent / f"{file.name[:23]}-{digest}.pt").write_bytes(data)

    return change


def checkpoint_edit(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Return the change of what every checkpoint holds."""

    def change(run: Path) -> None:
        for file in checkpoint.found_in(run):
            state = checkpoint.load(file)
            state = state if (other := edit(state)) is None else other
            buffer = io.BytesIO()
            torch.save(state, buffer)
            file.unlink()
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
            (file.parent / f"{file.name[:23]}-{digest}.pt").write_bytes(buffer.getvalue())

    return change


def in_checkpoint(*path: str | int, value: Any) -> Change:
    """Return the change of one entry of every checkpoint."""

    def edit(state: dict[str, Any]) -> None:
        place: Any = state
        for key in path[:-1]:
            place = place[key]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return checkpoint_edit(edit)


HUGE_IMAGES = checkpoint_edit(
    lambda state: state["config"].update(synthetic_images=1_000_000, image_size=32)
)


class Touch:
    """Pickled, it runs a command when it is loaded."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.witness}",))


def leaf_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each plain value, tensor or container lies in nested dicts and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaf_paths(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value[:3]):
            yield from leaf_paths(entry, (*path, index))


def moved_outside(name: str) -> Change:
    """Return the change of a file or folder to a link that leads outside the run."""

    def change(run: Path) -> None:
        outside = run.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.move(run / name, outside / Path(name).name)
        (run / name).symlink_to(outside / Path(name).name)

    return change


def in_place_of(name: str, make: Callable[[Path], object]) -> Change:
    """Return the change of a file or folder to something that is none."""

    def change(run: Path) -> None:
        place = run / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        make(place)

    return change


def make_socket(place: Path) -> None:
    """Make a socket; its path must be short."""
    here = Path.cwd()
    os.chdir(place.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


def _first(run: Path, pattern: str) -> str:
    return str(sorted(run.glob(pattern))[0].relative_to(run))


def first_of(pattern: str, change: Callable[[str], Change]) -> Change:
    """Return a change of the first file that a pattern finds."""
    return lambda run: change(_first(run, pattern))(run)


def info_changes() -> dict[str, Change]:
    """Return changes of run.json."""
    keys = (
        "status", "message", "model", "command", "config", "record_every", "min_spell",
        "collapsed_ratio", "planned_iterations", "iterations", "iterations_per_epoch", "overhead",
        "layers", "digests", "environment", "amp", "data", "gap_source", "resumed_from",
        "bad_images", "created", "ended", "schema_version",
    )  # fmt: skip
    changes = {
        f"{key} = {str(value)[:20]!r}": set_entry(key, value) for key in keys for value in VALUES
    }
    changes |= {
        f"layer {key} = {str(value)[:20]!r}": set_inner("layers", 0, key, value=value)
        for key in ("name", "filters", "weight_shape", "activation")
        for value in VALUES
    }
    changes |= {
        f"overhead = {str(value)[:20]!r}": set_entry(
            "overhead", {"recorder_seconds": value, "training_seconds": value}
        )
        for value in VALUES
    }
    changes |= {
        f"digests = {str(value)[:20]!r}": set_entry("digests", {"metrics.csv": value})
        for value in VALUES
    }
    return changes


def odd_info() -> dict[str, Change]:
    """Return changes of run.json as a whole."""
    return {
        "deep lists": raw_info("[" * 100_000 + "]" * 100_000),
        "deep dicts": raw_info('{"a":' * 100_000 + "1" + "}" * 100_000),
        "deep entry": raw_info('{"schema_version": 1, "config": ' + "[" * 900 + "]" * 900 + "}"),
        "deep sealed": set_entry("data", nested(300, key="a")),
        "a number of a million digits": raw_info('{"schema_version": ' + "9" * 1_000_000 + "}"),
        "twice the same key": raw_info('{"schema_version": 1, "schema_version": 1}'),
        "empty": raw_info(""),
        "NUL": raw_info("\0" * 100),
        "another checksum": lambda run: (run / "run.json").write_bytes(
            (run / "run.json").read_bytes().replace(b'"sha256": "', b'"sha256": "0')
        ),
        "100,000 layers": many_layers(100_000),
        "9,999 layers": many_layers(9_999),
        "many filters": many_layers(1, 1 << 20),
        "no layers": set_entry("layers", []),
        "a layer less": lambda run: reseal(run, layers=info_of(run)["layers"][:-1]),
        "layers twice": lambda run: reseal(run, layers=info_of(run)["layers"] * 2),
        "layers swapped": lambda run: reseal(run, layers=info_of(run)["layers"][::-1]),
        "config of nothing": set_entry("config", {}),
        "an unknown key in config": set_inner("config", "lerning_rate", value=1),
        "a path in config": set_inner("config", "data", value="../../etc/passwd"),
        "another model in config": set_inner("config", "model", value="os.system"),
        "a path as model": set_inner("config", "model", value="../../etc/passwd"),
        "a huge seed": set_inner("config", "seed", value=10**30),
        "huge epochs": set_inner("config", "epochs", value=10**30),
        "huge images": set_inner("config", "synthetic_images", value=10**9),
        "a command that is a formula": set_entry("command", ["=cmd|' /C calc'!A0", 1, None, {}]),
        "status finished": set_entry("status", "finished"),
        "status diverged": set_entry("status", "diverged"),
        "status running": set_entry("status", "running"),
    }


def trace_changes() -> dict[str, Change]:
    """Return changes of the norms and of the iterations."""
    lists = pa.list_(pa.float32(), 2)
    changes: dict[str, Change] = {}
    for folder, column in (
        ("trace", "weight_norm/"), ("trace", "gap_norm"), ("trace", "gradient_norm/"),
        ("iterations", "silent_filters"), ("iterations", "mean_clip_factor"),
        ("iterations", "loss"), ("iterations", "lr"), ("iterations", "iteration"),
        ("trace", "iteration"),
    ):  # fmt: skip
        replacements: dict[str, Callable[[pa.Table], Any]] = {
            "narrow lists": lambda t: pa.array([[1.0, 2.0]] * t.num_rows, lists),
            "empty lists": lambda t: pa.array([[]] * t.num_rows, pa.list_(pa.float32(), 0)),
            "lists of any length": lambda t: pa.array(
                [[1.0] * (i % 3) for i in range(t.num_rows)], pa.list_(pa.float32())
            ),
            "lists of lists": lambda t: pa.array(
                [[[1.0] * 2] * 3] * t.num_rows, pa.list_(pa.list_(pa.float32(), 2), 3)
            ),
            "null": lambda t: pa.nulls(t.num_rows),
            "null floats": lambda t: pa.nulls(t.num_rows, pa.float32()),
            "null lists": lambda t: pa.nulls(t.num_rows, lists),
            "text": full("1", pa.string()),
            "bytes": full(b"1", pa.binary()),
            "bool": full(True, pa.bool_()),
            "dates": full(1, pa.timestamp("us")),
            "decimals": full(1, pa.decimal128(5)),
            "structs": full({"a": 1}, pa.struct([("a", pa.int64())])),
            "maps": full([("a", 1)], pa.map_(pa.string(), pa.int64())),
            "dictionary": lambda t: pa.array(["a"] * t.num_rows).dictionary_encode(),
            "int32": full(1, pa.int32()),
            "uint64": full(2**64 - 1, pa.uint64()),
            "negative": full(-5, pa.int64()),
            "huge": full(2**62, pa.int64()),
            "backwards": lambda t: pa.array(range(t.num_rows)[::-1], pa.int64()),
            "NaN": full(float("nan"), pa.float32()),
            "infinite": full(float("inf"), pa.float32()),
            "doubles": full(1e300, pa.float64()),
            "huge doubles in lists": lambda t: pa.FixedSizeListArray.from_arrays(
                pa.array(np.full(t.num_rows * 64, 1e300)), 64
            ),
            "negative counts": lambda t: pa.FixedSizeListArray.from_arrays(
                pa.array(np.full(t.num_rows * 26, -7, np.int32)), 26
            ),
            "huge counts": lambda t: pa.FixedSizeListArray.from_arrays(
                pa.array(np.full(t.num_rows * 26, 2**31 - 1, np.int32)), 26
            ),
        }
        for kind, make in replacements.items():
            edit = column_as(column, make)
            changes[f"{folder} {column} {kind}"] = part_edit(folder, edit)
        changes[f"{folder} {column} missing"] = part_edit(
            folder,
            lambda t, column=column: t.drop_columns(
                [name for name in t.column_names if name.startswith(column)]
            ),
        )
        changes[f"{folder} {column} twice"] = part_edit(
            folder,
            lambda t, column=column: t.append_column(
                next((n for n in t.column_names if n.startswith(column)), "x"), t.column(0)
            ),
        )
    for folder in ("trace", "iterations", "events"):
        changes |= {
            f"{folder} empty file": part_bytes(folder, b""),
            f"{folder} no Parquet": part_bytes(folder, b"PAR1" * 10),
            f"{folder} no rows": part_edit(folder, lambda t: t.slice(0, 0)),
            f"{folder} a row less": part_edit(folder, lambda t: t.slice(1)),
            f"{folder} rows twice": part_edit(folder, lambda t: pa.concat_tables([t, t])),
            f"{folder} no columns": part_bytes(folder, encoded(pa.table({}))),
            f"{folder} of another table": part_bytes(folder, encoded(pa.table({"a": [1, 2]}))),
            f"{folder} 5,000 columns": part_bytes(
                folder,
                encoded(pa.table({"iteration": [0], **{f"c{i}": [1.0] for i in range(5_000)}})),
            ),
            f"{folder} gone": lambda run, folder=folder: shutil.rmtree(run / folder, True),
            f"{folder} an empty folder": in_place_of(folder, lambda place: place.mkdir()),
            f"{folder} a file": in_place_of(folder, lambda place: place.write_text("x")),
            f"{folder} a part with huge numbers": lambda run, folder=folder: _renumbered(
                run, folder, 999_999_999_998, 999_999_999_999
            ),
            f"{folder} a part backwards": lambda run, folder=folder: _renumbered(run, folder, 9, 2),
            f"{folder} a part that covers all": lambda run, folder=folder: _renumbered(
                run, folder, 0, 999_999_999_999
            ),
            f"{folder} parts that overlap": lambda run, folder=folder: [
                shutil.copy2(part.path, part.path.with_name(
                    f"part-{part.first:012d}-{part.last + 2:012d}-{part.fingerprint}.parquet"
                ))
                for part in trace.all_parts(run / folder)
            ],
        }  # fmt: skip
    return changes


def _renumbered(run: Path, folder: str, first: int, last: int) -> None:
    for part in trace.all_parts(run / folder)[-1:]:
        name = f"part-{first:012d}-{last:012d}-{part.fingerprint}.parquet"
        part.path.rename(part.path.with_name(name))


def event_changes() -> dict[str, Change]:
    """Return changes of the sealed tables."""
    changes: dict[str, Change] = {
        "unknown kind": events_as(kind=full("dead", pa.string())),
        "empty kind": events_as(kind=full("", pa.string())),
        "null kind": events_as(kind=full(None, pa.string())),
        "unknown layer": events_as(layer=full("nowhere", pa.string())),
        "null layer": events_as(layer=full(None, pa.string())),
        "layer of large text": events_as(layer=full("a", pa.large_string())),
        "layer as dictionary": events_as(layer=lambda t: t["layer"].dictionary_encode()),
        "layer as struct": events_as(layer=full({"a": 1}, pa.struct([("a", pa.int64())]))),
        "layer 99": events_as(layer_index=full(99, pa.int32())),
        "layer -1": events_as(layer_index=full(-1, pa.int32())),
        "null layer index": events_as(layer_index=full(None, pa.int32())),
        "filter 99999": events_as(filter=full(99_999, pa.int32())),
        "filter -1": events_as(filter=full(-1, pa.int32())),
        "null filter": events_as(filter=full(None, pa.int32())),
        "filter int64": events_as(filter=full(1, pa.int64())),
        "negative start": events_as(start_iteration=full(-9, pa.int64())),
        "huge start": events_as(start_iteration=full(2**62, pa.int64())),
        "late start": events_as(start_iteration=full(10**6, pa.int64())),
        "null start": events_as(start_iteration=full(None, pa.int64())),
        "end before start": events_as(
            start_iteration=full(5, pa.int64()), end_iteration=full(1, pa.int64())
        ),
        "huge end": events_as(end_iteration=full(2**62, pa.int64())),
        "smallest end": events_as(end_iteration=full(-(2**63), pa.int64())),
        "every event twice": lambda run: vouch(
            run, "events.parquet", encoded(pa.concat_tables(
                [pq.read_table(run / "events.parquet")] * 2
            ))
        ),
        "no events": lambda run: vouch(
            run, "events.parquet", encoded(trace.EVENT_SCHEMA.empty_table())
        ),
        "events without columns": lambda run: vouch(
            run, "events.parquet", encoded(pa.table({}))
        ),
        "events are text": lambda run: vouch(run, "events.parquet", b"no"),
        "events gone": lambda run: (run / "events.parquet").unlink(),
        "spells negative": lambda run: _spells(run, -5),
        "spells huge": lambda run: _spells(run, 2**62),
        "spells null": lambda run: _spells(run, None),
        "spells gone": lambda run: (run / "brief_spells.parquet").unlink(),
    }  # fmt: skip
    return changes


def _spells(run: Path, count: int | None) -> None:
    table = pq.read_table(run / "brief_spells.parquet")
    values = pa.array([count] * table.num_rows, pa.int64())
    table = table.set_column(table.column_names.index("spells"), "spells", values)
    vouch(run, "brief_spells.parquet", encoded(table))


HEADER = (
    "epoch,iteration,train_loss,train_accuracy,test_loss,test_accuracy,lr,seconds,"
    "images_per_second,recorder_seconds,dead_filters\n"
)


def metrics_changes() -> dict[str, Change]:
    """Return changes of metrics.csv."""
    row = "0,4,2.3,7.8,2.2,12.5,0.1,0.5,110.9,0.4,0\n"
    changes = {
        "metrics of text": metrics_as(HEADER + ",".join(["text"] * 11) + "\n"),
        "metrics of formulas": metrics_as(HEADER + ",".join(["=cmd|' /C calc'!A0"] * 11) + "\n"),
        "metrics of one column": metrics_as("test_accuracy\n12\n"),
        "metrics without numbers": metrics_as("epoch\n0\n"),
        "metrics header only": metrics_as(HEADER),
        "metrics empty": metrics_as(""),
        "metrics blank": metrics_as("\n\n\n"),
        "metrics of NUL": metrics_as("\0" * 100),
        "metrics of 10^6 columns": metrics_as(
            ",".join(f"c{i}" for i in range(10**6)) + "\n" + ",".join("1" * 10**6) + "\n"
        ),
        "metrics not UTF-8": metrics_as("epoch,\udcff\n1,2\n"),
        "metrics with an open quote": metrics_as(HEADER + '"0,4'),
        "metrics ragged": metrics_as(HEADER + "1,2\n1,2,3,4,5,6,7,8,9,10,11,12,13\n"),
        "metrics too wide": metrics_as("epoch,test_accuracy\n1,2,3\n1,2,3\n"),
        "metrics infinite": metrics_as(HEADER + ",".join(["inf"] * 11) + "\n"),
        "metrics missing": metrics_as(HEADER + "," * 10 + "\n"),
        "metrics huge": metrics_as(HEADER + ",".join(["9" * 400] * 11) + "\n"),
        "metrics negative": metrics_as(HEADER + ",".join(["-1e300"] * 11) + "\n"),
        "metrics of columns twice": metrics_as(
            HEADER.strip() + "," + HEADER + row.strip() + "," + row
        ),
        "metrics of 100,000 epochs": metrics_as(HEADER + row * 100_000),
        "metrics backwards": metrics_as(HEADER + row.replace("0,", "9,", 1) + row),
        "metrics with true": metrics_as(HEADER + ",".join(["True"] * 11) + "\n"),
        "metrics with dates": metrics_as(HEADER + ",".join(["2020-01-01"] * 11) + "\n"),
        "metrics gone": lambda run: (run / "metrics.csv").unlink(),
    }  # fmt: skip
    for place, name in enumerate(HEADER.strip().split(",")):
        values = row.strip().split(",")
        values[place] = "text"
        changes[f"metrics with text in {name}"] = metrics_as(HEADER + ",".join(values) + "\n")
        values[place] = ""
        changes[f"metrics with nothing in {name}"] = metrics_as(HEADER + ",".join(values) + "\n")
        names = HEADER.strip().split(",")
        del names[place], values[place]
        changes[f"metrics without {name}"] = metrics_as(
            ",".join(names) + "\n" + ",".join(values) + "\n"
        )
    return changes


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = value

    return edit


def map_changes(witness: Path) -> dict[str, Change]:
    """Return changes of the snapshots."""
    objects = np.array([Touch(str(witness))], dtype=object)
    numbers = np.zeros((4, 64, 7, 7), np.float32)
    changes = {
        f"{name} of objects": maps_as(_set(name, objects), allow_pickle=True)
        for name in ("iteration", "layer", "maps", "images", "labels")
    }
    changes |= {
        f"{name} missing": maps_as(lambda arrays, name=name: arrays.pop(name) is None)
        for name in ("layer", "maps", "images")
    }
    changes |= {
        "a pickle as snapshot": maps_as(lambda _: pickle.dumps(Touch(str(witness)))),
        "a snapshot that says 10^12": maps_as(
            lambda _: archive({"maps.npy": header_only((10**12,))})
        ),
        "a snapshot that says a negative shape": maps_as(
            lambda _: archive({"maps.npy": header_only((-1, -1))})
        ),
        "a snapshot of shape that overflows": maps_as(
            lambda _: archive({"maps.npy": header_only((2**32, 2**32))})
        ),
        "a snapshot without arrays": maps_as(lambda _: archive({})),
        "a snapshot with a path": maps_as(lambda _: archive({"../../x.npy": header_only((1,))})),
        "a snapshot of text": maps_as(lambda _: archive({"maps.npy": b"text"})),
        "a header that is code": maps_as(
            lambda _: archive({"maps.npy": b"\x93NUMPY\x01\x00" + (46).to_bytes(2, "little")
                               + b"__import__('os').system('touch x')".ljust(45) + b"\n"})
        ),
        "no archive": maps_as(lambda _: b"PK\x03\x04"),
        "maps of NaN": maps_as(_set("maps", numbers * np.nan)),
        "maps infinite": maps_as(_set("maps", numbers + np.inf)),
        "maps huge": maps_as(_set("maps", numbers + np.float32(3e38))),
        "maps of no channels": maps_as(_set("maps", numbers[:, :0])),
        "maps of no pixels": maps_as(_set("maps", numbers[..., :0])),
        "maps of another number": maps_as(_set("maps", numbers[:1])),
        "maps of doubles": maps_as(_set("maps", numbers.astype(np.float64))),
        "maps with more channels": maps_as(_set("maps", np.zeros((4, 999, 7, 7), np.float32))),
        "maps of one pixel": maps_as(_set("maps", np.zeros((4, 64, 1, 1), np.float32))),
        "maps of one row": maps_as(_set("maps", np.zeros((4, 64, 1, 5000), np.float32))),
        "images of no pixels": maps_as(_set("images", np.zeros((4, 3, 0, 0), np.uint8))),
        "images of four channels": maps_as(_set("images", np.zeros((4, 4, 8, 8), np.uint8))),
        "images large": maps_as(_set("images", np.zeros((4, 3, 1500, 1500), np.uint8))),
        "labels of NUL": maps_as(_set("labels", np.array(["\0", "\x1b[2J", "x" * 9999, ""]))),
        "labels of numbers": maps_as(_set("labels", np.arange(4))),
        "labels of a number": maps_as(_set("labels", np.int64(4))),
        "a layer that is not here": maps_as(_set("layer", np.asarray("nowhere"))),
        "a layer that is a number": maps_as(_set("layer", np.int64(1))),
        "iteration of text": maps_as(_set("iteration", np.asarray("x"))),
        "iteration negative": maps_as(_set("iteration", np.int64(-7))),
        "iteration huge": maps_as(_set("iteration", np.int64(2**62))),
        "iteration infinite": maps_as(_set("iteration", np.float64("inf"))),
        "iteration of many": maps_as(_set("iteration", np.arange(5))),
        "every snapshot the same": maps_as(_set("iteration", np.int64(0))),
        "a snapshot many times": lambda run: [
            os.link(file, file.with_name(f"iteration-{number:012d}-{file.name[-20:]}"))
            for file in sorted((run / "feature_maps").iterdir())[:1]
            for number in range(100, 130)
        ],
        "two snapshots of an iteration": _second_snapshot,
        "a snapshot with an odd name": lambda run: shutil.copy2(
            sorted((run / "feature_maps").iterdir())[0], run / "feature_maps" / "iteration-x.npz"
        ),
        "a snapshot that is a folder": lambda run: (
            run / "feature_maps" / f"iteration-{7:012d}-{'0' * 16}.npz"
        ).mkdir(),
    }  # fmt: skip
    return changes


def _second_snapshot(run: Path) -> None:
    file = min((run / "feature_maps").iterdir())
    with np.load(file) as stored:
        arrays = {**stored, "maps": 2 * stored["maps"]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    name = f"{file.name[:22]}-{fingerprint(buffer.getvalue())}.npz"
    file.with_name(name).write_bytes(buffer.getvalue())


def checkpoint_changes(witness: Path) -> dict[str, Change]:
    """Return changes of the checkpoints that need no look at what they hold."""
    huge = torch.zeros(1).expand(1 << 40)

    def pickled(value: Any, protocol: int = 2) -> bytes:
        return pickle.dumps(value, protocol=protocol)

    buffer = io.BytesIO()
    torch.save({"x": Touch(str(witness))}, buffer)
    legacy = io.BytesIO()
    torch.save({"x": Touch(str(witness))}, legacy, _use_new_zipfile_serialization=False)
    bomb = archive({"archive/data.pkl": pickled({}), "archive/data/0": b"\0" * (1 << 28)})
    return {
        "a pickle that runs a command": checkpoint_bytes(pickled(Touch(str(witness)))),
        "a torch file that runs a command": checkpoint_bytes(buffer.getvalue()),
        "a legacy torch file": checkpoint_bytes(legacy.getvalue()),
        "a legacy file with an archive behind it": checkpoint_bytes(
            legacy.getvalue() + archive_stored({"a/data.pkl": pickled({})})
        ),
        "an archive that is compressed": checkpoint_bytes(bomb),
        "an archive without a pickle": checkpoint_bytes(archive_stored({"a/x": b""})),
        "an archive of nothing": checkpoint_bytes(archive_stored({})),
        "an archive with a path": checkpoint_bytes(archive_stored({"../../x": b"x"})),
        "an empty checkpoint": checkpoint_bytes(b""),
        "a list": checkpoint_edit(lambda _: []),
        "a number": checkpoint_edit(lambda _: 1),
        "an empty dict": checkpoint_edit(lambda _: {}),
        "a huge view": in_checkpoint("extra", value=huge),
        "a huge view as sums": in_checkpoint("position", "sums", value=huge),
        "a huge view as norms": in_checkpoint("recorder", "encoder", "initial_norms", value=huge),
        "a huge view as brief": in_checkpoint(
            "recorder", "encoder", "spells", "brief", value=torch.zeros(1).expand(4, 1 << 38)
        ),
        "deep lists": in_checkpoint("extra", value=nested(300)),
        "lists that share": in_checkpoint("extra", value=shared(60)),
        "a sparse tensor": in_checkpoint(
            "position", "sums", value=torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,))
        ),
        "steps negative": in_checkpoint("recorder", "steps", value=-5),
        "steps huge": in_checkpoint("recorder", "steps", value=10**30),
        "epoch negative": in_checkpoint("position", "epoch", value=-1),
        "epoch huge": in_checkpoint("position", "epoch", value=10**9),
        "batch negative": in_checkpoint("position", "batch", value=-1),
        "batch huge": in_checkpoint("position", "batch", value=10**9),
        "another epoch": in_checkpoint("position", "epoch", value=0),
        "seconds NaN": in_checkpoint("recorder", "seconds", value=float("nan")),
        "seconds infinite": in_checkpoint("meter", "epoch_seconds", value=float("inf")),
        "seconds text": in_checkpoint("meter", "epoch_seconds", value="text"),
        "iterations negative": in_checkpoint("recorder", "encoder", "iterations", value=-1),
        "iterations huge": in_checkpoint("recorder", "encoder", "iterations", value=10**15),
        "iterations few": in_checkpoint("recorder", "encoder", "iterations", value=1),
        "events few": in_checkpoint("recorder", "encoder", "event_count", value=1),
        "events negative": in_checkpoint("recorder", "encoder", "event_count", value=-1),
        "rows few": in_checkpoint("recorder", "encoder", "last_stored", value=0),
        "rows huge": in_checkpoint("recorder", "encoder", "last_stored", value=10**18),
        "no encoder": in_checkpoint("recorder", "encoder", value=None),
        "other filters": in_checkpoint(
            "recorder", "encoder", "initial_norms", value=torch.zeros(7)
        ),
        "filters of text": in_checkpoint(
            "recorder", "encoder", "initial_norms", value=["a"] * 2954
        ),
        "unknown quantities": in_checkpoint(
            "recorder", "encoder", "windows", value={"../x": [torch.zeros(3), torch.zeros(3)]}
        ),
        "narrow windows": in_checkpoint(
            "recorder", "encoder", "windows",
            value={"weight_norm": [torch.zeros(3), torch.zeros(3)]},
        ),
        "unknown last": in_checkpoint("recorder", "encoder", "last", value={"x": torch.zeros(3)}),
        "narrow last": in_checkpoint(
            "recorder", "encoder", "last", value={"weight_norm": torch.zeros(3)}
        ),
        "spells narrow": in_checkpoint(
            "recorder", "encoder", "spells", "since", value=torch.zeros(4, 3)
        ),
        "spells of the future": in_checkpoint(
            "recorder", "encoder", "spells", "next_iteration", value=10**12
        ),
        "spells backwards": in_checkpoint(
            "recorder", "encoder", "spells", "next_iteration", value=-10
        ),
        "run.json that is a list": in_checkpoint("recorder", "directory", "info", value="[]"),
        "run.json that is a number": in_checkpoint("recorder", "directory", "info", value=7),
        "run.json that is deep": in_checkpoint(
            "recorder", "directory", "info", value="[" * 100_000 + "]" * 100_000
        ),
        "run.json with a long number": in_checkpoint(
            "recorder", "directory", "info", value='{"a": ' + "9" * 10_000 + "}"
        ),
        "run.json with odd images": in_checkpoint(
            "recorder", "directory", "info", value='{"bad_images": [1], "resumed_from": 5}'
        ),
        "run.json that cannot be read back": checkpoint_edit(_unreadable_info),
        "metrics of other columns": in_checkpoint(
            "recorder", "directory", "metrics", value="a,b\n1,2\n"
        ),
        "metrics of text": in_checkpoint("recorder", "directory", "metrics", value="\0text\n" * 9),
        "metrics that are a number": in_checkpoint("recorder", "directory", "metrics", value=5),
        "an unknown key in config": in_checkpoint("config", "lerning_rate", value=0.1),
        "a path in config": in_checkpoint("config", "data", value="../../etc/passwd"),
        "NUL in config": in_checkpoint("config", "data", value="\0"),
        "a config of another model": in_checkpoint("config", "model", value="shufflenet_v2_x0_5"),
        "a config of other images": in_checkpoint("config", "synthetic_images", value=100),
        "a config of huge images": HUGE_IMAGES,
        "a config of huge sizes": in_checkpoint("config", "image_size", value=4096),
        "a config of a huge batch": in_checkpoint("config", "batch_size", value=10**30),
        "a config of huge epochs": in_checkpoint("config", "epochs", value=10**30),
        "a config of many threads": in_checkpoint("config", "threads", value=4096),
        "a config that is a list": in_checkpoint("config", value=[]),
        "a config with numbers as keys": in_checkpoint("config", value={1: 2}),
        "momentum of another shape": checkpoint_edit(
            lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(3))
        ),
        "momentum of text": checkpoint_edit(
            lambda s: s["optimizer"]["state"][0].update(momentum_buffer="x")
        ),
        "momentum huge": checkpoint_edit(
            lambda s: s["optimizer"]["state"][0].update(momentum_buffer=huge)
        ),
        "momentum of doubles": checkpoint_edit(
            lambda s: s["optimizer"]["state"][0].update(
                momentum_buffer=s["optimizer"]["state"][0]["momentum_buffer"].double()
            )
        ),
        "momentum on meta": checkpoint_edit(
            lambda s: s["optimizer"]["state"][0].update(
                momentum_buffer=s["optimizer"]["state"][0]["momentum_buffer"].to("meta")
            )
        ),
        "no momentum": checkpoint_edit(lambda s: s["optimizer"]["state"].clear()),
        "group options of text": checkpoint_edit(
            lambda s: s["optimizer"]["param_groups"][0].update(lr="x", momentum="y")
        ),
        "a momentum of 5": checkpoint_edit(
            lambda s: s["optimizer"]["param_groups"][0].update(momentum=5.0)
        ),
        "weights of another shape": checkpoint_edit(
            lambda s: s["model"].update({next(iter(s["model"])): torch.zeros(3)})
        ),
        "weights missing": checkpoint_edit(lambda s: s["model"].pop(next(iter(s["model"])))),
        "weights of NaN": checkpoint_edit(
            lambda s: [w.fill_(torch.nan) for w in s["model"].values() if w.is_floating_point()]
        ),
        "random numbers of another size": in_checkpoint(
            "random", 0, "cpu", value=torch.zeros(3, dtype=torch.uint8)
        ),
        "random numbers of zeros": in_checkpoint(
            "random", 0, "cpu", value=torch.zeros(5056, dtype=torch.uint8)
        ),
        "random numbers of text": in_checkpoint("random", 0, "cpu", value="x"),
        "a scaler of text": in_checkpoint("scaler", value="x"),
    }  # fmt: skip


def _unreadable_info(state: dict[str, Any]) -> None:
    info = json.loads(state["recorder"]["directory"]["info"])
    info |= {"layers": 5, "planned_iterations": -1, "schema_version": 7, "overhead": "x"}
    state["recorder"]["directory"]["info"] = json.dumps(info)


def shared(depth: int) -> Any:
    """Return 2^depth leaves in lists that share each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value, value]
    return value


def archive_stored(members: dict[str, bytes]) -> bytes:
    """Return an uncompressed archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def place_changes() -> dict[str, Change]:
    """Return changes of what kind of thing a file or folder is."""
    names = (
        "trace", "iterations", "events", "brief_spells", "feature_maps", "checkpoints", "set-aside",
        "run.json", "metrics.csv", "events.parquet", "brief_spells.parquet", ".lock",
    )  # fmt: skip
    patterns = (
        "trace/part-*", "iterations/part-*", "events/part-*", "feature_maps/*", "checkpoints/*",
        "set-aside/*",
    )  # fmt: skip
    kinds: dict[str, Callable[[str], Change]] = {
        "a link outside": moved_outside,
        "a link to itself": lambda name: in_place_of(name, lambda p: p.symlink_to(p.name)),
        "a dangling link": lambda name: in_place_of(name, lambda p: p.symlink_to("nowhere")),
        "a link to /dev/zero": lambda name: in_place_of(name, lambda p: p.symlink_to("/dev/zero")),
        "a pipe": lambda name: in_place_of(name, os.mkfifo),
        "a socket": lambda name: in_place_of(name, make_socket),
        "a folder": lambda name: in_place_of(name, lambda p: p.mkdir()),
        "a file": lambda name: in_place_of(name, lambda p: p.write_bytes(b"x")),
    }
    changes: dict[str, Change] = {}
    for kind, make in kinds.items():
        changes |= {f"{name} is {kind}": make(name) for name in names}
        changes |= {f"{each} is {kind}": first_of(each, make) for each in patterns}
    changes |= {
        "odd names": lambda run: [
            (run / folder / name).write_text("x")
            for folder in (".", "trace", "feature_maps", "checkpoints", "set-aside")
            for name in ("a\nb", "\x1b]0;owned\x07", "..x", "é\u202e", "-rf", "x" * 250, "%s{}[/]")
        ],
        "a file with a name that is no text": lambda run: os.fdopen(
            os.open(bytes(run) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY), "w"
        ).close(),
        "deep folders": lambda run: (run / "trace" / "/".join("d" * 200)).mkdir(parents=True),
        "a temporary folder": lambda run: (run / "trace" / ".x.tmp").mkdir(),
        "temporary files": lambda run: (run / "trace" / ".part-x.parquet.tmp").write_text("x"),
        "many set aside": lambda run: [
            (run / "set-aside" / f"resume-{number:04d}").mkdir(parents=True)
            for number in range(5, 9)
        ],
    }
    return changes


if sys.platform == "win32":
    raise ImportError("links, pipes and sockets as on POSIX")
