"""`pgt-diag sweep`: many runs, a directory each; done ones are skipped, others go on."""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pgt_diag.config import BatchPer, Device, LrRule, as_typed
from pgt_diag.errors import ConfigurationError
from pgt_diag.preflight import check_choices, check_download, check_there
from pgt_diag.sweep.grid import (
    Grid,
    Row,
    SweepPreset,
    build_grid,
    parse_value,
    read_grid,
)
from pgt_diag.text import quoted

if TYPE_CHECKING:
    from pgt_diag.sweep.status import RowStatus

EPILOG = """\b
Examples:
  pgt-diag sweep --preset table2-smoke         on digits: 44 minutes, 2 cores
  pgt-diag sweep --preset table2 --data IMAGENET_DIR --seeds 3 --dry-run
  pgt-diag sweep --preset table1 --data IMAGENET_DIR --sweep-dir sweeps/bn
  pgt-diag sweep --preset table3 --data IMAGENET_DIR --sweep-dir sweeps/bn
  pgt-diag sweep --config grid.toml --set epochs=5 --engine ray
  pgt-diag sweep --config grid.toml --engine slurm --gpus-per-run 1
  pgt-diag report sweeps/table2-smoke          also while the sweep runs

\b
A grid is a TOML file of train's options; lists are axes, and are crossed:
  preset = "fashion"           train's recipe to start from
  epochs = 3                   the same for every run
  batch_size = [64, 128]       an axis
  seed = [0, 1, 2]
  lr_rule = "linear"           or "constant"; also lr_base_batch
  [\\[row]]                      optional: a grid of its own over what is above
  method = "baseline"
  [\\[row]]
  method = ["pgt", "agc+pgt"]
  alpha = [0.25, 0.5]

The same command again goes on: finished runs are skipped, interrupted ones
resumed, failed ones told again (--retry-failed makes them anew). A changed
configuration is another run. Slurm's tasks first run setup.sh of the sweep's
directory, where there is one: for module load and the like.
"""

GRID, RUNS, ENGINE = "Which runs", "Where and how fast", "Engine"


class Engine(StrEnum):
    """What makes the runs."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


def sweep(
    preset: SweepPreset | None = typer.Option(
        None, help="A sweep to start from.", show_default=False, rich_help_panel=GRID
    ),
    config: Path | None = typer.Option(
        None, help="TOML grid; replaces the preset's values.", rich_help_panel=GRID
    ),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the grid, as in TOML; may be repeated.",
        rich_help_panel=GRID,
    ),
    seeds: int | None = typer.Option(
        None,
        min=1,
        help="Seeds 0 to N-1 of every configuration; by default the grid's.",
        show_default="table2 5, others 3",
        rich_help_panel=GRID,
    ),
    lr_rule: LrRule | None = typer.Option(
        None,
        help="Learning rate across batch sizes: constant as in the paper's text, or in proportion.",
        show_default="constant",
        rich_help_panel=GRID,
    ),
    lr_base_batch: int | None = typer.Option(
        None,
        min=1,
        help="linear: the batch size that lr is meant for; by default the recipe's.",
        rich_help_panel=GRID,
    ),
    sweep_dir: Path | None = typer.Option(
        None, help="Directory of the runs; by default sweeps/NAME.", rich_help_panel=RUNS
    ),
    data: str | None = typer.Option(None, help="The data set's folder.", rich_help_panel=RUNS),
    download: bool = typer.Option(
        False,
        "--download",
        help="First fetch the data set to this machine if it is missing.",
        rich_help_panel=RUNS,
    ),
    device: Device | None = typer.Option(
        None, help="Where to train.", show_default="auto", rich_help_panel=RUNS
    ),
    workers: int | None = typer.Option(
        None, help="Processes of a run that read an image folder.", rich_help_panel=RUNS
    ),
    threads: int | None = typer.Option(
        None, help="CPU threads of a run; by default torch's choice.", rich_help_panel=RUNS
    ),
    checkpoint_every: int | None = typer.Option(
        None,
        help="Iterations between checkpoints; by default 5 minutes.",
        rich_help_panel=RUNS,
    ),
    nproc: int = typer.Option(
        1,
        min=1,
        help="Processes that train each run together; on GPUs, one for each.",
        rich_help_panel=RUNS,
    ),
    batch_per: BatchPer = typer.Option(
        BatchPer.GLOBAL,
        help="Whether batch sizes are those of all processes together, or of each.",
        rich_help_panel=GRID,
    ),
    engine: Engine = typer.Option(
        Engine.LOCAL,
        help="local: here, one after the other; ray: as many at once as fit; slurm: write a job "
        "array.",
        rich_help_panel=ENGINE,
    ),
    ray_address: str | None = typer.Option(
        None,
        help="ray: the cluster's address; by default this machine alone.",
        rich_help_panel=ENGINE,
    ),
    cpus_per_run: float | None = typer.Option(
        None, min=0.01, help="ray, slurm: CPUs of a run.", rich_help_panel=ENGINE
    ),
    gpus_per_run: float | None = typer.Option(
        None,
        min=0,
        help="ray, slurm: GPUs of a run; ray: 0.5 for two runs on each.",
        show_default="ray: one for each process, where there are any; slurm: none",
        rich_help_panel=ENGINE,
    ),
    retry_failed: bool = typer.Option(
        False, "--retry-failed", help="Make failed runs again.", rich_help_panel=RUNS
    ),
    accept_changed_data: bool = typer.Option(
        False,
        "--accept-changed-data",
        help="Go on also where the training set is no longer that of the sweep's earlier runs.",
        rich_help_panel=RUNS,
    ),
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        help="List the runs and how they stand, with time and disk still needed.",
        rich_help_panel=RUNS,
    ),
    json_output: bool = typer.Option(
        False, "--json", help="Print the result as one JSON object.", rich_help_panel=RUNS
    ),
) -> None:
    """Make many runs, such as the paper's Table 2, and go on where they were left."""
    if preset is None and config is None:
        raise ConfigurationError(
            f"name a sweep: --preset {', '.join(SweepPreset)}, or a grid with --config FILE"
        )
    _check_engine(engine, ray_address, cpus_per_run, gpus_per_run, nproc)
    options = dict(map(parse_value, settings))
    typed = {
        "seed": None if seeds is None else list(range(seeds)),
        "lr_rule": lr_rule,
        "lr_base_batch": lr_base_batch,
        "data": data,
        "device": device,
        "workers": workers,
        "threads": threads,
        "checkpoint_every": checkpoint_every,
    }
    options |= {key: value for key, value in typed.items() if value is not None}
    grid = build_grid(
        preset, read_grid(config) if config else None, options, source=str(config or "")
    )
    if batch_per is BatchPer.PROCESS:
        grid = grid.per_process(nproc)
    folder = sweep_dir or Path("sweeps") / (config.stem if config else str(preset))

    _check_early(grid, folder, engine, nproc, download=download)
    # Late, so that such a mistake is answered before torch is loaded.
    from commands.sweep_console import SweepConsole, print_plan, print_result

    if download:
        from pgt_diag.sweep.making import fetch_all

        fetch_all(grid.rows)
    if dry_run:
        print_plan(grid, folder, nproc, retry_failed=retry_failed, json_output=json_output)
        return
    from pgt_diag.sweep.status import write_plan

    write_plan(grid.rows, folder)
    if engine is Engine.SLURM:
        _write_job_arrays(
            grid, folder, nproc, cpus_per_run, gpus_per_run, retry_failed=retry_failed,
            accept_changed_data=accept_changed_data, json_output=json_output,
        )  # fmt: skip
        return
    from commands.terminal import say
    from commands.train import StopRequest

    stop = StopRequest()
    again = quoted(["pgt-diag", *sys.argv[1:]])
    console = SweepConsole(grid, folder, json_output=json_output)
    try:
        with console:
            if engine is Engine.RAY:
                from pgt_diag.sweep.ray_engine import make_rows_on_ray

                results = make_rows_on_ray(
                    grid.rows,
                    folder,
                    processes=nproc,
                    address=ray_address,
                    cpus_per_run=cpus_per_run,
                    gpus_per_run=gpus_per_run,
                    retry_failed=retry_failed,
                    accept_changed_data=accept_changed_data,
                    listener=console,
                    stop=stop,
                )
            else:
                from pgt_diag.sweep.making import make_rows

                results = make_rows(
                    grid.rows,
                    folder,
                    processes=nproc,
                    retry_failed=retry_failed,
                    accept_changed_data=accept_changed_data,
                    listener=console,
                    stop=stop,
                )
    except KeyboardInterrupt:
        say("stopped; the same command goes on:", again, stderr=True)
        raise
    if print_result(results, folder, json_output=json_output):
        raise typer.Exit(1)


def _check_engine(
    engine: Engine, address: str | None, cpus: float | None, gpus: float | None, processes: int
) -> None:
    """Raise ConfigurationError for an option that the engine does not use, or cannot."""
    if address is not None and engine is not Engine.RAY:
        raise ConfigurationError(f"--ray-address has no effect with --engine {engine}")
    for flag, value in (("--cpus-per-run", cpus), ("--gpus-per-run", gpus)):
        if value is not None and engine is Engine.LOCAL:
            raise ConfigurationError(f"{flag} has no effect with --engine {engine}")
        if value is not None and engine is Engine.SLURM and value != int(value):
            raise ConfigurationError(f"{flag} is {value:g}; Slurm gives whole ones")
    if gpus and gpus < processes:
        raise ConfigurationError(
            f"--gpus-per-run is {gpus:g} and --nproc {processes}: each process needs its own GPU"
        )


def _check_early(
    grid: Grid, folder: Path, engine: Engine, processes: int, *, download: bool
) -> None:
    """Raise what can be told of the runs that have not begun before torch is loaded."""
    from pgt_diag.directory import what_is_left

    for row in grid.rows:
        if what_is_left(folder / row.name):
            continue
        check_choices(row.config, processes)
        if download:
            check_download(row.config)
        elif engine is Engine.LOCAL:  # others read the data on other machines
            check_there(row.config)


def _write_job_arrays(
    grid: Grid,
    folder: Path,
    processes: int,
    cpus: float | None,
    gpus: float | None,
    *,
    retry_failed: bool,
    accept_changed_data: bool,
    json_output: bool,
) -> None:
    """Write the job arrays of what is to do, and say how to submit them."""
    from commands.terminal import say
    from pgt_diag.sweep.making import check_data, is_to_do, starting_point
    from pgt_diag.sweep.slurm import write_job_arrays
    from pgt_diag.sweep.status import State, status_of

    statuses = [status_of(row, folder) for row in grid.rows]
    rows = _to_submit(statuses, retry_failed=retry_failed)
    for status in statuses:
        if status.state is State.FAILED and is_to_do(status, retry_failed=retry_failed):
            starting_point(folder / status.row.name, retry_failed=True)
    for row in {row.config.dataset: row for row in rows}.values():
        check_data(row, folder, accept=accept_changed_data, elsewhere=True)
    scripts = write_job_arrays(
        rows,
        folder,
        processes=processes,
        accept_changed_data=accept_changed_data,
        cpus_per_run=cpus,
        gpus_per_run=gpus,
    )
    if json_output:
        values: dict[str, Any] = {"sweep_dir": str(folder), "rows": len(rows)}
        print(json.dumps(values | {"scripts": list(map(str, scripts))}))
        return
    for status in statuses:
        if status.state is State.FAILED and not retry_failed:
            say(as_typed(f"failed: {status.row.name}: {status.message}"))
    left = len(grid.rows) - len(rows)
    if not scripts:
        say(f"nothing to submit: {left} of {len(grid.rows)} runs are finished, failed or running")
    else:
        if gpus is None and any(row.config.device is not Device.CPU for row in rows):
            say("note: the tasks ask Slurm for no GPU; --gpus-per-run N does", stderr=True)
        submit = " && ".join(f"sbatch --time=24:00:00 {quoted([s])}" for s in scripts)
        say(
            f"{folder}: {len(rows)} of {len(grid.rows)} runs; learning rate {grid.rule}; "
            "submit with:",
            submit,
        )


def _to_submit(statuses: "Sequence[RowStatus]", *, retry_failed: bool) -> list[Row]:
    from pgt_diag.sweep.making import is_to_do

    return [each.row for each in statuses if is_to_do(each, retry_failed=retry_failed)]
