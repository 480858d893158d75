"""What is minimised: cross-entropy and the routers' auxiliary losses, kept apart: "loss" is the former alone.

    objective = CE + load_balance_coef · mean_r E·Σ_i f_i·P_i + router_z_coef · mean_r mean_t lse(logits_t)²

r runs over routers, t over tokens, i over experts. Switch Transformer (arXiv 2101.03961) eq. 4; ST-MoE
(arXiv 2202.08906) eq. 5. Cross-entropy is in nats per target.
"""

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchmamba.layers.interface import RouterStats
from switchmamba.models.language_model import LanguageModel
from switchmamba.ops import linear_cross_entropy
from switchmamba.training.config import TrainingConfig


class Losses(NamedTuple):
    """Losses of one forward pass.

    Attributes:
        cross_entropy_sum: () fp32, nats, summed over the targets that count.
        router_stats: one per router, in order; gradients flow through them.
    """

    cross_entropy_sum: Tensor
    router_stats: tuple[RouterStats, ...]


def compute_losses(
    model: LanguageModel,
    tokens_BL: Tensor,
    targets_BL: Tensor,
    document_ids_BL: Tensor | None,
    config: TrainingConfig,
) -> Losses:
    """Run the model over tokens (B, L); targets (B, L) int64, −100 where none counts."""
    bf16 = config.precision == "bf16"
    recompute = config.activation_recompute and torch.is_grad_enabled()
    with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=bf16):
        hidden_BLD, _, router_stats = model.hidden_states(tokens_BL, document_ids_BL, recompute=recompute)
        cross_entropy = linear_cross_entropy(
            hidden_BLD.flatten(0, 1), model.head_weight, targets_BL.flatten(), reduction="sum"
        )
    return Losses(cross_entropy, router_stats)


def auxiliary_loss(router_stats: tuple[RouterStats, ...], config: TrainingConfig) -> Tensor | None:
    """Return the weighted auxiliary losses, () fp32, averaged over the routers; None if there are none."""
    if not router_stats:
        return None
    auxiliary = config.load_balance_coef * mean_load_balance_loss(router_stats)
    if config.router_z_coef:
        auxiliary = auxiliary + config.router_z_coef * mean_z_loss(router_stats)
    return auxiliary


def mean_load_balance_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of E·Σ f_i·P_i, () fp32: 1 where routing is uniform."""
    return torch.cat([stats.load_balance_loss for stats in _joined(router_stats)]).mean()


def mean_z_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of the mean squared logsumexp of their logits, () fp32."""
    return torch.cat([stats.z_loss for stats in _joined(router_stats)]).mean()


def _joined(router_stats: tuple[RouterStats, ...]) -> list[RouterStats]:
    """Return statistics with a dimension for the routers in front, one for each kind of router.

    On a GPU the losses of all routers then take the launches of one.
    """
    kinds: dict[tuple[int, int], list[RouterStats]] = {}
    for stats in router_stats:
        kinds.setdefault((stats.num_experts, stats.top_k), []).append(stats)
    names = [f.name for f in fields(RouterStats) if f.name != "top_k"]
    joined: list[RouterStats] = []
    for same in kinds.values():
        own: dict[str, Any] = {name: torch.stack([getattr(stats, name) for stats in same]) for name in names}
        joined.append(replace(same[0], **own))
    return joined
