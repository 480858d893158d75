"""Routing learnt by policy gradient: REINFORCE with a baseline (Williams 1992, Machine Learning 8, §4 and §8).

p = softmax(W x)                           fp32
i ~ p in ``train()``, argmax p in ``eval()``
weight = 1                                 so that no gradient reaches p through the expert's output
r_t = −(ℓ_t − mean ℓ)                      ℓ_t: cross-entropy of the token's own target
A_t = r_t − V(x_t)                         V: a linear baseline that learns r by squared error
loss = Σ_routers mean_t [ −A_t · log p_t(i_t) + ½ (r_t − V(x_t))² ]     A_t and x detached

The first term's gradient is the score-function estimate of the gradient of mean ℓ, but for the part of a choice in the
losses of later tokens, which gets no credit. It stops at the router's weight: beyond it its noise would reach all
layers below, and cost more than routing at random (docs/log.md). The draws come from torch's global generator, which a
run seeds and its checkpoints hold.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.gumbel import gumbel_noise
from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import LinearRouter, refuse_nan
from switchmamba.layers.routing.top_k import observe


class PolicyGradientRouterConfig(RouterConfig):
    """Each token visits one expert, in training drawn from the router's distribution."""

    kind: Literal["policy_gradient"] = "policy_gradient"

    @property
    def experts_per_token(self) -> int:  # noqa: D102
        return 1

    def build(self, d_model: int, num_experts: int) -> "PolicyGradientRouter":  # noqa: D102
        return PolicyGradientRouter(self, d_model, num_experts)

    def parameters(self, d_model: int, num_experts: int) -> int:  # noqa: D102
        return d_model * num_experts + d_model + 1


@dataclass(frozen=True)
class DrawnStats(RouterStats):
    """Statistics of a router that drew its choices.

    Attributes:
        log_probability_T: (T,) fp32, of the choice of each token; 0 at padding.
        baseline_T: (T,) fp32, the reward that was expected; 0 at padding.
    """

    log_probability_T: Tensor
    baseline_T: Tensor

    def policy_loss(self, token_loss_T: Tensor, counts_T: Tensor) -> Tensor:
        """Return the loss above, () fp32.

        Args:
            token_loss_T: (T,) fp32, the cross-entropy of each token's target.
            counts_T: (T,) bool, tokens that have a target.
        """
        weight_T = counts_T.float() / counts_T.sum().clamp(min=1)
        reward_T = (weight_T * token_loss_T).sum() - token_loss_T
        surprise_T = reward_T - self.baseline_T
        terms_T = 0.5 * surprise_T.square() - surprise_T.detach() * self.log_probability_T
        return (weight_T * terms_T).sum()

    def detach(self) -> RouterStats:  # type: ignore[override]
        """Return plain statistics: single tokens are of no use to the sum over micro-batches."""
        plain = RouterStats(**{f.name: getattr(self, f.name) for f in fields(RouterStats)})
        return plain.detach()


class PolicyGradientRouter(LinearRouter):
    """Token choice by drawing, with a linear baseline."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("weight", "baseline.weight", "baseline.bias")

    def __init__(self, config: PolicyGradientRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.baseline = nn.Linear(d_model, 1)

    def initialize(self, scheme: Initialization) -> None:
        """Fill the router; the baseline begins at 0."""
        super().initialize(scheme)
        nn.init.zeros_(self.baseline.weight)
        nn.init.zeros_(self.baseline.bias)

    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Routing:
        """Route x (T, D); in ``train()`` it draws T·E numbers, and in ``eval()`` none."""
        logits_TE = self.logits(x_TD)
        probability_TE = logits_TE.softmax(-1)
        refuse_nan(probability_TE)
        preference_TE = logits_TE.detach()
        if self.training:
            preference_TE = preference_TE + gumbel_noise(preference_TE)
        index_T1 = preference_TE.argmax(-1, keepdim=True)
        chosen_T1 = index_T1
        if padding_T is not None:
            chosen_T1 = index_T1.masked_fill(padding_T[:, None], logits_TE.shape[1])

        drawn = self.training

        def stats() -> RouterStats:
            plain = observe(logits_TE, probability_TE, chosen_T1, padding_T)
            return self._with_draw(plain, x_TD, index_T1, padding_T) if drawn else plain

        return Routing(chosen_T1, torch.ones_like(logits_TE[:, :1]), logits_TE.shape[1], stats)

    def _with_draw(
        self,
        plain: RouterStats,
        x_TD: Tensor,
        index_T1: Tensor,
        padding_T: Tensor | None,
    ) -> DrawnStats:
        x_TD = x_TD.detach()
        log_probability_T = self.logits(x_TD).log_softmax(-1).gather(1, index_T1).squeeze(1)
        with torch.autocast(x_TD.device.type, enabled=False):
            baseline_T = self.baseline(x_TD.to(self.baseline.weight.dtype)).squeeze(1)
        if padding_T is not None:
            log_probability_T = log_probability_T.masked_fill(padding_T, 0)
            baseline_T = baseline_T.masked_fill(padding_T, 0)
        values = {f.name: getattr(plain, f.name) for f in fields(RouterStats)}
        return DrawnStats(**values, log_probability_T=log_probability_T, baseline_T=baseline_T)
