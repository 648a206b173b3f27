"""The recorder against plain loops: exact to the iteration, in anybody's training loop."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import pgt_diag
from pgt_diag.activations import convolutions
from pgt_diag.errors import ConfigurationError, RecorderError, RunDirectoryError
from pgt_diag.models import build_model
from pgt_diag.reductions import filter_norms
from pgt_diag.sgd import MeasuringSGD
from tests import plain_kernels
from tests.loops import CLASSES, batches, norms64, small_net
from tests.reference import (
    mobilenet_maps,
    resnet_maps,
    se_resnet_maps,
    shufflenet_maps,
    squeezenet_maps,
)


def timms(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)


NETWORKS: dict[
    str, tuple[Callable[..., nn.Module], Callable[..., tuple[Tensor, dict[str, Tensor]]]]
]
NETWORKS = {
    "non-BN ResNet-18": (
        lambda: torchvision.models.resnet18(norm_layer=nn.Identity, num_classes=CLASSES),
        resnet_maps,
    ),
    "SqueezeNet": (
        lambda: torchvision.models.squeezenet1_1(num_classes=CLASSES, dropout=0.0),
        squeezenet_maps,
    ),
    "ShuffleNet": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES),
        shufflenet_maps,
    ),
    "MobileNet": (
        lambda: torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.25, dropout=0.0),
        mobilenet_maps,
    ),
    "SE-ResNet-18": (lambda: timms("seresnet18"), se_resnet_maps),
    "non-BN SE-ResNet-50": (
        lambda: build_model("timm/seresnet50", num_classes=CLASSES),
        se_resnet_maps,
    ),
}
LAST_MAPS = {"SE-ResNet-18": "layer4.1.conv2", "non-BN SE-ResNet-50": "layer4.2.conv3"}
"""Whose map goes to the classifier, where that is not the last convolution in module order."""


@pytest.mark.parametrize(
    ("network", "as_on_a_gpu"),
    [*((name, False) for name in NETWORKS), ("non-BN ResNet-18", True), ("MobileNet", True)],
)
def test_records_what_a_plain_loop_measures(
    network: str, as_on_a_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, reference = NETWORKS[network]
    if as_on_a_gpu:
        plain_kernels.use(monkeypatch, plain_kernels)
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        # A filter that cannot answer, in every layer that has a neighbour to spare.
        for module in convolutions(model).values():
            module.weight[1].zero_()
            if module.bias is not None:
                module.bias[1] = -1
    twin = copy.deepcopy(model)
    # Batch norm makes much of the last digit, in which the measuring step differs.
    measuring = as_on_a_gpu and network == "non-BN ResNet-18"
    optimizer, twin_optimizer = (
        kind(m.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
        for m, kind in (
            (model, MeasuringSGD if measuring else torch.optim.SGD),
            (twin, torch.optim.SGD),
        )
    )
    expected: dict[str, list] = {key: [] for key in ("weight", "gradient", "silent", "gap", "norm")}
    names = list(convolutions(model))

    recorder = pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    with recorder:
        for images, target in batches(4):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()

            twin_optimizer.zero_grad()
            logits, maps = reference(twin, images)
            F.cross_entropy(logits, target).backward()
            gradients = [p.grad for p in twin.parameters()]
            expected["norm"].append(
                float(torch.cat([g.double().ravel() for g in gradients]).norm())
            )
            expected["gradient"].append(
                [norms64(dict(twin.named_modules())[n].weight.grad) for n in names]
            )
            expected["silent"].append(
                [(maps[n] == 0).flatten(2).all(2).all(0).numpy() for n in names]
            )
            expected["gap"].append(
                maps[LAST_MAPS.get(network, names[-1])]
                .double()
                .mean((2, 3))
                .norm(dim=0)
                .detach()
                .numpy()
            )
            twin_optimizer.step()
            expected["weight"].append(
                [norms64(dict(twin.named_modules())[n].weight) for n in names]
            )

    run = pgt_diag.load_run(tmp_path / "run")
    assert [layer.name for layer in run.layers] == names
    assert run.iteration_count == 4
    silent_filters = run.state_counts("silent")
    for index, name in enumerate(names):
        weight = np.stack([row[index] for row in expected["weight"]])
        gradient = np.stack([row[index] for row in expected["gradient"]])
        np.testing.assert_allclose(run.weight_norms(name), weight, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(run.gradient_norms(name), gradient, rtol=1e-2, atol=1e-6)
        silent = [int(row[index].sum()) for row in expected["silent"]]
        assert silent_filters[name].tolist() == silent, name
    np.testing.assert_allclose(run.gap_norms(), np.stack(expected["gap"]), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(run.iterations["grad_norm"], expected["norm"], rtol=1e-3)
    assert silent_filters.to_numpy().sum() > 0, "nothing was silent: the comparison proves little"


def test_events_name_planted_deaths_and_revivals_at_their_exact_iterations(tmp_path: Path) -> None:
    model = small_net()
    conv = model[2]
    original = conv.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for iteration, (images, target) in enumerate(batches(80, size=2, side=10)):
            with torch.no_grad():
                conv.weight.copy_(original)
                if 7 <= iteration < 45:
                    conv.weight[2] = 0
                if iteration >= 66:
                    conv.weight[4] = 0
                if 20 <= iteration < 30:
                    conv.weight[3] *= 5e-3
                if 24 <= iteration < 27:
                    conv.weight[3] *= 1e-30
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()

    events = pgt_diag.load_run(tmp_path / "run").events
    events = events[events["layer"] == "2"]
    found = {
        (row.kind, row.filter): (
            row.start_iteration,
            None
            if row.end_iteration is None or row.end_iteration != row.end_iteration
            else row.end_iteration,
        )
        for row in events.astype({"end_iteration": "float"}).itertuples()
        if row.filter in {2, 3, 4}
    }
    assert found == {
        ("silent", 2): (7, 45),
        ("zero_gradient", 2): (7, 45),
        ("collapsed", 2): (7, 45),
        ("zeroed", 2): (7, 45),
        ("silent", 4): (66, None),
        ("zero_gradient", 4): (66, None),
        ("collapsed", 4): (66, None),
        ("zeroed", 4): (66, None),
        ("collapsed", 3): (20, 30),
        ("zeroed", 3): (24, 27),
    }


def test_a_tiny_filter_is_not_mistaken_for_zero() -> None:
    weight = torch.randn(4, 3, 3, 3)
    weight[1] *= 1e-30
    weight[2] = 0
    weight[3, 1:], weight[3, 0] = 0, 1e-42
    expected = norms64(weight)
    norms = torch.empty(4)
    filter_norms([weight], [norms])
    np.testing.assert_allclose(norms, expected, rtol=1e-2)
    assert norms[2] == 0
    assert torch.linalg.vector_norm(weight[1]) == 0, "the trap this test is about is gone"


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_grad_scaler_skips_is_no_iteration(tmp_path: Path, fused: bool) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = []
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        for step, (images, target) in enumerate(batches(6, side=10)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            scaler.scale(loss * (torch.inf if step in {0, 3} else 1)).backward()
            gradient = model[0].weight.grad.clone() / scaler.get_scale()
            recorder.log(loss=loss.detach())
            scaler.step(optimizer)
            scaler.update()
            if step not in {0, 3}:
                expected.append((norms64(gradient), norms64(model[0].weight), loss.item()))
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.iteration_count == 4
    np.testing.assert_allclose(run.gradient_norms("0"), [e[0] for e in expected], rtol=1e-5)
    np.testing.assert_allclose(run.weight_norms("0"), [e[1] for e in expected], rtol=1e-6)
    np.testing.assert_allclose(run.iterations["loss"], [e[2] for e in expected], rtol=1e-6)
    assert np.isfinite(run.iterations["grad_norm"]).all()


def test_accumulated_batches_are_one_iteration_and_silent_means_on_all_of_them(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    positive, negative = torch.ones(3, 1, 1, 1), -torch.ones(3, 1, 1, 1)
    pairs = [(positive, positive), (positive, negative), (negative, negative)]
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for pair in pairs:
            optimizer.zero_grad()
            for images in pair:
                model(images).sum().backward()
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    silent = run.events[run.events["kind"] == "silent"]
    spells = silent[["filter", "start_iteration", "end_iteration"]].astype(object)
    assert spells.where(spells.notna(), None).to_numpy().tolist() == [[1, 0, 1], [0, 2, None]]
    np.testing.assert_allclose(run.gap_norms(), [[6**0.5, 0], [3**0.5, 3**0.5], [0, 6**0.5]])


def test_evaluation_between_steps_leaves_no_trace(tmp_path: Path) -> None:
    frames = []
    for evaluate in (False, True):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        folder = tmp_path / str(evaluate)
        with pgt_diag.FilterRecorder(model, folder, optimizer=optimizer):
            for images, target in batches(4, side=10):
                loss = F.cross_entropy(model(images), target)
                if evaluate:
                    model.eval()
                    model(10 * images)
                    model.train()
                    with torch.no_grad():
                        model(10 * images)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        frames.append(pgt_diag.load_run(folder).gap_norms())
    assert frames[0].equals(frames[1])


def test_functional_and_signed_activations_are_followed(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)
            self.b = nn.Conv2d(4, 4, 3)
            self.c = nn.Conv2d(4, 4, 3)
            self.d = nn.Conv2d(4, 4, 3)
            self.silu = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = F.max_pool2d(F.relu(self.b(x)), 2)
            x = self.silu(self.c(x))
            return self.d(x).mean((2, 3))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for conv in (model.a, model.b, model.c, model.d):
            conv.weight[0] = 0
            # −1 silences a ReLU; SiLU and no activation at all need an exact 0.
            conv.bias[0] = -1 if conv in (model.a, model.b) else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer):
        for images, target in batches(3, side=14):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    assert [layer.activation for layer in run.layers] == [
        "input of b",
        "output of b before its ReLU",
        "output of silu",
        "output of d",
    ]
    assert run.state_counts("silent").to_numpy().tolist() == [[1, 1, 1, 1]] * 3


def test_norms_between_stored_rows_survive_as_window_extremes(tmp_path: Path) -> None:
    runs = []
    for every in (1, 5):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        folder = tmp_path / str(every)
        with pgt_diag.FilterRecorder(model, folder, optimizer=optimizer, record_every=every):
            for images, target in batches(83, size=3, side=8):
                optimizer.zero_grad()
                F.cross_entropy(model(images), target).backward()
                optimizer.step()
        runs.append(pgt_diag.load_run(folder))
    full, thin = runs
    every_row = full.weight_norms("2")
    stored = [*range(0, 83, 5), 82]
    assert thin.weight_norms("2").index.tolist() == stored
    assert thin.weight_norms("2").equals(every_row.loc[stored])
    low, high = thin.weight_norms("2", "min"), thin.weight_norms("2", "max")
    for previous, row in zip([-1, *stored], stored, strict=False):
        window = every_row.loc[previous + 1 : row]
        np.testing.assert_array_equal(low.loc[row], window.min())
        np.testing.assert_array_equal(high.loc[row], window.max())
    assert full.events.equals(thin.events)
    assert full.iterations.equals(thin.iterations)


def test_flicker_is_counted_and_only_lasting_spells_are_logged(tmp_path: Path) -> None:
    model = small_net()
    conv = model[2]
    original = conv.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer, min_spell=4):
        for iteration, (images, target) in enumerate(batches(40, size=2, side=10)):
            with torch.no_grad():
                conv.weight.copy_(original)
                if iteration % 2:
                    conv.weight[1] = 0
                if 10 <= iteration < 14:
                    conv.weight[2] = 0
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    events = run.events[(run.events["layer"] == "2") & (run.events["kind"] == "zeroed")]
    assert events[["filter", "start_iteration", "end_iteration"]].to_numpy().tolist() == [
        [2, 10, 14]
    ]
    brief = run.brief_spells
    brief = brief[(brief["layer"] == "2") & (brief["kind"] == "zeroed")]
    assert brief[["filter", "spells"]].to_numpy().tolist() == [[1, 19]], "the 20th still lasts"


def test_a_run_can_be_read_while_it_goes_on(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
    with recorder:
        for images, target in batches(70, size=2, side=8):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
        recorder.flush()
        run = pgt_diag.load_run(tmp_path / "run")
        assert run.status == "running"
        assert run.iterations.index.tolist() == list(range(70))
        assert len(run.weight_norms("0")) == 70
        during = run.events
    after = pgt_diag.load_run(tmp_path / "run")
    assert after.status == "finished"
    assert after.events.equals(during)


def test_an_exception_in_the_loop_seals_what_was_recorded(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(ZeroDivisionError),
        pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer),
    ):
        for images, target in batches(5, size=2, side=8):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
        _ = 1 / 0
    run = pgt_diag.load_run(tmp_path / "run")
    assert (run.status, run.iteration_count) == ("failed", 5)
    assert "ZeroDivisionError" in run.info["message"]
    assert not model._forward_hooks, "hooks stayed on"
    assert not optimizer._optimizer_step_pre_hooks


def test_recording_does_not_change_training(tmp_path: Path) -> None:
    weights = []
    for record in (False, True):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if record:
            recorder = pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer)
        for images, target in batches(5, side=10):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
        weights.append(model.state_dict())
    recorder.close()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def test_feature_maps_are_those_of_the_network_in_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=nn.Identity, num_classes=CLASSES)
    images, _ = next(batches(1, size=2))
    originals = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        recorder.snapshot(1, images, originals, ["</script>", "cat"])
    (snapshot,) = pgt_diag.load_run(tmp_path / "run").feature_maps
    _, maps = resnet_maps(model.eval(), images)
    np.testing.assert_allclose(snapshot.maps, maps["layer1.0.conv1"].detach(), rtol=1e-5)
    assert (snapshot.iteration, snapshot.layer) == (0, "layer1.0.conv1")
    assert snapshot.labels == ("</script>", "cat")


def test_clip_factors_and_scalars_that_the_loop_tells_are_kept(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", optimizer=optimizer) as recorder:
        for index, (images, target) in enumerate(batches(3, side=10)):
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            recorder.log(
                loss=2.5,
                accuracy=torch.tensor(75),
                clip_coefficient=0.5,
                clip_factors={"2": torch.tensor([1, 0.5, 1, 0.25, 1]) if index else torch.ones(5)},
            )
            optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    assert run.clip_factors("2").iloc[-1].tolist() == [1, 0.5, 1, 0.25, 1]
    assert run.clip_factors("0").isna().all(axis=None)
    assert run.state_counts("clipped")["2"].tolist() == [0, 2, 2]
    assert run.mean_clip_factors["2"].tolist() == [1, 0.75, 0.75]
    last = run.iterations.iloc[-1]
    assert (last["loss"], last["accuracy"], last["clip_coefficient"]) == (2.5, 75, 0.5)
    assert last["lr"] == pytest.approx(0.1)
    assert np.isnan(last["grad_norm_before_clip"])


def test_a_map_named_by_hand_is_the_one_that_counts(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model[2].weight[3] = 0
    options = {"optimizer": optimizer, "gap_module": "1"}
    images, target = next(batches(1, side=10))
    for folder, module in (("bad", "5"), ("other", "1")):
        recorder = pgt_diag.FilterRecorder(model, tmp_path / folder, taps={"2": module}, **options)
        with recorder, pytest.raises(ConfigurationError, match=f"module '{module}'"):
            model(images)
    with pgt_diag.FilterRecorder(model, tmp_path / "run", taps={"2": "4"}, **options):
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
    run = pgt_diag.load_run(tmp_path / "run")
    assert [layer.activation for layer in run.layers] == ["output of 1", "output of 4"]
    assert run.state_counts("silent")["2"].tolist() == [1]
    expected = F.relu(model[0](images)).mean((2, 3)).norm(dim=0).detach()
    np.testing.assert_allclose(run.gap_norms().iloc[0], expected, rtol=1e-5)


def test_misuse_is_told_in_one_line(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="no convolution"):
        pgt_diag.FilterRecorder(nn.Linear(2, 2), tmp_path / "a", optimizer=optimizer)
    with pytest.raises(ConfigurationError, match="no module 'con'"):
        pgt_diag.FilterRecorder(model, tmp_path / "a", optimizer=optimizer, gap_module="con")
    with pytest.raises(ConfigurationError, match="no convolution '1'"):
        pgt_diag.FilterRecorder(model, tmp_path / "a", optimizer=optimizer, taps={"1": "2"})
    recorder = pgt_diag.FilterRecorder(model, tmp_path / "a", optimizer=optimizer)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        pgt_diag.FilterRecorder(model, tmp_path / "a", optimizer=optimizer)
    with pytest.raises(RecorderError, match="no training forward pass"):
        optimizer.step()
    recorder.close()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "finished"
