"""Gumbel-softmax top-k token choice (Jang et al. 2017, arXiv 1611.01144, eq. 1 and 2).

g = −log Exp(1)                 Gumbel noise in ``train()``, 0 in ``eval()``
s = softmax((W x + g) / τ)      fp32
i = the k largest s             by the Gumbel-max trick, for k = 1 a draw from softmax(W x), whatever τ
weight = s_i at k = 1; s_i / Σ s over the chosen at k > 1

The statistics, and so the balance losses, speak of softmax(W x): the probability of the draw, not one draw of it. The
noise comes from torch's global generator, which a run seeds and its checkpoints hold.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import LinearRouter, refuse_nan
from switchmamba.layers.routing.top_k import choose


class GumbelRouterConfig(RouterConfig):
    """Each token visits the ``top_k`` experts that its router prefers, in training after noise."""

    kind: Literal["gumbel"] = "gumbel"
    top_k: PositiveInt = 1
    temperature: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)

    @property
    def experts_per_token(self) -> int:  # noqa: D102
        return self.top_k

    def build(self, d_model: int, num_experts: int) -> "GumbelRouter":  # noqa: D102
        return GumbelRouter(self, d_model, num_experts)


class GumbelRouter(LinearRouter):
    """Token choice after Gumbel noise."""

    def __init__(self, config: GumbelRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.top_k, self.temperature = config.top_k, config.temperature

    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Routing:
        """Route x (T, D); in ``train()`` it draws T·E numbers, and in ``eval()`` none."""
        logits_TE = self.logits(x_TD)
        noisy_TE = logits_TE + gumbel_noise(logits_TE) if self.training else logits_TE
        score_TE = (noisy_TE / self.temperature).softmax(-1)
        refuse_nan(score_TE)
        return choose(
            score_TE,
            self.top_k,
            padding_T,
            logits_TE=logits_TE,
            probability_TE=logits_TE.softmax(-1),
        )


def gumbel_noise(like: Tensor) -> Tensor:
    """Return independent standard Gumbel numbers in the shape and dtype of ``like``."""
    return -torch.empty_like(like, requires_grad=False).exponential_().log()
