"""The learning rate of an iteration: linear warm-up, then cosine, steps, or constant."""

import math

from pgt_diag.config import LrUpdate, RunConfig, Schedule


def learning_rate(config: RunConfig, iteration: int, iterations_per_epoch: int) -> float:
    """Return the learning rate that iteration `iteration` (from 0) is made with.

    Warm-up rises linearly from `warmup_lr` to `peak_lr` over `warmup_epochs`. Cosine then falls to
    `min_lr`, which it has reached `cooldown_epochs` before the end and keeps from there; its fall
    is counted from the end of warm-up, or with `warmup_prefix` off from the run's start, so that
    it begins below the peak. Steps divide by 10 at each of `step_epochs`, counted from the run's
    start. Where `lr_update` is epoch, each epoch keeps the rate of its first iteration.

    Source: Section 4 of the paper; torch's LinearLR and CosineAnnealingLR, in closed form. The
    authors' code: timm 0.4.12's CosineLRScheduler, once an epoch, without `warmup_prefix`.
    """
    epoch = iteration / iterations_per_epoch
    if config.lr_update is LrUpdate.EPOCH:
        epoch = iteration // iterations_per_epoch
    peak = config.peak_lr
    if epoch < config.warmup_epochs:
        low = min(config.warmup_lr, peak)
        return low + (peak - low) * epoch / config.warmup_epochs
    if config.schedule is Schedule.CONSTANT:
        return peak
    if config.schedule is Schedule.STEP:
        passed = sum(epoch >= milestone for milestone in config.step_epochs)
        return max(peak / math.pow(10, passed), config.min_lr)
    low = min(config.min_lr, peak)
    start = config.warmup_epochs if config.warmup_prefix else 0.0
    end = config.epochs - config.cooldown_epochs
    if epoch >= end:
        return low
    return low + (peak - low) * (1 + math.cos(math.pi * (epoch - start) / (end - start))) / 2
