"""What is minimised: cross-entropy and the routers' auxiliary losses, kept apart: "loss" is the former alone.

    objective = CE + load_balance_coef · mean_r E·Σ_i f_i·P_i + router_z_coef · mean_r mean_t lse(logits_t)²
                   + load_balance_entropy_coef · mean_r (log E + Σ_i P_i log P_i)
                   + load_balance_l2_coef · mean_r (E·Σ_i P_i² − 1)
                   + router_policy_coef · Σ_r policy_r

r runs over routers, t over tokens, i over experts; f_i is the fraction of assignments, P_i the mean probability. Switch
Transformer (arXiv 2101.03961) eq. 4; ST-MoE (arXiv 2202.08906) eq. 5. The entropy form is KL(P ‖ uniform). The L2 form
is the squared coefficient of variation of the soft counts P_i (Shazeer et al. 2017, arXiv 1701.06538, eq. 6 and 7),
because the counts f_i have no gradient; f_i² with the gradient of P_i passed straight through has twice the gradient of
Switch's loss. policy_r belongs to routers that draw (``layers/routing/policy_gradient.py``). Cross-entropy is in nats
per target.
"""

from dataclasses import fields, replace
from math import log
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switchmamba.data.sampler import IGNORE_INDEX
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.policy_gradient import DrawnStats
from switchmamba.layers.wrapping import is_plain
from switchmamba.models.language_model import LanguageModel
from switchmamba.ops import linear_cross_entropy
from switchmamba.training.config import TrainingConfig

LOGITS_AT_ONCE = 2**26
"""Logits that live at once where the head is called: 256 MB in fp32."""


class Losses(NamedTuple):
    """Losses of one forward pass.

    Attributes:
        cross_entropy_sum: () fp32, nats, summed over the targets that count.
        router_stats: one per router, in order; gradients flow through them.
        policy_loss: () fp32, summed over the routers that drew their choices; None if none did.
    """

    cross_entropy_sum: Tensor
    router_stats: tuple[RouterStats, ...]
    policy_loss: Tensor | None = None


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
        cross_entropy = _cross_entropy(model, hidden_BLD, targets_BL, "sum")
        drawn = [stats for stats in router_stats if isinstance(stats, DrawnStats)]
        if not drawn or not config.router_policy_coef:
            return Losses(cross_entropy, router_stats)
        with torch.no_grad():
            token_loss_T = _cross_entropy(model, hidden_BLD, targets_BL, "none")
    counts_T = targets_BL.flatten() != IGNORE_INDEX
    policy_loss = torch.stack([stats.policy_loss(token_loss_T, counts_T) for stats in drawn]).sum()
    return Losses(cross_entropy, router_stats, policy_loss)


def _cross_entropy(
    model: LanguageModel, hidden_BLD: Tensor, targets_BL: Tensor, reduction: Literal["sum", "none"]
) -> Tensor:
    """Return the cross-entropy behind the head, fp32: summed (), or of each token (T,).

    A head that an adapter wraps is called, ``LOGITS_AT_ONCE`` at a time, and again in the backward pass.
    """
    hidden_TD, targets_T = hidden_BLD.flatten(0, 1), targets_BL.flatten()
    if is_plain(model.head):
        return linear_cross_entropy(hidden_TD, model.head_weight, targets_T, reduction=reduction)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [
        checkpoint(part, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(torch.split(hidden_TD, size), torch.split(targets_T, size), strict=True)
    ]
    return torch.stack(parts).sum() if reduction == "sum" else torch.cat(parts)


def auxiliary_loss(
    router_stats: tuple[RouterStats, ...], config: TrainingConfig, policy_loss: Tensor | None = None
) -> Tensor | None:
    """Return the routers' weighted losses, () fp32, but for ``policy_loss`` averaged over them; None without any."""
    if not router_stats:
        return None
    auxiliary = _balance_loss(router_stats, config)
    return auxiliary if policy_loss is None else auxiliary + config.router_policy_coef * policy_loss


def _balance_loss(router_stats: tuple[RouterStats, ...], config: TrainingConfig) -> Tensor:
    auxiliary = config.load_balance_coef * mean_load_balance_loss(router_stats)
    if config.router_z_coef:
        auxiliary = auxiliary + config.router_z_coef * mean_z_loss(router_stats)
    if config.load_balance_entropy_coef:
        auxiliary = auxiliary + config.load_balance_entropy_coef * mean_entropy_loss(router_stats)
    if config.load_balance_l2_coef:
        auxiliary = auxiliary + config.load_balance_l2_coef * mean_l2_loss(router_stats)
    return auxiliary


def mean_load_balance_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of E·Σ f_i·P_i, () fp32: 1 where routing is uniform."""
    return torch.cat([stats.load_balance_loss for stats in _joined(router_stats)]).mean()


def mean_z_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of the mean squared logsumexp of their logits, () fp32."""
    return torch.cat([stats.z_loss for stats in _joined(router_stats)]).mean()


def mean_entropy_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of log E − entropy of the mean probability, nats, () fp32: 0 if uniform, log E at most."""
    return torch.stack(
        [
            log(stats.num_experts) - torch.special.entr(_mean_probability(stats)).sum()
            for stats in router_stats
        ]
    ).mean()


def mean_l2_loss(router_stats: tuple[RouterStats, ...]) -> Tensor:
    """Mean over routers of E·Σ P_i² − 1, () fp32: 0 at uniform routing, E − 1 at most."""
    return torch.stack(
        [stats.num_experts * _mean_probability(stats).square().sum() - 1 for stats in router_stats]
    ).mean()


def _mean_probability(stats: RouterStats) -> Tensor:
    mean_E = stats.probability_sum_E / stats.num_tokens.clamp(min=1)
    return mean_E.clamp(min=1e-12)  # at 0 the entropy has no slope


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
