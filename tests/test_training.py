"""The training loop against a hand-written one, and how runs end."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pgt_diag
from pgt_diag import training
from pgt_diag.config import (
    Amp,
    DatasetName,
    Device,
    Method,
    Norm,
    Preset,
    RunConfig,
    compose,
)
from pgt_diag.data import load_data
from pgt_diag.errors import ConfigurationError, DataError, DivergedError, RunDirectoryError
from pgt_diag.models import build_model
from pgt_diag.progress import Listener, Plan, Progress
from pgt_diag.resuming import resume_point
from pgt_diag.schedules import learning_rate
from pgt_diag.step import build_optimizer
from tests.ranks import SmallNet
from tests.runs import contents, difference

TINY = {
    "dataset": DatasetName.SYNTHETIC,
    "synthetic_images": 64,
    "synthetic_classes": 3,
    "image_size": 16,
    "batch_size": 16,
    "epochs": 2,
    "warmup_epochs": 1.0,
    "lr": 0.01,
    "device": Device.CPU,
    "threads": 1,
    "feature_map_snapshots": 3,
}


def tiny(**changes: Any) -> RunConfig:
    return RunConfig(**{**TINY, **changes})


def clip_globally(model: nn.Module, largest: float) -> None:
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    for parameter in model.parameters():
        parameter.grad *= min(1.0, largest / norm)


def clip_filters(model: nn.Module, factor: float, eps: float) -> None:
    for name, parameter in model.named_parameters():
        if not name.startswith(("fc.", "classifier.")):
            weights, gradients = parameter.detach(), parameter.grad
            if parameter.ndim == 1:
                weights, gradients = weights[None], gradients[None]
            for weight, gradient in zip(weights, gradients, strict=True):
                largest = factor * max(float(weight.norm()), eps)
                gradient *= min(1.0, largest / max(float(gradient.norm()), 1e-30))


def reference_run(config: RunConfig, build: Any) -> tuple[dict[str, Tensor], float]:
    """Clip, then decay, then Nesterov momentum, written out; weights and test accuracy."""
    data = load_data(config)
    torch.manual_seed(config.seed)
    model = build(config.model, num_classes=3, norm=config.norm, stem=config.stem)
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    iteration = 0
    for epoch in range(config.epochs):
        for images, target in data.train_batches(epoch):
            alpha = config.alpha if config.method.uses_pgt else 1.0
            smoothing = config.label_smoothing
            loss = F.cross_entropy(alpha * model(images), target, label_smoothing=smoothing) / alpha
            model.zero_grad()
            loss.backward()
            if config.method.uses_gc:
                clip_globally(model, config.clip_norm)
            if config.method.uses_agc:
                clip_filters(model, config.agc_clip_factor, config.agc_eps)
            lr = learning_rate(config, iteration, data.batches_per_epoch)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    decay = config.weight_decay if parameter.ndim > 1 else 0.0
                    gradient = parameter.grad + decay * parameter
                    momentum[name] = config.momentum * momentum[name] + gradient
                    nesterov = gradient + config.momentum * momentum[name]
                    parameter -= lr * nesterov
            iteration += 1
    model.eval()
    with torch.no_grad():
        correct = sum(
            int((model(images).argmax(1) == target).sum()) for images, target in data.test_batches()
        )
    return model.state_dict(), 100 * correct / data.test_size


@pytest.fixture
def float64() -> Iterator[None]:
    """Train in double precision: what rounding does to float32 grows with every step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_net(*_: Any, **options: Any) -> nn.Module:
    """Build, as `build_model` does, a network of few weights, which has biases and dead filters."""
    return SmallNet(options["norm"])


VARIANTS: dict[str, dict[str, Any]] = {
    **{str(method): {"method": method, "clip_norm": 0.5} for method in Method},
    "nothing to clip": {"method": Method.GC, "clip_norm": 1e6},
    "a floor above every filter": {"method": Method.AGC, "agc_eps": 5.0},
    "smoothed labels": {"method": Method.PGT, "label_smoothing": 0.2},
    "no momentum": {"momentum": 0.0, "nesterov": False},
    "a batch in uneven parts": {"method": Method.AGC_PGT, "accumulate": 3},
}


@pytest.mark.parametrize(
    ("variant", "build"),
    [*((variant, small_net) for variant in VARIANTS), (str(Method.AGC_PGT), build_model)],
)
def test_every_method_trains_as_the_loop_written_out(
    variant: str, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    config = tiny(**VARIANTS[variant], weight_decay=0.05)
    models: list[nn.Module] = []

    def built(*arguments: Any, **options: Any) -> nn.Module:
        models.append(build(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(training, "build_model", built)
    training.train(config, tmp_path / "run")
    weights, accuracy = reference_run(config, build)
    torch.manual_seed(config.seed)
    start = build(config.model, num_classes=3, norm=config.norm, stem=config.stem).state_dict()
    for name, expected in weights.items():
        moved = (expected - start[name]).norm()
        error = (models[0].state_dict()[name] - expected).norm()
        assert moved > 0, name
        assert error < 1e-5 * moved, name  # clip_grad_norm_ adds 1e-6 to the norm
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.metrics["test_accuracy"].iloc[-1] == pytest.approx(accuracy)
    assert run.iteration_count == 8
    assert run.metrics["epoch"].tolist() == [0, 1]
    assert run.metrics["iteration"].tolist() == [4, 8]
    assert run.iterations["accuracy"].isin(np.arange(17) / 16 * 100).all()
    assert run.config == config


def test_what_clips_is_recorded_as_it_was_applied(tmp_path: Path) -> None:
    training.train(tiny(method=Method.GC, clip_norm=0.5), tmp_path / "gc")
    steps = pgt_diag.load_run(tmp_path / "gc").iterations
    before, after = steps["grad_norm_before_clip"], steps["grad_norm"]
    assert (before > 0.5).all()
    np.testing.assert_allclose(after, 0.5, rtol=1e-4)
    np.testing.assert_allclose(steps["clip_coefficient"], 0.5 / before, rtol=1e-4)

    training.train(tiny(method=Method.AGC), tmp_path / "agc")
    run = pgt_diag.load_run(tmp_path / "agc")
    layer = "layer3.0.conv2"
    ratio = run.gradient_norms(layer).iloc[1:] / run.weight_norms(layer).shift(1).iloc[1:]
    clipped = run.clip_factors(layer).iloc[1:] < 1
    assert clipped.any(axis=None)
    np.testing.assert_allclose(ratio.to_numpy()[clipped.to_numpy()], 0.01, rtol=1e-3)
    assert (ratio.to_numpy()[~clipped.to_numpy()] <= 0.01 * 1.001).all()


def recorded(path: Path) -> tuple[Any, ...]:
    run = pgt_diag.load_run(path)
    timed = ["seconds", "images_per_second", "recorder_seconds"]
    return (
        run.metrics.drop(columns=timed),
        run.iterations,
        run.events,
        run.gap_norms(),
        *(run.weight_norms(layer.name) for layer in run.layers),
        *(run.gradient_norms(layer.name) for layer in run.layers),
    )


def test_a_seed_makes_a_run_repeatable_bit_for_bit(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        training.train(tiny(seed=seed, method=Method.PGT), tmp_path / name)
    first, same, other = (recorded(tmp_path / name) for name in "abc")
    assert all(x.equals(y) for x, y in zip(first, same, strict=True))
    assert not first[1].equals(other[1])


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_it_readable(tmp_path: Path) -> None:
    config = tiny(lr=1e6, warmup_epochs=0.0, epochs=6)
    with pytest.raises(DivergedError, match=r"at iteration (\d+); iterations 0 to \d+ are") as info:
        training.train(config, tmp_path / "run")
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.status == "diverged"
    assert run.info["message"] == str(info.value)
    count = run.iteration_count
    assert f"at iteration {count}; iterations 0 to {count - 1} are" in str(info.value)
    assert np.isfinite(run.iterations["loss"]).all()


def test_divergence_that_the_device_notices_late_records_nothing_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA path, where the loop does not read the loss: only the writer sees it."""
    monkeypatch.setattr(training.math, "isfinite", lambda _: True)
    with pytest.raises(DivergedError):
        training.train(tiny(lr=1e6, warmup_epochs=0.0, epochs=40), tmp_path / "run")
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.status == "diverged"
    assert 0 < run.iteration_count < 30
    assert np.isfinite(run.iterations["loss"]).all()


def test_divergence_in_the_last_iterations_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.math, "isfinite", lambda _: True)
    monkeypatch.setattr("pgt_diag.recorder._HANDOVER_SECONDS", 1e9)
    with pytest.raises(DivergedError, match="at iteration"):
        training.train(tiny(lr=1e6, warmup_epochs=0.0), tmp_path / "run")
    assert pgt_diag.load_run(tmp_path / "run").status == "diverged"


def test_weights_that_the_last_step_destroyed_are_a_divergence(tmp_path: Path) -> None:
    config = tiny(lr=1e30, warmup_epochs=0.0, epochs=1, batch_size=64)
    with pytest.raises(DivergedError, match="test loss is NaN or infinite after iteration 0"):
        training.train(config, tmp_path / "run")
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.iteration_count) == ("diverged", 1)


class Interrupting(Listener):
    def iterated(self, progress: Progress) -> None:
        if progress.iteration == 6:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_every_iteration(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny(), tmp_path / "run", listener=Interrupting())
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.iteration_count) == ("interrupted", 6)
    assert len(run.weight_norms("conv1")) == 6


def test_progress_and_epochs_are_reported_to_the_listener(tmp_path: Path) -> None:
    class Counting(Listener):
        plan: Plan
        iterations: list[Progress]
        epochs: list[dict[str, Any]]

        def started(self, plan: Plan) -> None:
            self.plan, self.iterations, self.epochs = plan, [], []

        def iterated(self, progress: Progress) -> None:
            self.iterations.append(progress)

        def finished_epoch(self, metrics: dict[str, Any]) -> None:
            self.epochs.append(metrics)

    listener = Counting()
    training.train(tiny(), tmp_path / "run", listener=listener)
    assert [progress.iteration for progress in listener.iterations] == list(range(1, 9))
    assert listener.iterations[-1].seconds_left == 0
    halfway = listener.iterations[3]
    assert halfway.seconds_left == pytest.approx(16 * 4 / halfway.images_per_second)
    assert (listener.plan.iterations, listener.plan.filters) == (8, 4800)
    assert [row["epoch"] for row in listener.epochs] == [0, 1]


def test_snapshots_are_taken_from_start_to_end(tmp_path: Path) -> None:
    training.train(tiny(feature_map_images=2), tmp_path / "run")
    snapshots = pgt_diag.load_run(tmp_path / "run").feature_maps
    assert [snapshot.iteration for snapshot in snapshots] == [0, 2, 8]
    assert all(snapshot.maps.shape[:2] == (2, 64) for snapshot in snapshots)
    assert all(snapshot.layer == "layer1.0.conv1" for snapshot in snapshots)


def test_few_test_images_are_all_shown(tmp_path: Path) -> None:
    config = tiny(synthetic_images=16, synthetic_classes=2, epochs=1, feature_map_images=64)
    training.train(config, tmp_path / "run")
    snapshots = pgt_diag.load_run(tmp_path / "run").feature_maps
    assert {len(snapshot.maps) for snapshot in snapshots} == {4}


def test_snapshots_do_not_change_the_run(tmp_path: Path) -> None:
    for name, count in (("without", 0), ("with", 5)):
        config = tiny(feature_map_snapshots=count, norm=Norm.BATCH)
        training.train(config, tmp_path / name)
    without, with_snapshots = recorded(tmp_path / "without"), recorded(tmp_path / "with")
    assert all(x.equals(y) for x, y in zip(without, with_snapshots, strict=True))


@pytest.mark.parametrize("model", ["squeezenet1_1", "mobilenet_v3_small"])
def test_other_torchvision_networks_train(model: str, tmp_path: Path) -> None:
    small = {"image_size": 64, "batch_size": 8, "synthetic_images": 16, "epochs": 1}
    config, _ = compose(Preset.SMOKE, {}, {**TINY, "model": model, "method": "agc", **small})
    training.train(config, tmp_path / "run")
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.iteration_count == 2
    assert len(run.gap_norms().columns) == run.layers[-1].filters


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"device": Device.CUDA}, ConfigurationError, "no CUDA GPU"),
        ({"device": Device.AUTO, "amp": Amp.BF16}, ConfigurationError, "no GPU to use it"),
        ({"model": "resnet19"}, ConfigurationError, "resnet18"),
        ({"batch_size": 65}, ConfigurationError, "batch"),
        ({"feature_map_layer": 20}, ConfigurationError, "has 20 convolutions, counted from 0"),
        ({"model": "alexnet"}, ConfigurationError, "cannot take images of 16×16"),
        ({"dataset": DatasetName.CIFAR10, "data": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=message):
        training.train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_unless_forced(tmp_path: Path) -> None:
    training.train(tiny(epochs=1), tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        training.train(tiny(), tmp_path / "run")
    training.train(tiny(), tmp_path / "run", force=True)
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 8
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds other files"):
        training.train(tiny(), tmp_path / "other", force=True)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", [Amp.BF16, Amp.FP16, Amp.OFF])
@pytest.mark.parametrize("method", [Method.BASELINE, Method.AGC_PGT, Method.GC])
def test_trains_and_records_on_a_gpu(amp: Amp, method: Method, tmp_path: Path) -> None:
    config = tiny(device=Device.CUDA, amp=amp, method=method, threads=None)
    training.train(config, tmp_path / "run")
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.status == "finished"
    assert 0 < run.iteration_count <= 8
    assert np.isfinite(run.iterations["grad_norm"]).all()
    assert np.isfinite(run.weight_norms("conv1")).all(axis=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", [Amp.BF16, Amp.FP16])
def test_resume_is_exact_on_a_gpu_with_deterministic_algorithms(amp: Amp, tmp_path: Path) -> None:
    config = tiny(
        device=Device.CUDA, amp=amp, method=Method.AGC_PGT, threads=None, deterministic=True
    )
    training.train(config, tmp_path / "undisturbed")
    asked = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        training.train(config, tmp_path / "run", stop=lambda: next(asked) == 5)
    training.train(config, tmp_path / "run", resume=resume_point(tmp_path / "run"))
    assert difference(contents(tmp_path / "undisturbed"), contents(tmp_path / "run")) is None


def test_an_iteration_in_parts_is_one_iteration_to_the_recorder(tmp_path: Path) -> None:
    training.train(tiny(), tmp_path / "whole")
    training.train(tiny(accumulate=4), tmp_path / "parts")
    whole, parts = (pgt_diag.load_run(tmp_path / name) for name in ("whole", "parts"))
    assert parts.iteration_count == whole.iteration_count == 8
    for column in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(parts.iterations[column], whole.iterations[column], rtol=2e-3)
    np.testing.assert_allclose(parts.gap_norms(), whole.gap_norms(), rtol=2e-3, atol=1e-4)
    first = [
        run.events.query("kind == 'silent' and start_iteration == 0") for run in (whole, parts)
    ]
    assert first[0]["filter"].tolist() == first[1]["filter"].tolist()


def test_a_skipped_first_step_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    # What memory happened to hold: NaN, so that it shows.
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    config = tiny()
    weights = {}
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(model, config)
        if not fused:
            optimizer = torch.optim.SGD(
                [{"params": [model.weight], "weight_decay": 5e-4}, {"params": [model.bias]}],
                lr=config.peak_lr,
                momentum=0.9,
                nesterov=True,
            )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for values in (torch.inf, 1.0, 2.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((1, 3), values)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights[fused] = [parameter.detach() for parameter in model.parameters()]
    for one, other in zip(weights[True], weights[False], strict=True):
        torch.testing.assert_close(one, other)


def test_a_disk_that_cannot_be_written_is_called_so_and_not_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(RunDirectoryError, match="cannot be written: no permission to write in "):
        training.plan(tiny(), tmp_path / "run")
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(RunDirectoryError, match="cannot be written: its disk is read-only; name"):
        training.train(tiny(), tmp_path / "run")
    assert not any(tmp_path.iterdir())
