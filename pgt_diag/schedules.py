"""The learning rate of an iteration: linear warm-up, then cosine, steps, or constant."""

import math

from pgt_diag.config import RunConfig, Schedule


def learning_rate(config: RunConfig, iteration: int, iterations_per_epoch: int) -> float:
    """Return the learning rate that iteration `iteration` (from 0) is made with.

    Warm-up rises linearly from `warmup_lr` to `lr` over `warmup_epochs`. Cosine then falls to
    `min_lr` at the end of the last epoch; steps divide by 10 at each of `step_epochs`, counted
    from the run's start.

    Source: Section 4 of the paper; torch's LinearLR and CosineAnnealingLR, in closed form.
    """
    epoch = iteration / iterations_per_epoch
    if epoch < config.warmup_epochs:
        low = min(config.warmup_lr, config.lr)
        return low + (config.lr - low) * epoch / config.warmup_epochs
    if config.schedule is Schedule.CONSTANT:
        return config.lr
    if config.schedule is Schedule.STEP:
        passed = sum(epoch >= milestone for milestone in config.step_epochs)
        return max(config.lr / math.pow(10, passed), config.min_lr)
    share = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    low = min(config.min_lr, config.lr)
    return low + (config.lr - low) * (1 + math.cos(math.pi * share)) / 2
