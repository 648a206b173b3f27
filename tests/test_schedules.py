"""Learning rates against torch's own schedulers."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from pgt_diag.config import RunConfig, Schedule
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
