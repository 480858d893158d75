"""Balance without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664, eq. 3 and algorithm 1; DeepSeek-V3).

s = sigmoid(W x), or softmax(W x)      fp32
i = the k largest s + b                the bias decides who is chosen, and nothing else
weight = s_i at k = 1; s_i / Σ s over the chosen at k > 1
b ← b + u · sign(mean load − load)     after every step, over the whole batch; u is ``training.router_bias_rate``

b is a tensor without a gradient: no optimizer touches it, checkpoints hold it. The statistics speak of p = s / Σ s.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from switchmamba.layers.initialization import Initialization
from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import LinearRouter, refuse_nan
from switchmamba.layers.routing.top_k import choose


class BiasBalancedRouterConfig(RouterConfig):
    """Each token visits the ``top_k`` experts of the largest biased ``score``."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    top_k: PositiveInt = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"

    @property
    def experts_per_token(self) -> int:  # noqa: D102
        return self.top_k

    def build(self, d_model: int, num_experts: int) -> "BiasBalancedRouter":  # noqa: D102
        return BiasBalancedRouter(self, d_model, num_experts)

    def parameters(self, d_model: int, num_experts: int) -> int:  # noqa: D102
        return d_model * num_experts + num_experts

    def flops_per_token(self, d_model: int, num_experts: int) -> int:  # noqa: D102
        return 2 * d_model * num_experts


class BiasBalancedRouter(LinearRouter):
    """Token choice by scores with a bias (E,) that follows the load."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(self, config: BiasBalancedRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.top_k, self.score = config.top_k, config.score
        self.bias = nn.Parameter(torch.empty(num_experts), requires_grad=False)

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        super().initialize(scheme)
        nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Routing:
        """Route x (T, D)."""
        logits_TE = self.logits(x_TD)
        if self.score == "sigmoid":
            score_TE, logits_TE = logits_TE.sigmoid(), logsigmoid(logits_TE)
            probability_TE = logits_TE.softmax(-1)
        else:
            score_TE = probability_TE = logits_TE.softmax(-1)
        refuse_nan(score_TE)
        return choose(
            score_TE,
            self.top_k,
            padding_T,
            logits_TE=logits_TE,
            probability_TE=probability_TE,
            preference_TE=score_TE + self.bias,
        )

    @torch.no_grad()
    def follow_load_(self, tokens_per_expert_E: Tensor, rate: float | Tensor) -> None:
        """Raise the bias of experts below the mean load by ``rate``, and lower that of those above."""
        load_E = tokens_per_expert_E.to(self.bias.dtype)
        self.bias.add_((load_E.mean() - load_E).sign() * rate)
