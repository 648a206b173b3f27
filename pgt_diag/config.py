"""One frozen run configuration, its presets, and the checks made before any tensor exists.

Standard library only, so that the command line can list every choice without importing torch.
"""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pgt_diag.errors import ConfigurationError


class Method(StrEnum):
    """How the gradient is changed: at the logits (PGT), after the backward pass (GC, AGC), or both.

    Source: Section 1 of the paper (Type I and Type II) and its Table 2.
    """

    BASELINE = "baseline"
    PGT = "pgt"
    GC = "gc"
    AGC = "agc"
    GC_PGT = "gc+pgt"
    AGC_PGT = "agc+pgt"

    @property
    def uses_pgt(self) -> bool:
        """Whether the loss is the PowerGrad cross-entropy."""
        return self in (Method.PGT, Method.GC_PGT, Method.AGC_PGT)

    @property
    def uses_gc(self) -> bool:
        """Whether the global gradient norm is clipped."""
        return self in (Method.GC, Method.GC_PGT)

    @property
    def uses_agc(self) -> bool:
        """Whether each filter's gradient is clipped relative to the filter's norm."""
        return self in (Method.AGC, Method.AGC_PGT)


class DatasetName(StrEnum):
    """The data sets `pgt-diag train --dataset` knows."""

    DIGITS = "digits"
    FASHION_MNIST = "fashion-mnist"
    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    IMAGEFOLDER = "imagefolder"
    SYNTHETIC = "synthetic"


class Norm(StrEnum):
    """The network's normalisation layers: none (the paper's subject) or batch (its Table 1)."""

    NONE = "none"
    BATCH = "batch"


class Stem(StrEnum):
    """First layers of a ResNet: 7×7/2 convolution and pooling, or 3×3/1 and none."""

    IMAGENET = "imagenet"
    SMALL = "small"


class Schedule(StrEnum):
    """Learning rate after warm-up: cosine, ÷10 at milestones, or constant."""

    COSINE = "cosine"
    STEP = "step"
    CONSTANT = "constant"


class LrUpdate(StrEnum):
    """When the learning rate moves: at every iteration, or once an epoch (the authors' code)."""

    ITERATION = "iteration"
    EPOCH = "epoch"


class LrRule(StrEnum):
    """The learning rate across batch sizes.

    Constant, as the paper's "common set of hyperparameters" says; or linear: `lr` is that of the
    base batch size, and others get it in proportion (Goyal et al. 2017, arXiv 1706.02677).
    """

    CONSTANT = "constant"
    LINEAR = "linear"


class Augment(StrEnum):
    """Training augmentation; auto chooses by data set."""

    AUTO = "auto"
    NONE = "none"
    SMALL = "small"
    IMAGENET = "imagenet"


class BadImages(StrEnum):
    """What to do about an image of a folder that cannot be read: stop, or use its neighbour."""

    ERROR = "error"
    SKIP = "skip"


class Decode(StrEnum):
    """Where JPEGs of a folder are decoded, cropped and resized: by the loader, or on the GPU."""

    CPU = "cpu"
    GPU = "gpu"


class BatchPer(StrEnum):
    """What a batch size counts the images of: all processes together, or each."""

    GLOBAL = "global"
    PROCESS = "process"


class Device(StrEnum):
    """Where to train; auto takes a CUDA GPU when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Amp(StrEnum):
    """Mixed precision, on CUDA only; auto is bf16 there. fp16 adds a GradScaler."""

    AUTO = "auto"
    OFF = "off"
    BF16 = "bf16"
    FP16 = "fp16"


class CudaGraph(StrEnum):
    """Whether the training step is captured as a CUDA graph; auto: on one GPU, where it can be."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Preset(StrEnum):
    """Named starting points; options given beside a preset override it."""

    SMOKE = "smoke"
    FASHION = "fashion"
    PAPER = "paper"


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the course of a run. Choices may be given as text.

    Raises ConfigurationError, naming the key, the value and what is allowed, when a value cannot
    be used. Warm-up and schedule are counted in epochs, and moved along at every iteration unless
    `lr_update` says otherwise.
    """

    dataset: DatasetName = DatasetName.DIGITS
    data: str | None = None
    image_size: int | None = None
    augment: Augment = Augment.AUTO
    synthetic_images: int = 512
    synthetic_classes: int = 10
    workers: int | None = None
    bad_images: BadImages = BadImages.ERROR
    decode: Decode = Decode.CPU

    model: str = "resnet18"
    norm: Norm = Norm.NONE
    stem: Stem = Stem.IMAGENET

    method: Method = Method.BASELINE
    alpha: float = 0.25
    clip_norm: float = 2.0
    agc_clip_factor: float = 0.01
    agc_eps: float = 1e-3
    agc_classifier: bool = False
    label_smoothing: float = 0.0

    batch_size: int = 256
    accumulate: int = 1
    epochs: int = 100
    lr: float = 0.1
    lr_rule: LrRule = LrRule.CONSTANT
    lr_base_batch: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_biases: bool = False
    schedule: Schedule = Schedule.COSINE
    step_epochs: tuple[int, ...] = (30, 60, 90)
    warmup_epochs: float = 5.0
    warmup_lr: float = 4e-4
    warmup_prefix: bool = True
    cooldown_epochs: int = 0
    min_lr: float = 0.0
    lr_update: LrUpdate = LrUpdate.ITERATION

    seed: int = 0
    device: Device = Device.AUTO
    amp: Amp = Amp.AUTO
    cuda_graph: CudaGraph = CudaGraph.AUTO
    threads: int | None = None
    deterministic: bool = False

    checkpoint_every: int | None = None
    record_every: int | None = None
    min_spell: int | None = None
    feature_map_layer: int | None = None
    feature_map_images: int = 4
    feature_map_snapshots: int = 9

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = coerce(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        _check(self)

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of warm-up: `lr`, by `lr_rule` for this batch size."""
        if self.lr_base_batch is None:
            return self.lr
        return self.lr * self.batch_size / self.lr_base_batch

    @classmethod
    def from_mapping(cls, values: dict[str, Any], source: str = "") -> Self:
        """Build a configuration from plain values (TOML, JSON), with text for the choices.

        `source` is the file that error messages name, if there is one.
        """
        try:
            check_keys(values)
            return cls(**values)
        except ConfigurationError as error:
            raise ConfigurationError(f"{source}: {error}" if source else str(error)) from None

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values that JSON and TOML can hold; inverse of `from_mapping`."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def check_keys(values: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise ConfigurationError for the first key that neither RunConfig nor `also` has.

    The message names the nearest key.
    """
    known = [*_TYPES, *also]
    for key in values:
        if key not in known:
            raise ConfigurationError(f"unknown key '{shorten(key)}'{meant(key, known) or _KEYS}")


def meant(
    key: object,
    known: Iterable[str],
    *,
    quote: str = "'",
    shown: Mapping[str, str] | None = None,
) -> str:
    """Return "; did you mean 'x'?" for the known key that is like another one, if any is.

    shown: what to call each key, where not by itself.
    """
    near = _nearest(str(key)[:_SHOWN].lower().replace("-", "_"), list(known))
    return f"; did you mean {quote}{(shown or {}).get(near, near)}{quote}?" if near else ""


def _nearest(text: str, known: list[str]) -> str | None:
    others = {name: key for name, key in _OFTEN_MEANT.items() if key in known}
    near = [
        others.get(name, name)
        for name in difflib.get_close_matches(text, [*known, *others], n=1, cutoff=_LIKE)
    ]
    begun = [name for name in known if len(text) >= _BEGUN and name.startswith(text)]
    return next(iter([*near, *begun]), None)


def must_be_one_of(choices: Iterable[str]) -> str:
    """Return what to say of a value that is no choice."""
    return f"choose one of {', '.join(choices)}"


_LIKE, _BEGUN = 0.66, 4
"""How like a known key another one is that is meant for it, and so many of its first letters."""
_KEYS = "; keys are the options of pgt-diag train"


_OFTEN_MEANT = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "wd": "weight_decay",
    "batch": "batch_size",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "arch": "model",
    "network": "model",
    "smoothing": "label_smoothing",
    "warmup": "warmup_epochs",
    "cooldown": "cooldown_epochs",
}
_SHOWN = 100


def shorten(value: object) -> str:
    """Return a value as it may be shown: whatever a file holds, no more than fits a line."""
    if isinstance(value, str):
        return value[:_SHOWN]
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "too large a number"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def parse_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's entries.

    Raises ConfigurationError, naming the file, when it cannot be read, or is too large for one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TOML_BYTES + 1)
        if len(data) > _MAX_TOML_BYTES:
            raise ValueError(f"has more than {_MAX_TOML_BYTES:,} bytes")  # noqa: TRY301
        return tomllib.loads(data.decode("utf-8-sig"))  # editors on Windows begin it with a mark
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"{path}: cannot be read as TOML: it is not UTF-8 text; save it as that"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: cannot be read as TOML: {error}") from None


def read_toml(path: Path) -> tuple[dict[str, Any], Preset | None]:
    """Read a configuration file: RunConfig's keys, with dashes or underscores, and `preset`.

    Raises ConfigurationError, naming the file, when it cannot be read or holds an unknown key.
    """
    values: dict[str, Any] = {}
    for key, value in parse_toml(path).items():
        name = key.replace("-", "_")
        if name in values:
            raise ConfigurationError(f"{path}: {name} is given twice, as '{key}' too")
        if isinstance(value, dict) and name not in _TYPES:
            inner = next(iter(value), "")
            raise ConfigurationError(
                f"{path}: unknown key '{shorten(f'{key}.{inner}')}'; keys stand at the top level, "
                f"without tables{meant(inner or key, _TYPES)}"
            )
        if name not in (*_TYPES, "preset"):
            near = meant(key, (*_TYPES, "preset")) or _KEYS
            raise ConfigurationError(
                f"{path}: unknown key '{shorten(key)}'{near} (its value is {_quoted(value)})"
            )
        values[name] = value
    preset = values.pop("preset", None)
    if preset is not None and preset not in list(Preset):
        raise ConfigurationError(f"{path}: preset is {_quoted(preset)}; {must_be_one_of(Preset)}")
    try:
        check_keys(values)
        values = {key: coerce(key, value) for key, value in values.items()}
        return values, Preset(preset) if preset else None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


_TYPES: dict[str, Any] = typing.get_type_hints(RunConfig)


_MAX_TOML_BYTES = 1 << 20
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _quoted(value: object) -> str:
    return repr(shorten(value)) if isinstance(value, str) else shorten(value)


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def coerce(key: str, value: Any) -> Any:
    """Turn a plain value into the field's type; ConfigurationError when it is of another kind."""
    if isinstance(value, StrEnum):
        return value
    wanted = _TYPES[key]
    if isinstance(wanted, types.UnionType):
        if value is None or (key == "record_every" and value == "auto"):
            return None
        wanted = next(kind for kind in wanted.__args__ if kind is not types.NoneType)
    if isinstance(wanted, type) and issubclass(wanted, StrEnum):
        choices = [str(choice) for choice in wanted]
        if value not in choices:
            raise ConfigurationError(f"{key} is {_quoted(value)}; {must_be_one_of(choices)}")
        return wanted(value)
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            return tuple(value)
        raise ConfigurationError(f"{key} is {_quoted(value)}; it must be a list of integers")
    if wanted is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigurationError(f"{key} is {_quoted(value)}; it is too large") from None
    if type(value) is not wanted:
        raise ConfigurationError(f"{key} is {_quoted(value)}; it must be {_KINDS[wanted]}")
    return value


def _check(config: RunConfig) -> None:
    for key, low, high in _RANGES:
        value = getattr(config, key)
        if value is None:
            continue
        if not low <= value <= high:
            raise ConfigurationError(
                f"{key} is {shorten(value)}; it must {_describe(low, high, value)}"
            )
    _check_positive(config)
    if config.data == "":  # as from a shell's variable that is not set
        raise ConfigurationError("data is ''; name a folder")
    if config.nesterov and config.momentum == 0:
        raise ConfigurationError("nesterov is on and momentum is 0; set momentum, or nesterov off")
    if config.warmup_epochs > config.epochs:
        raise ConfigurationError(
            f"warmup_epochs is {config.warmup_epochs}, more than the run's {config.epochs} epochs"
        )
    _check_learning_rate(config)
    steps = list(config.step_epochs)
    if steps != sorted(set(steps)) or min(steps, default=1) < 1:
        raise ConfigurationError(f"step_epochs is {steps}; it must increase, from 1 or more")
    if config.accumulate > config.batch_size:
        raise ConfigurationError(
            f"accumulate is {config.accumulate}, and a batch has only {config.batch_size} images"
        )
    size = config.image_size or 1
    if (
        config.dataset is DatasetName.SYNTHETIC
        and 3 * config.synthetic_images * size**2 > _MAX_SYNTHETIC_BYTES
    ):
        raise ConfigurationError(
            f"synthetic_images is {config.synthetic_images}, of {size}×{size} pixels: these do not "
            "fit in memory"
        )
    if config.device is Device.CPU:
        _check_cpu(config)
    if config.decode is Decode.GPU and config.dataset is not DatasetName.IMAGEFOLDER:
        raise ConfigurationError(
            f"decode is gpu and dataset is {config.dataset}; only imagefolder has files to decode"
        )


def _check_positive(config: RunConfig) -> None:
    positive = ["lr"]
    positive += ["clip_norm"] if config.method.uses_gc else []
    positive += ["agc_clip_factor", "agc_eps"] if config.method.uses_agc else []
    for key in positive:
        if getattr(config, key) == 0:
            raise ConfigurationError(f"{key} is 0; it must be greater than 0")
    if config.momentum == 1:
        raise ConfigurationError("momentum is 1.0; it must be less than 1")


def _check_cpu(config: RunConfig) -> None:
    if config.amp in (Amp.BF16, Amp.FP16):
        raise ConfigurationError(f"amp is {config.amp} and device is cpu; {config.amp} needs a GPU")
    if config.cuda_graph is CudaGraph.ON:
        raise ConfigurationError("cuda_graph is on and device is cpu; use auto or off")


def _check_learning_rate(config: RunConfig) -> None:
    if config.cooldown_epochs and config.warmup_epochs + config.cooldown_epochs > config.epochs:
        raise ConfigurationError(
            f"cooldown_epochs is {config.cooldown_epochs}, and {config.warmup_epochs:g} of the "
            f"run's {config.epochs} epochs are warm-up"
        )
    if config.cooldown_epochs and config.schedule is Schedule.COSINE and config.min_lr == 0:
        raise ConfigurationError(
            f"cooldown_epochs is {config.cooldown_epochs} and min_lr is 0: nothing would change in "
            "them; set min_lr"
        )
    if not 0 < config.peak_lr <= _ANY:
        raise ConfigurationError(
            f"lr is {config.lr:g} for batches of {config.lr_base_batch}: for those of "
            f"{config.batch_size} it would be {config.peak_lr:g}, which is no learning rate"
        )
    linear = config.lr_rule is LrRule.LINEAR
    if config.lr_base_batch is not None and not linear:
        raise ConfigurationError("lr_base_batch has no effect with lr_rule constant")
    if config.lr_base_batch is None and linear:
        raise ConfigurationError(
            "lr_rule is linear and lr_base_batch is not given; name the batch size that lr is for"
        )


_ANY = 3e38
"""Larger numbers do not fit into float32, in which training calculates."""
_MANY = 10**9
"""More of anything would only be a mistake, or somebody's attempt at one."""
_MAX_SYNTHETIC_BYTES = 1 << 30
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("image_size", 1, 4096),
    ("synthetic_images", 2, 1_000_000),
    ("synthetic_classes", 2, 10_000),
    ("workers", 0, 1024),
    ("alpha", 0, 1),
    ("clip_norm", 0, _ANY),
    ("agc_clip_factor", 0, _ANY),
    ("agc_eps", 0, _ANY),
    ("label_smoothing", 0, 1),
    ("batch_size", 1, _MANY),
    ("accumulate", 1, _MANY),
    ("epochs", 1, _MANY),
    ("lr", 0, _ANY),
    ("lr_base_batch", 1, _MANY),
    ("momentum", 0, 1),
    ("weight_decay", 0, _ANY),
    ("warmup_epochs", 0, _ANY),
    ("warmup_lr", 0, _ANY),
    ("cooldown_epochs", 0, _MANY),
    ("min_lr", 0, _ANY),
    ("seed", 0, 2**63 - 1),
    ("threads", 1, 1024),
    ("checkpoint_every", 1, _MANY),
    ("record_every", 1, _MANY),
    ("min_spell", 1, _MANY),
    ("feature_map_layer", 0, _MANY),
    ("feature_map_images", 1, 64),
    ("feature_map_snapshots", 0, 1000),
)


def _describe(low: float, high: float, value: float) -> str:
    if high == _ANY:
        return f"be at most {high:g}" if value > high else f"be a number of at least {low:g}"
    return (
        f"lie in [{low:g}, {high:g}]"
        if high < _MANY
        else (f"be a number of at least {low:g}, and no more than {high:,}")
    )


PRESETS: dict[Preset, dict[str, Any]] = {
    # Every method learns with these, with several seeds. Chosen for that alone: PGT spikes or
    # diverges at learning rates that the baseline bears.
    Preset.SMOKE: {
        "dataset": "digits",
        "image_size": 8,
        "stem": "small",
        "batch_size": 64,
        "epochs": 12,
        "lr": 0.005,
        "warmup_epochs": 4.0,
    },
    Preset.FASHION: {
        "dataset": "fashion-mnist",
        "image_size": 32,
        "batch_size": 128,
        "epochs": 3,
        "lr": 0.005,
        "warmup_epochs": 1.0,
    },
    # Section 4 of the paper.
    Preset.PAPER: {
        "dataset": "imagefolder",
        "batch_size": 1024,
        "epochs": 100,
        "lr": 0.4,
        "warmup_epochs": 5.0,
        "warmup_lr": 4e-4,
    },
}

PRESET_OF_DATASET = {
    DatasetName.DIGITS: Preset.SMOKE,
    DatasetName.SYNTHETIC: Preset.SMOKE,
    DatasetName.FASHION_MNIST: Preset.FASHION,
    DatasetName.CIFAR10: Preset.FASHION,
    DatasetName.CIFAR100: Preset.FASHION,
    DatasetName.IMAGEFOLDER: Preset.PAPER,
}
"""The preset that a data set's recipe is taken from when none is named."""


RESUMABLE_WITH = frozenset(
    {"workers", "bad_images", "data", "device", "threads", "checkpoint_every"}
)
"""What may be another at `--resume`: where and how fast a run is made, not which."""


def compose(
    preset: Preset | None, file: dict[str, Any], options: dict[str, Any]
) -> tuple[RunConfig, Preset]:
    """Return a configuration: options before the file, the file before the preset's values.

    With no preset, the one of the data set. A preset's stem is left out for a model that has none
    to choose, and its warm-up is shortened to half of a shorter run; its batch size is the one that
    `lr` is for where `lr_rule` is linear and names no other. Also returns the preset that was used.
    """
    dataset = options.get("dataset", file.get("dataset"))
    if preset is None:
        preset = PRESET_OF_DATASET[DatasetName(dataset)] if dataset else Preset.SMOKE
    values = {**PRESETS[preset], **file, **options}
    chosen = {*file, *options}
    if "stem" not in chosen and not has_stem(str(values.get("model", RunConfig.model))):
        values.pop("stem", None)
    if "warmup_epochs" not in chosen and isinstance(values.get("epochs"), int):
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 2)
    if values.get("lr_rule") == LrRule.LINEAR and values.get("lr_base_batch") is None:
        values["lr_base_batch"] = PRESETS[preset]["batch_size"]
    return RunConfig.from_mapping(values), preset


def located(
    message: str,
    typed: Iterable[str] = (),
    file: Iterable[str] = (),
    path: Path | None = None,
) -> str:
    """Return a mistake's message with the options of typed keys, and the path of a file's key."""
    key = r"(?<![\w.-])[a-z_]+(?= (?:is|has) )"
    options = {each: option_name(each) for each in typed}
    named = set(re.findall(key, message)) - options.keys()
    message = re.sub(key, lambda match: options.get(match[0], match[0]), message)
    return f"{path}: {message}" if named & set(file) else message


def option_name(key: str) -> str:
    """Return the command line's name for a key of RunConfig."""
    return f"--{key.replace('_', '-')}"


def as_typed(message: str) -> str:
    """Return a library's message with the command line's options for the arguments that it names.

    The library names an argument as a call has it, in backticks: `force=True`, `data=DIR`, or
    `resume=...` where the value does not matter.
    """

    def option(match: re.Match[str]) -> str:
        key, value = _OPTIONS.get(match[1], match[1]), match[2].strip("\"'")
        if value == "False":
            return option_name(f"no_{key}")
        flag = option_name(key)
        return flag if value in ("True", "...") else f"{flag} {value}"

    return re.sub(r"`([a-z_]+)=([^`]*)`", option, message)


_OPTIONS = {"directory": "run_dir"}
"""Options that are called otherwise than the argument."""


TIMM = "timm/"
"""What the names of timm's models begin with."""


def has_stem(model: str) -> bool:
    """Whether a network of this name has the stem that `Stem` chooses: the plain ResNets."""
    if model.startswith(
        TIMM
    ):  # timm's resnet50d, resnetv2_50, seresnetaa50d have stems of their own
        return re.fullmatch(rf"{TIMM}(se)?res(net|next)\d+(_\d+x\d+d)?", model) is not None
    return model.startswith(("resnet", "resnext", "wide_resnet"))
