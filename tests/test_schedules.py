"""Learning rates against torch's own schedulers."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from pgt_diag.config import LrRule, LrUpdate, RunConfig, Schedule
from pgt_diag.schedules import learning_rate

PER_EPOCH = 7


@pytest.mark.parametrize("schedule", [Schedule.COSINE, Schedule.STEP])
def test_rates_are_those_of_torchs_schedulers(schedule: Schedule) -> None:
    config = RunConfig(
        lr=0.4, warmup_epochs=3, warmup_lr=4e-4, epochs=20, schedule=schedule, step_epochs=(8, 15)
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    warm, total = 3 * PER_EPOCH, 20 * PER_EPOCH
    after = (
        CosineAnnealingLR(optimizer, total - warm)
        if schedule is Schedule.COSINE
        else MultiStepLR(optimizer, [8 * PER_EPOCH - warm, 15 * PER_EPOCH - warm])
    )
    torch_schedule = SequentialLR(
        optimizer, [LinearLR(optimizer, 1e-3, total_iters=warm), after], [warm]
    )
    for iteration in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, iteration, PER_EPOCH) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        torch_schedule.step()


def test_min_lr_is_reached_at_the_end_and_never_undercut() -> None:
    config = RunConfig(lr=0.1, min_lr=0.01, warmup_epochs=0, epochs=3)
    rates = [learning_rate(config, iteration, 100) for iteration in range(301)]
    assert rates[0] == 0.1
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)


def test_warm_up_never_starts_above_the_peak() -> None:
    config = RunConfig(lr=1e-5, warmup_lr=4e-4, warmup_epochs=1, epochs=2)
    assert max(learning_rate(config, i, 10) for i in range(20)) <= 1e-5


def test_constant_stays() -> None:
    config = RunConfig(lr=0.1, warmup_epochs=0, epochs=2, schedule=Schedule.CONSTANT)
    assert {learning_rate(config, i, 10) for i in range(20)} == {0.1}
    assert math.isfinite(learning_rate(config, 0, 1))


@pytest.mark.parametrize("warmup_prefix", [True, False])
@pytest.mark.parametrize("cooldown", [0, 10])
def test_once_an_epoch_rates_are_those_of_timms_scheduler(
    warmup_prefix: bool, cooldown: int
) -> None:
    """The authors train 90 epochs with 5 of warm-up inside them, then 10 at min-lr, by timm."""
    scheduler = pytest.importorskip("timm.scheduler")
    epochs, warm = 90 + cooldown, 5
    config = RunConfig(
        lr=0.1, warmup_lr=0.01, warmup_epochs=warm, epochs=epochs, cooldown_epochs=cooldown,
        min_lr=1e-4, warmup_prefix=warmup_prefix, lr_update=LrUpdate.EPOCH,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    timms = scheduler.CosineLRScheduler(
        optimizer, t_initial=90 - warm if warmup_prefix else 90, lr_min=1e-4, warmup_t=warm,
        warmup_lr_init=0.01, warmup_prefix=warmup_prefix,
    )  # fmt: skip
    for epoch in range(epochs):
        timms.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        for batch in (0, 3, PER_EPOCH - 1):
            rate = learning_rate(config, epoch * PER_EPOCH + batch, PER_EPOCH)
            assert rate == pytest.approx(expected, rel=1e-9), (epoch, batch)


def test_cool_down_keeps_min_lr_also_between_iterations() -> None:
    config = RunConfig(lr=0.1, warmup_epochs=1, epochs=6, cooldown_epochs=2, min_lr=0.01)
    rates = [learning_rate(config, iteration, 10) for iteration in range(60)]
    assert rates[40:] == [0.01] * 20
    assert min(rates[10:40]) > 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_steps_once_an_epoch_keep_the_warm_up_in_stairs() -> None:
    config = RunConfig(
        lr=0.4, warmup_lr=0.1, warmup_epochs=2, epochs=5, schedule=Schedule.STEP, step_epochs=(3,),
        lr_update=LrUpdate.EPOCH,
    )  # fmt: skip
    rates = [learning_rate(config, iteration, 2) for iteration in range(10)]
    assert rates == pytest.approx([0.1] * 2 + [0.25] * 2 + [0.4] * 2 + [0.04] * 4)


def test_the_linear_rule_scales_the_peak_and_nothing_else() -> None:
    scaled = RunConfig(lr=0.4, lr_rule=LrRule.LINEAR, lr_base_batch=1024, batch_size=256)
    plain = RunConfig(lr=0.1, batch_size=256)
    assert scaled.peak_lr == plain.peak_lr == pytest.approx(0.1)
    for iteration in range(0, 100 * PER_EPOCH, 13):
        rate = learning_rate(scaled, iteration, PER_EPOCH)
        assert rate == pytest.approx(learning_rate(plain, iteration, PER_EPOCH))
