"""A step that is captured once and replayed trains and records as one made anew every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pgt_diag
from pgt_diag import clipping, recorder, reductions, training
from pgt_diag.config import CudaGraph, RunConfig
from pgt_diag.distributed import World
from pgt_diag.errors import ConfigurationError, RecorderError
from pgt_diag.progress import Listener
from pgt_diag.ring import HALF
from tests.crash import MODEL, register_net
from tests.graphs import MemoryCapture, MemoryGraph
from tests.loops import batches, small_net
from tests.runs import contents, difference

TINY: dict[str, Any] = {
    "dataset": "synthetic",
    "synthetic_images": 48,
    "synthetic_classes": 3,
    "image_size": 16,
    "augment": "small",
    "model": MODEL,
    "batch_size": 8,
    "epochs": 2,
    "lr": 0.01,
    "warmup_epochs": 1,
    "device": "cpu",
    "threads": 1,
    "feature_map_snapshots": 3,
    "feature_map_images": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "pgt, smoothed": {"method": "pgt", "label_smoothing": 0.1},
    "gc+pgt": {"method": "gc+pgt", "clip_norm": 0.5},
    "agc+pgt, in parts": {"method": "agc+pgt", "accumulate": 3, "batch_size": 12},
    "no augmentation, thinned": {"augment": "none", "record_every": 3},
    "batch norm": {"model": "resnet18", "norm": "batch", "stem": "small", "image_size": 8},
}


@pytest.fixture
def on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training capture its step, as if the CPU had CUDA graphs."""
    monkeypatch.setattr(training, "resolve_graph", lambda *_: True)
    monkeypatch.setattr(training, "CudaCapture", lambda _: MemoryCapture())
    monkeypatch.setattr(recorder, "is_capturing", lambda _: MemoryGraph.capturing)
    for module in (clipping, reductions):
        monkeypatch.setattr(module, "is_asynchronous", lambda _: True)
    monkeypatch.setattr(MemoryCapture, "captured", 0)
    register_net()


@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_is_the_same_to_the_bit(
    case: str, tmp_path: Path, on_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**TINY, **CASES[case]}
    config = RunConfig.from_mapping(values)
    training.train(config, tmp_path / "captured")
    assert MemoryCapture.captured == 1
    monkeypatch.setattr(training, "resolve_graph", lambda *_: False)
    training.train(config, tmp_path / "plain")
    assert MemoryCapture.captured == 1
    assert difference(contents(tmp_path / "captured"), contents(tmp_path / "plain")) is None


def test_a_step_that_cannot_be_captured_is_made_as_it_is(
    tmp_path: Path, on_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Listener):
        def __init__(self) -> None:
            self.messages: list[str] = []

        def noted(self, message: str) -> None:
            self.messages.append(message)

    step_of = training.TrainingStep._iterate

    def waiting(self: training.TrainingStep, *parts: torch.Tensor) -> torch.Tensor:
        sums = step_of(self, *parts)
        sums[0].item()
        return sums

    monkeypatch.setattr(training.TrainingStep, "_iterate", waiting)
    notes = Notes()
    training.train(RunConfig.from_mapping(TINY), tmp_path / "captured", listener=notes)
    assert len(notes.messages) == 1
    assert "cannot be captured as a CUDA graph: operation _local_scalar" in notes.messages[0]
    run = pgt_diag.load_run(tmp_path / "captured")
    assert (run.iteration_count, run.info["cuda_graph"]) == (12, False)
    with pytest.raises(ConfigurationError, match=r"cuda_graph is on and the step cannot be capt"):
        training.train(
            RunConfig.from_mapping({**TINY, "cuda_graph": "on", "device": "auto"}), tmp_path / "on"
        )
    monkeypatch.setattr(training, "resolve_graph", lambda *_: False)
    training.train(RunConfig.from_mapping(TINY), tmp_path / "plain")
    assert difference(contents(tmp_path / "captured"), contents(tmp_path / "plain")) is None


@pytest.mark.parametrize(
    ("choice", "device", "size", "expected"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 2, False),
        ("auto", "cpu", 1, False),
        ("on", "cuda", 1, True),
        ("on", "cuda", 2, "2 processes train"),
        ("on", "cpu", 1, "there is no GPU"),
        ("off", "cuda", 1, False),
    ],
)
def test_one_process_with_a_gpu_captures_its_step(
    choice: str, device: str, size: int, expected: bool | str
) -> None:
    world = World(0, size, torch.device(device))
    if isinstance(expected, bool):
        assert training.resolve_graph(CudaGraph(choice), world) is expected
    else:
        with pytest.raises(ConfigurationError, match=expected):
            training.resolve_graph(CudaGraph(choice), world)


def test_a_loop_of_ones_own_tells_of_its_replays(tmp_path: Path, on_memory: None) -> None:
    def record(name: str, *, captured: bool) -> pgt_diag.Run:
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05), fused=True)
        images, target = next(batches(1, side=14))
        images, target = images.clone(), target.clone()

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()
            return loss

        with pgt_diag.FilterRecorder(model, tmp_path / name, optimizer=optimizer) as recorder:
            replay = None
            for new_images, new_target in batches(5, side=14):
                images.copy_(new_images)
                target.copy_(new_target)
                if replay is not None:
                    replay()
                    recorder.replayed()
                    continue
                step()
                if captured:
                    replay, _ = MemoryCapture().capture(step)
        return pgt_diag.load_run(tmp_path / name)

    one, other = record("captured", captured=True), record("plain", captured=False)
    assert one.iteration_count == 5
    for layer in ("0", "2"):
        assert one.weight_norms(layer).equals(other.weight_norms(layer))
        assert one.gradient_norms(layer).equals(other.gradient_norms(layer))
    assert one.gap_norms().equals(other.gap_norms())


def test_a_replay_before_any_step_is_a_mistake(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder,
        pytest.raises(RecorderError, match="make a step before the capture"),
    ):
        recorder.replayed()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["baseline", "agc+pgt", "gc"])
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_captured_run_on_a_gpu_is_close_to_one_that_is_not(
    method: str, amp: str, tmp_path: Path
) -> None:
    values = {**TINY, "model": "resnet18", "device": "cuda", "amp": amp, "method": method}
    try:
        for choice in ("on", "off"):
            config = RunConfig.from_mapping({**values, "cuda_graph": choice, "deterministic": True})
            training.train(config, tmp_path / choice)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    on, off = (pgt_diag.load_run(tmp_path / choice) for choice in ("on", "off"))
    assert 6 <= on.iteration_count == off.iteration_count <= 12, "fp16 may skip the first steps"
    for layer in on.layers:
        np.testing.assert_allclose(
            on.weight_norms(layer.name), off.weight_norms(layer.name), rtol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recording_never_waits_for_the_gpu(tmp_path: Path) -> None:
    model = small_net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    images, target = (each.cuda() for each in next(batches(1, side=14)))
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:

        def step() -> None:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()
            recorder.log(loss=loss.detach())
            optimizer.step()

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3 * HALF):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert pgt_diag.load_run(tmp_path / "run").iteration_count == 3 * HALF + 1
