"""Learning rate: linear warm-up, then a cosine to a fraction of it (SGDR, arXiv 1608.03983, eq. 5)."""

from math import cos, pi

from switchmamba.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of the update that follows ``step`` completed ones; a pure function.

    The warm-up reaches the peak at update number ``warmup_steps``; the last update of the run has the peak
    times ``min_learning_rate_ratio``.
    """
    update, peak = step + 1, config.learning_rate
    if update <= config.warmup_steps:
        return peak * update / config.warmup_steps
    progress = (update - config.warmup_steps) / (config.steps - config.warmup_steps)
    floor = config.min_learning_rate_ratio
    return peak * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)
