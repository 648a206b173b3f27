"""`pgt-diag train`: train one run and record its filters."""

import dataclasses
import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from commands.usage import PlainFlags
from pgt_diag.config import (
    PRESETS,
    RESUMABLE_WITH,
    Amp,
    Augment,
    BadImages,
    BatchPer,
    CudaGraph,
    DatasetName,
    Decode,
    Device,
    LrRule,
    LrUpdate,
    Method,
    Norm,
    Preset,
    RunConfig,
    Schedule,
    Stem,
    as_typed,
    compose,
    located,
    option_name,
    read_toml,
)
from pgt_diag.errors import ConfigurationError
from pgt_diag.parent import end_with_parent, is_launched, place
from pgt_diag.preflight import check_choices, check_download, check_there

if TYPE_CHECKING:
    from commands.console import TrainingConsole
    from pgt_diag.resuming import ResumePoint

DEFAULTS = RunConfig()

EPILOG = """\b
Examples:
  pgt-diag train                                     baseline on embedded digits
  pgt-diag train --method pgt --alpha 0.25 --run-dir runs/pgt
  pgt-diag train --dataset fashion-mnist --method agc+pgt --device cuda
  pgt-diag train --data IMAGENET_DIR --dataset imagefolder --batch-size 256
  pgt-diag train --config run.toml --seed 3 --dry-run
  pgt-diag train --run-dir runs/pgt --resume         go on after a crash or Ctrl-C
  pgt-diag train --method pgt --run-dir runs/pgt --resume auto    in a job script
"""


class Resume(StrEnum):
    """Whether there must be a run to go on with."""

    REQUIRED = "required"
    AUTO = "auto"


_RESUMES = [[str(resume)] for resume in Resume]


class TrainCommand(PlainFlags):
    """Lets `--resume` stand alone, and mistakes name what was typed: typer has no way to say it."""

    def invoke(self, ctx: Any) -> Any:
        """Have a mistake in the configuration name the option, or the file, that it is in."""
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            raise ConfigurationError(located(str(error), **(ctx.obj or {}))) from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a lone `--resume` as `--resume required`."""
        for index, argument in enumerate(args):
            if argument == "--resume" and args[index + 1 : index + 2] not in _RESUMES:
                args[index] = f"--resume={Resume.REQUIRED}"
        return super().parse_args(ctx, args)


def _option(name: str, help_text: str, panel: str, **extra: Any) -> Any:
    """Return a typer option for the field of RunConfig that `name` spells."""
    flag = option_name(name)
    default = getattr(DEFAULTS, name)
    if isinstance(default, bool):
        flag = f"{flag}/--no-{flag[2:]}"
    of_presets = {preset.value: values.get(name, default) for preset, values in PRESETS.items()}
    if len(set(of_presets.values())) > 1:
        extra["show_default"] = ", ".join(
            f"{key} {value}" for key, value in of_presets.items() if value is not None
        )
    return typer.Option(default, flag, help=help_text, rich_help_panel=panel, **extra)


DATA, MODEL, METHOD = "Data", "Model", "Method (what changes the gradient)"
OPTIMIZATION, RECORDING, RUN = "Optimization", "Recording", "Run"


def train(
    ctx: typer.Context,
    preset: Preset | None = typer.Option(
        None, help="Values to start from; by default the data set's own.", show_default=False
    ),
    config: Path | None = typer.Option(
        None, help="TOML file of the options below that describe the run, and 'preset'."
    ),
    method: Method = _option("method", "Gradient method.", METHOD),
    alpha: float = _option("alpha", "PGT's exponent α, in [0, 1]; 1 changes nothing.", METHOD),
    clip_norm: float = _option("clip_norm", "GC: largest global gradient norm.", METHOD),
    agc_clip_factor: float = _option(
        "agc_clip_factor", "AGC: λ, largest ratio of gradient norm to filter norm.", METHOD
    ),
    agc_eps: float = _option("agc_eps", "AGC: floor of the filter norm.", METHOD),
    agc_classifier: bool = _option("agc_classifier", "AGC: clip the classifier too.", METHOD),
    label_smoothing: float = _option("label_smoothing", "Label smoothing.", METHOD),
    dataset: DatasetName = _option("dataset", "Data set.", DATA),
    data: str | None = _option("data", "The data set's folder.", DATA),
    download: bool = typer.Option(
        False, "--download", help="Fetch the data set if it is missing.", rich_help_panel=DATA
    ),
    image_size: int | None = _option(
        "image_size", "Resize images to this many pixels; by default the set's own.", DATA
    ),
    augment: Augment = _option("augment", "Augmentation; auto chooses by data set.", DATA),
    synthetic_images: int = _option("synthetic_images", "Images in 'synthetic'.", DATA),
    synthetic_classes: int = _option("synthetic_classes", "Classes in 'synthetic'.", DATA),
    workers: int | None = _option(
        "workers", "Processes that read an image folder; by default one a CPU, at most 16.", DATA
    ),
    bad_images: BadImages = _option(
        "bad_images", "Unreadable images: stop, or use the next of the class.", DATA
    ),
    decode: Decode = _option("decode", "Where JPEGs of an image folder are decoded.", DATA),
    model: str = _option(
        "model", "Any torchvision classification model, or timm's as timm/NAME.", MODEL
    ),
    norm: Norm = _option("norm", "Normalisation layers.", MODEL),
    stem: Stem = _option("stem", "A ResNet's first layers.", MODEL),
    batch_size: int = _option("batch_size", "Images per iteration.", OPTIMIZATION),
    accumulate: int = _option(
        "accumulate", "Parts of a batch, one after the other, to save memory.", OPTIMIZATION
    ),
    epochs: int = _option("epochs", "Passes over the training set.", OPTIMIZATION),
    lr: float = _option("lr", "Peak learning rate.", OPTIMIZATION),
    lr_rule: LrRule = _option(
        "lr_rule", "Across batch sizes: lr as it is, or in proportion to the batch.", OPTIMIZATION
    ),
    lr_base_batch: int | None = _option(
        "lr_base_batch",
        "linear: the batch size that lr is meant for; by default the preset's.",
        OPTIMIZATION,
    ),
    momentum: float = _option("momentum", "Momentum.", OPTIMIZATION),
    nesterov: bool = _option("nesterov", "Nesterov momentum.", OPTIMIZATION),
    weight_decay: float = _option("weight_decay", "Weight decay.", OPTIMIZATION),
    decay_biases: bool = _option("decay_biases", "Decay vectors too.", OPTIMIZATION),
    schedule: Schedule = _option("schedule", "Learning rate after warm-up.", OPTIMIZATION),
    step_epochs: str = typer.Option(
        ",".join(map(str, DEFAULTS.step_epochs)),
        help="Epochs at which 'step' divides by 10, comma-separated.",
        rich_help_panel=OPTIMIZATION,
    ),
    warmup_epochs: float = _option("warmup_epochs", "Epochs of linear warm-up.", OPTIMIZATION),
    warmup_lr: float = _option("warmup_lr", "Learning rate warm-up starts from.", OPTIMIZATION),
    warmup_prefix: bool = _option(
        "warmup_prefix",
        "Count the cosine from the end of warm-up, not from the start.",
        OPTIMIZATION,
    ),
    cooldown_epochs: int = _option(
        "cooldown_epochs", "Last epochs, which the cosine spends at min-lr.", OPTIMIZATION
    ),
    min_lr: float = _option("min_lr", "Learning rate at the end.", OPTIMIZATION),
    lr_update: LrUpdate = _option(
        "lr_update", "Move the learning rate at every iteration, or once an epoch.", OPTIMIZATION
    ),
    seed: int = _option("seed", "Seed of weights, order and augmentation.", RUN),
    device: Device = _option("device", "Where to train.", RUN),
    amp: Amp = _option("amp", "Mixed precision on a GPU; auto is bf16 there.", RUN),
    cuda_graph: CudaGraph = _option(
        "cuda_graph", "Capture the whole step as a CUDA graph; auto: on one GPU.", RUN
    ),
    threads: int | None = _option("threads", "CPU threads; by default torch's choice.", RUN),
    deterministic: bool = _option(
        "deterministic", "On a GPU: the same bits at every run, slower.", RUN
    ),
    run_dir: Path | None = typer.Option(
        None, help="Directory of the run; by default runs/NAME.", rich_help_panel=RUN
    ),
    name: str | None = typer.Option(
        None, help="NAME of the run; by default from method and time.", rich_help_panel=RUN
    ),
    resume: Resume | None = typer.Option(
        None,
        help="Go on with the run in --run-dir, exactly where it was; 'auto' starts it when there "
        "is none.",
        rich_help_panel=RUN,
        show_default=False,
        show_choices=False,
        metavar="[auto]",
    ),
    accept_changed_data: bool = typer.Option(
        False,
        "--accept-changed-data",
        help="--resume: go on also where the training set is no longer that of the run.",
        rich_help_panel=RUN,
    ),
    checkpoint_every: int | None = _option(
        "checkpoint_every", "Iterations between checkpoints; by default 5 minutes.", RUN
    ),
    nproc: int = typer.Option(
        1,
        help="Processes that train together, sharing every batch; on GPUs, one for each.",
        min=1,
        rich_help_panel=RUN,
    ),
    peer_timeout: float = typer.Option(
        600.0, help="Seconds that a process waits for the others.", min=1.0, rich_help_panel=RUN
    ),
    batch_per: BatchPer = typer.Option(
        BatchPer.GLOBAL,
        help="Whether --batch-size is that of all processes together, or of each.",
        rich_help_panel=OPTIMIZATION,
    ),
    force: bool = typer.Option(
        False, "--force", help="Replace the run in the directory.", rich_help_panel=RUN
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check everything, say what would be done.", rich_help_panel=RUN
    ),
    json_output: bool = typer.Option(
        False, "--json", help="Print the result as one JSON object.", rich_help_panel=RUN
    ),
    record_every: str = typer.Option(
        "auto",
        help="Store norms every so many iterations, with each window's extremes; auto keeps "
        "about 2,000 rows. Events are exact all the same.",
        rich_help_panel=RECORDING,
    ),
    min_spell: int | None = _option(
        "min_spell", "Log states that last so many iterations; a thousandth of the run.", RECORDING
    ),
    feature_map_layer: int | None = _option(
        "feature_map_layer", "Convolution whose feature maps are kept; by default 1.", RECORDING
    ),
    feature_map_images: int = _option(
        "feature_map_images", "Images to keep feature maps of.", RECORDING
    ),
    feature_map_snapshots: int = _option(
        "feature_map_snapshots", "How often in the run to keep them.", RECORDING
    ),
) -> None:
    """Train a network, by default non-BN ResNet-18 on embedded digits, and record every filter."""
    if is_launched():
        end_with_parent()  # which may die before torch is loaded
    place()  # a mistake in the environment, too, is told before torch is loaded
    given = _given_options(ctx)
    file, file_preset = read_toml(config) if config else ({}, None)
    preset = preset or file_preset
    ctx.obj = {"typed": given, "file": file, "path": config}
    run_config, used_preset = compose(preset, file, given)
    processes = _processes(nproc)
    if batch_per is BatchPer.PROCESS:
        total = run_config.batch_size * processes
        run_config = dataclasses.replace(run_config, batch_size=total)
    directory = _run_directory(run_dir, name, run_config, resume)
    if force and resume is not None:
        raise ConfigurationError("--resume goes on with a run, and --force replaces it")
    if accept_changed_data and resume is None:
        raise ConfigurationError("--accept-changed-data has no effect without --resume")
    if resume is None:
        _check_effect(given, run_config)
    _check_early(run_config, directory, resume, processes=processes, download=download, force=force)
    if processes > 1 and not is_launched() and not dry_run:
        from pgt_diag.launcher import launch

        before = _run_there(directory)

        def arguments(again: bool) -> list[str]:
            # What was killed before it began its run has left none to go on with.
            return _worker_arguments(directory, again=again and _run_there(directory) != before)

        raise typer.Exit(launch(processes, arguments, _tell))
    # A job scheduler's signal ends the run as Ctrl-C does: with a checkpoint, and code 130.
    stop = StopRequest()
    if resume is not None and not dry_run and place().rank == 0:
        from pgt_diag.directory import claimed

        ctx.with_resource(claimed(directory))
    # Late, so that a mistyped option is answered before torch is loaded.
    with _imports():
        from pgt_diag import training
        from pgt_diag.distributed import World

    with World.join(run_config.device, peer_timeout) as world, stop:
        point = world.from_first(lambda: _resume_point(directory, resume))
        console = _console(json_output, None if point else used_preset, first=world.first)
        if point is not None and point.finished:
            console.show_finished(directory)
            return
        if point is not None:
            chosen = {**PRESETS.get(preset, {}), **file, **given} if preset else {**file, **given}
            run_config = _agreed(point, run_config, chosen)
        _check_effect(given, run_config)
        if dry_run:
            plan = training.plan(
                run_config,
                directory,
                download=download,
                force=force,
                resume=point,
                accept_changed_data=accept_changed_data,
                processes=processes,
            )
            console.show_plan(plan)
            return
        with console:
            path = training.train(
                run_config,
                directory,
                listener=console,
                download=download,
                force=force,
                resume=point,
                accept_changed_data=accept_changed_data,
                stop=stop,
                command=["pgt-diag", *sys.argv[1:]],
                world=world,
            )
        console.show_result(path)


def _check_early(
    config: RunConfig,
    directory: Path,
    resume: Resume | None,
    *,
    processes: int,
    download: bool,
    force: bool,
) -> None:
    """Raise what can be told of a new run before torch is loaded, which takes seconds."""
    from pgt_diag.directory import check_vacant, what_is_left
    from pgt_diag.reading import read_info

    if is_launched():  # one of several, which tell a mistake once
        return
    if resume is not None and what_is_left(directory):  # and has its own configuration
        return
    if resume is Resume.REQUIRED:
        read_info(directory)  # says that there is none
    check_choices(config, processes)
    check_vacant(directory, force=force)
    if download:
        check_download(config)
    else:
        check_there(config)


def _resume_point(directory: Path, resume: Resume | None) -> "ResumePoint | None":
    from pgt_diag.directory import what_is_left

    if resume is None or (resume is Resume.AUTO and not what_is_left(directory)):
        return None
    from pgt_diag.resuming import resume_point

    return resume_point(directory)


def _processes(nproc: int) -> int:
    """Return how many processes train together: as asked for here, or of torchrun."""
    if not is_launched():
        return nproc
    started = place().size
    if nproc not in (1, started):
        raise ConfigurationError(f"--nproc is {nproc}, and torchrun started {started} processes")
    return started


def _worker_arguments(directory: Path, *, again: bool) -> list[str]:
    """Return the command line of each process: all use one directory."""
    arguments, left = [], iter(sys.argv[1:])
    for argument in left:
        if argument in ("--name", "--run-dir"):
            next(left)
        elif argument.startswith(("--name=", "--run-dir=")) or (again and argument == "--force"):
            continue
        else:
            arguments.append(argument)
    more = ["--resume=auto"] if again else []
    return [*arguments, f"--run-dir={directory}", *more]


def _run_there(directory: Path) -> tuple[int, int] | None:
    """Return what tells a run in a directory from another one there; None where there is none."""
    try:
        status = (directory / "run.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _tell(line: str) -> None:
    from commands.terminal import say

    say(f"pgt-diag: {as_typed(line)}", stderr=True)


@contextmanager
def _imports() -> Iterator[None]:
    """Put garbage collection off while torch is loaded: it takes a sixth of that time.

    What has been loaded stays to the end; no later collection looks at it either.
    """
    if "torch" in sys.modules:  # somebody else's process, whose garbage is not to stay
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class StopRequest:
    """Remembers a signal, for training to stop at the next iteration with a checkpoint.

    Before training asks for the first time, and at a second Ctrl-C, the process ends at once.
    """

    def __init__(self) -> None:
        self._asked = self._requested = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if is_launched():
            # When one process ends, the others get it; at exit it would decide their exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def __call__(self) -> bool:
        """Return whether a signal has come."""
        self._asked = True
        return self._requested

    def _hear(self, number: int, _: object) -> None:
        if not self._asked or (self._requested and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self._requested and place().rank == 0:
            print("stopping with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
        self._requested = True


def _agreed(point: "ResumePoint", asked: RunConfig, chosen: dict[str, Any]) -> RunConfig:
    """Return the run's configuration, with those of the chosen values that may change.

    Raises ConfigurationError for another chosen value that is not the run's.
    """
    for key in chosen:
        old, new = getattr(point.config, key), getattr(asked, key)
        if key not in RESUMABLE_WITH and old != new:
            raise ConfigurationError(
                f"{key} is {new}, and {old} in the run that --resume goes on with; a changed "
                "configuration is a new run"
            )
    changes = {key: getattr(asked, key) for key in chosen if key in RESUMABLE_WITH}
    return dataclasses.replace(point.config, **changes)


def _console(json_output: bool, preset: Preset | None, *, first: bool) -> "TrainingConsole":
    from commands.console import TrainingConsole

    return TrainingConsole(json_output=json_output, preset=preset, quiet=not first)


def _given_options(ctx: typer.Context) -> dict[str, Any]:
    """Return the configuration options that were typed, as RunConfig's values."""
    given = {}
    for key, value in ctx.params.items():
        source = ctx.get_parameter_source(key)
        if hasattr(DEFAULTS, key) and source is not None and source.name != "DEFAULT":
            given[key] = value
    if "step_epochs" in given:
        given["step_epochs"] = _integers("--step-epochs", given["step_epochs"])
    if "record_every" in given:
        given["record_every"] = _record_every(given["record_every"])
    return given


def _record_every(text: str) -> int | None:
    if text == "auto":
        return None
    numbers = _integers("--record-every", text)
    if len(numbers) != 1:
        raise ConfigurationError(f"--record-every is {text!r}; give auto or one whole number")
    return numbers[0]


def _check_effect(given: dict[str, Any], config: RunConfig) -> None:
    """Raise ConfigurationError for a typed option that the method or the schedule does not use."""
    method, schedule = config.method, config.schedule
    for key in given:
        if key in ("warmup_prefix", "cooldown_epochs") and schedule is not Schedule.COSINE:
            raise ConfigurationError(f"{key} has no effect with --schedule {schedule}")
        unused = (
            (key == "alpha" and not method.uses_pgt)
            or (key == "clip_norm" and not method.uses_gc)
            or (key.startswith("agc_") and not method.uses_agc)
        )
        if unused:
            raise ConfigurationError(f"{key} has no effect with --method {method}")


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigurationError(
            f"{option} is {text!r}; give whole numbers (several separated by commas)"
        ) from None


def _run_directory(
    run_dir: Path | None, name: str | None, config: RunConfig, resume: Resume | None
) -> Path:
    if resume is not None and run_dir is None and name is None:
        raise ConfigurationError("--resume needs the run's directory: --run-dir DIR")
    if run_dir is not None and name is not None:
        raise ConfigurationError("--run-dir and --name both name the run; give one of them")
    if run_dir is not None:
        return run_dir
    if name is None:
        alpha = f"-a{config.alpha:g}" if config.method.uses_pgt else ""
        time = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{config.method}{alpha}-{config.dataset}-s{config.seed}-{time}"
    elif Path(name).name != name or name in {"", ".", ".."}:
        raise ConfigurationError(f"--name is {name!r}; give a plain name, or a path to --run-dir")
    return Path("runs") / name
