"""The recorder where a loop is unusual, a step is skipped, or the disk is full."""

import copy
import errno
import json
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pgt_diag
from pgt_diag import storage
from pgt_diag.errors import (
    ConfigurationError,
    NoSpaceError,
    RecorderError,
    RunDirectoryError,
    storage_error,
)
from reports.summary import RunSummary
from reports.verdict import verdict
from tests.loops import CLASSES, batches, norms64, small_net, train_steps


class Functional(nn.Module):
    """Two convolutions, functional ReLUs to the very end, filter 1 of the second dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 6, 3)
        self.b = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, CLASSES)
        with torch.no_grad():
            self.b.weight[1], self.b.bias[1] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_the_last_activation_may_be_functional_too(tmp_path: Path) -> None:
    model = Functional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer)
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.state_counts("silent")["b"].tolist() == [1, 1, 1]
    expected = [
        F.relu(model.b(F.relu(model.a(images)))).mean((2, 3)).norm(dim=0).detach().numpy()
        for images, _ in batches(3, side=14)
    ]
    np.testing.assert_allclose(run.gap_norms(), expected, rtol=1e-5)


def test_what_cannot_be_followed_is_unknown_and_never_called_silent(tmp_path: Path) -> None:
    model = small_net()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, -1
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "frozen", optimizer=optimizer):
        train_steps(model, optimizer)
    with pgt_diag.FilterRecorder(model, tmp_path / "named", optimizer=optimizer, taps={"0": "1"}):
        train_steps(model, optimizer)
    frozen, named = (pgt_diag.load_run(tmp_path / name) for name in ("frozen", "named"))
    assert frozen.layers[0].activation == "not seen"
    assert frozen.state_counts("silent")["0"].tolist() == [0, 0, 0]
    assert named.state_counts("silent")["0"].tolist() == [1, 1, 1]
    assert frozen.gradient_norms("0").isna().all(axis=None), "no gradient is no zero gradient"
    assert frozen.state_counts("zero_gradient")["0"].tolist() == [0, 0, 0]


def test_a_layer_that_a_step_did_not_call_is_not_called_silent(tmp_path: Path) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.relu, self.calls = nn.ReLU(), 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.a(x))
            self.calls += 1
            if self.calls % 2:
                x = self.relu(self.b(x))
            return x.mean((2, 3))

    torch.manual_seed(0)
    model = Skipping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 4)
    silent = pgt_diag.load_run(tmp_path / "run").state_counts("silent")
    assert silent.to_numpy().sum() == 0
    assert pgt_diag.load_run(tmp_path / "run").gap_norms().isna().all(axis=1).tolist() == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_the_batch_of_a_skipped_step_is_forgotten(tmp_path: Path, fused: bool) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (images, target), *_ = batches(1, side=10)
    with pgt_diag.FilterRecorder(
        model, tmp_path / "run", optimizer=optimizer, stop_when_diverged=True
    ) as recorder:
        for step in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            scaler.scale(loss * (torch.inf if step in {1, 3} else 1)).backward()
            recorder.log(loss=torch.tensor(torch.nan) if step == 5 else loss.detach())
            scaler.step(optimizer)
            scaler.update()
        recorder.flush()
        assert recorder.diverged_at == 3, "steps 1 and 3 were no iterations"
    gap = pgt_diag.load_run(tmp_path / "run").gap_norms()
    assert len(gap) == 3
    assert (gap.to_numpy() == gap.to_numpy()[0]).all()


def test_a_recorded_model_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        early = copy.deepcopy(model)
        train_steps(model, optimizer)
        late = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        for images, _ in batches(1, side=14):
            early(images), late(images)
            loaded = torch.load(tmp_path / "model.pt", weights_only=False)
            assert torch.equal(loaded(images), model.eval()(images))
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes_are_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for images, target in batches(2, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(dtype)), target).backward()
            total = math.sqrt(
                sum(float(p.grad.double().square().sum()) for p in model.parameters())
            )
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    np.testing.assert_allclose(run.weight_norms("0").iloc[-1], norms64(model[0].weight), rtol=1e-5)
    assert run.iterations["grad_norm"].iloc[-1] == pytest.approx(total, rel=1e-5)


def test_a_nan_stretch_does_not_hide_the_gap_features_before_it(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        train_steps(model, optimizer, 2)
        recorder.flush()
        with torch.no_grad():
            model[2].weight.fill_(torch.nan)
        train_steps(model, optimizer, 2)
    gap = pgt_diag.load_run(tmp_path / "run").gap_norms()
    assert gap.isna().all(axis=1).tolist() == [False, False, True, True]


def test_a_step_that_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pgt_diag.FilterRecorder(model, tmp_path / "a", optimizer=optimizer)
    with recorder:
        images, target = next(batches(1, side=14))
        with pytest.raises(RecorderError, match=r"step\(closure\)"):
            optimizer.step(lambda: F.cross_entropy(model(images), target))
        model.eval()
        F.cross_entropy(model(images), target).backward()
        with pytest.raises(RecorderError, match=r"eval mode, call model\.train"):
            optimizer.step()
    recorder.flush()
    with pytest.raises(RecorderError, match="closed"):
        recorder.snapshot(0, images, images.byte(), ["a"])
    unused = pgt_diag.FilterRecorder(model, tmp_path / "b", optimizer=optimizer, info={"note": 1})
    unused.close()
    info = json.loads((tmp_path / "b" / "run.json").read_text())
    assert (info["note"], info["status"]) == (1, "finished")


def test_a_second_writer_is_refused_even_with_force(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer)
        with pytest.raises(RunDirectoryError, match="is being written by another run"):
            pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, force=True)
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 3
    pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, force=True).close()


def test_snapshots_leave_every_module_in_its_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, _ = next(batches(1, side=8))
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        recorder.snapshot(0, images, images.byte(), ["a"] * len(images))
    assert [module.training for module in model] == [True, False, True, True]


def test_a_full_disk_is_told_to_the_loop_and_what_was_recorded_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    train_steps(model, optimizer)
    recorder.flush()

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".parquet":
            raise storage_error(path, OSError(errno.ENOSPC, "No space left on device"))
        write(path, data)

    write = storage.write

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        train_steps(model, optimizer)
        with pytest.raises(NoSpaceError, match="no space left") as info:
            recorder.flush()
        assert info.value.exit_code == 4
        with pytest.raises(NoSpaceError):
            recorder.close()
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.iteration_count) == ("failed", 3)
    assert "pgt-diag-writer" not in {thread.name for thread in threading.enumerate()}


def test_rows_reach_the_disk_by_time_when_steps_are_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 2)
        deadline = time.perf_counter() + 20
        while pgt_diag.load_run(tmp_path / "run").iteration_count < 2:
            assert time.perf_counter() < deadline, "two rows of thirty-two never left the ring"


def test_the_recorder_counts_who_is_dead_now(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    counts = []
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        for step in range(30):
            with torch.no_grad():
                model[2].weight[1] = 1 if step >= 25 else 0
                model[2].weight[3] = 0 if step >= 12 else 1
            train_steps(model, optimizer, 1)
            recorder.flush()
            counts.append(recorder.dead_filters)
    # Filter 1 is dead from 0, filter 3 from 12, and both count after ten iterations.
    assert counts == [0] * 9 + [1] * 12 + [2] * 4 + [1] * 5


@pytest.mark.parametrize(("planned", "window"), [(None, 10), (40, 10), (2500, 25)])
def test_the_live_count_has_collapsed_filters_and_is_the_reports_when_the_run_ends(
    planned: int | None, window: int, tmp_path: Path
) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    info = {"planned_iterations": planned} if planned else {}
    counts, reported = [], []
    with pgt_diag.FilterRecorder(
        model, tmp_path / "run", optimizer=optimizer, info=info
    ) as recorder:
        for step in range(40):
            if step == 5:
                with torch.no_grad():
                    model[2].weight[1] *= 1e-4  # it has a map and a gradient all the same
            train_steps(model, optimizer, 1)
            recorder.flush()
            counts.append(recorder.dead_filters)
            reported.append(RunSummary(pgt_diag.load_run(tmp_path / "run"), "run").dead)
    assert counts == [0] * (5 + window - 1) + [1] * (40 - 5 - window + 1)
    assert reported == counts
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.state_counts("silent").sum(axis=None) == 0


def test_a_filter_without_a_gradient_is_unknown_while_it_is_silent(tmp_path: Path) -> None:
    model = small_net()
    with torch.no_grad():
        model[2].weight[1] = -1  # silent: what comes in is never negative
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        train_steps(model, optimizer, 20)
        model[2].weight.requires_grad_(False)
        model[2].weight.grad = None
        train_steps(model, optimizer, 20)
    run = pgt_diag.load_run(tmp_path / "run")
    # Dead when it was frozen, and so dead still: nothing was seen that had revived it.
    assert (RunSummary(run, "run").dead, len(RunSummary(run, "run").unknown)) == (1, 0)
    assert run.unknown_spells[["kind", "layer", "filter", "start_iteration"]].values.tolist() == [
        ["zero_gradient", "2", index, 20] for index in range(5)
    ]

    frozen = small_net()
    with torch.no_grad():
        frozen[2].weight[1] = -1
    frozen[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(frozen, tmp_path / "frozen", optimizer=optimizer):
        train_steps(frozen, optimizer, 20)
    summary = RunSummary(pgt_diag.load_run(tmp_path / "frozen"), "frozen")
    assert (summary.dead, summary.unknown["filter"].tolist()) == (0, [1])
    said = verdict([summary.run]).sentences[0].text
    assert "none of the 10 filters that can be told died in 20 iterations" in said
    assert (
        "Of 1 other filter it is unknown whether it died: no gradient was seen in module 2" in said
    )


@pytest.mark.parametrize("way", ["a compiled copy", "compiled in place"])
def test_a_compiled_model_is_recorded_as_one_that_is_not(way: str, tmp_path: Path) -> None:
    def record(name: str, *, compiled: bool) -> pgt_diag.Run:
        model = small_net()
        with torch.no_grad():
            model[2].weight[1] = -1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        called: nn.Module = model
        if compiled and way == "compiled in place":
            model.compile(backend="aot_eager")
        elif compiled:
            called = torch.compile(model, backend="aot_eager")
        with pgt_diag.FilterRecorder(model, tmp_path / name, optimizer=optimizer):
            train_steps(called, optimizer)
        return pgt_diag.load_run(tmp_path / name)

    one, other = record("compiled", compiled=True), record("plain", compiled=False)
    assert other.state_counts("silent")["2"].tolist() == [1, 1, 1]
    assert [layer.activation for layer in one.layers] == [
        layer.activation for layer in other.layers
    ]
    for layer in ("0", "2"):
        assert one.weight_norms(layer).equals(other.weight_norms(layer))
        assert one.gradient_norms(layer).equals(other.gradient_norms(layer))
    assert one.gap_norms().equals(other.gap_norms())
    assert one.events.equals(other.events)


@pytest.mark.parametrize("whole", [0, 1])
def test_an_empty_batch_is_named_and_kills_no_filter(whole: int, tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    message = r"^the batch is empty: 0 images reached module '\w+'; leave such batches out"
    with pytest.raises(RecorderError, match=message), recorder:
        train_steps(model, optimizer, steps=whole)
        model(torch.empty(0, 3, 14, 14))
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.iteration_count == whole
    if whole:
        assert run.state_counts("silent").to_numpy().sum() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_named_and_the_other_kind_recorded(
    tmp_path: Path, reentrant: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4)

        def maps(self, images: Tensor) -> Tensor:
            return self.relu(self.conv(images))

        def forward(self, images: Tensor) -> Tensor:
            maps = checkpoint(self.maps, images, use_reentrant=reentrant)
            return self.head(maps.mean((2, 3)))

    model = Net()
    with torch.no_grad():
        model.conv.bias[1] = -100
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images = torch.randn(4, 3, 8, 8, requires_grad=True)

    def train() -> None:
        with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(model(images), torch.arange(4)).backward()
                optimizer.step()

    if reentrant:
        with pytest.raises(ConfigurationError, match="use_reentrant=True"):
            train()
        return
    train()
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.state_counts("silent")["conv"].tolist() == [1, 1]
