"""What steers the balance of experts from step to step, beside the losses of ``losses.py``.

Adaptive weight: with m the load of the fullest expert over the mean load, averaged over routers, and m* the target,

    factor ← clip(factor · exp(gain · clip(log(m / m*), −1, 1)), 1/1000, 1000)

multiplies the three balance losses of the next step: an integral controller on the logarithm, without a window.
It is part of a run's position, so that checkpoints hold it; on a GPU, where steps are queued, it may lag by one.

Dynamic capacity: the capacity factor goes linearly from the first to the last step; it is a function of the step.

Bias: routers with ``kind = "bias_balanced"`` follow the loads of the whole batch after each update.
"""

from collections.abc import Sequence
from math import exp, log

import torch
from torch import Tensor, nn

from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing import Router
from switchmamba.layers.routing.bias_balanced import BiasBalancedRouter
from switchmamba.training.config import TrainingConfig

LARGEST_FACTOR = 1000.0


def at_step(config: TrainingConfig, balance_factor: float) -> TrainingConfig:
    """Return the configuration of one step: ``config``, with the balance losses multiplied if they adapt."""
    if config.load_balance_target is None:
        return config
    names = ("load_balance_coef", "load_balance_entropy_coef", "load_balance_l2_coef")
    return config.model_copy(update={name: getattr(config, name) * balance_factor for name in names})


def next_factor(factor: float, router_stats: Sequence[RouterStats], config: TrainingConfig) -> float:
    """Return the factor after a step in which the routers saw ``router_stats``."""
    if config.load_balance_target is None or not router_stats:
        return factor
    imbalance = float(torch.stack([stats.largest_load for stats in router_stats]).mean())
    error = log(max(imbalance, 1e-6) / config.load_balance_target)
    factor *= exp(config.load_balance_gain * max(-1.0, min(1.0, error)))
    return max(1 / LARGEST_FACTOR, min(LARGEST_FACTOR, factor))


def changes_with_steps(config: TrainingConfig) -> bool:
    """Say whether a step computes something else than the one before, which no CUDA graph could hold."""
    return config.load_balance_target is not None or config.capacity_schedule is not None


def set_capacity(model: nn.Module, config: TrainingConfig, step: int) -> None:
    """Give every layer with a capacity the factor of ``step``, counted from 0; without a schedule do nothing."""
    if config.capacity_schedule is None:
        return
    first, last = config.capacity_schedule
    capacity_factor = first + (last - first) * min(1.0, step / max(1, config.steps - 1))
    for module in model.modules():
        if isinstance(module, MoE) and module.capacity_factor is not None:
            module.capacity_factor = capacity_factor


def follow_loads_(
    model: nn.Module, router_stats: Sequence[RouterStats], rate: float, stopped: Tensor | None = None
) -> None:
    """Move the biases of routers that balance by one; not a frozen router's, and none where ``stopped`` () is 1."""
    if not any(isinstance(module, BiasBalancedRouter) for module in model.modules()):
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, stats in zip(routers, router_stats, strict=True):
        if isinstance(router, BiasBalancedRouter) and router.weight.requires_grad:
            moved = rate if stopped is None else rate * (1 - stopped)
            router.follow_load_(stats.tokens_per_expert_E, moved)
