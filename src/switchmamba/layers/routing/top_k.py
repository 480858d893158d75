"""Top-k token choice; k = 1 is the Switch router (Fedus et al. 2021, arXiv 2101.03961, eq. 1 and 2).

p = softmax(W x / τ)      fp32, no bias; τ = 1 is the paper's
i = the k largest p       ties go to the lower index
weight = p_i at k = 1; p_i / Σ p over the chosen at k > 1, or p_i there too, as in Jamba, if not ``renormalize``

The temperature τ changes no choice: below 1 it lets the router commit earlier, above 1 it keeps the weights alike.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import LinearRouter, refuse_nan
from switchmamba.ops import switch_router
from switchmamba.ops.switch_router import unavailable as switch_unavailable


class TopKRouterConfig(RouterConfig):
    """Each token visits the ``top_k`` experts that its router prefers."""

    kind: Literal["top_k"] = "top_k"
    top_k: PositiveInt = 1
    temperature: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    renormalize: bool = True

    @property
    def experts_per_token(self) -> int:  # noqa: D102
        return self.top_k

    def build(self, d_model: int, num_experts: int) -> "TopKRouter":  # noqa: D102
        return TopKRouter(self, d_model, num_experts)


class TopKRouter(LinearRouter):
    """Token choice by a linear map in fp32."""

    def __init__(self, config: TopKRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.top_k, self.temperature, self.renormalize = config.top_k, config.temperature, config.renormalize

    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Routing:
        """Route x (T, D). NaN raises NonFiniteError on a CPU; a GPU passes it on to the loss, without a host sync."""
        if (
            self.top_k == 1
            and self.temperature == 1
            and padding_T is None
            and len(x_TD)
            and switch_unavailable(x_TD.device, x_TD.dtype) is None
        ):
            return self._switch(x_TD)
        router_logits_TE = self.logits(x_TD)
        if self.temperature != 1:
            router_logits_TE = router_logits_TE / self.temperature
        probability_TE = router_logits_TE.softmax(-1)
        refuse_nan(probability_TE)
        return choose(
            probability_TE,
            self.top_k,
            padding_T,
            logits_TE=router_logits_TE,
            probability_TE=probability_TE,
            renormalize=self.renormalize,
        )

    def _switch(self, x_TD: Tensor) -> Routing:
        """Route by the kernels that do so for one choice."""
        routed, num_experts = switch_router(x_TD, self.weight), self.weight.shape[0]

        def stats() -> RouterStats:
            none = torch.zeros((), dtype=torch.int64, device=x_TD.device)
            return RouterStats(
                tokens_per_expert_E=routed.tokens_per_expert_E,
                probability_sum_E=routed.probability_sum_E,
                squared_logsumexp_sum=routed.squared_logsumexp_sum,
                entropy_sum=routed.entropy_sum,
                dropped=none,
                num_tokens=torch.full_like(none, len(x_TD)),
                top_k=1,
            )

        return Routing(routed.index_T1, routed.weight_T1, num_experts, stats, routed.x_TD)


def choose(
    score_TE: Tensor,
    top_k: int,
    padding_T: Tensor | None,
    *,
    logits_TE: Tensor,
    probability_TE: Tensor,
    preference_TE: Tensor | None = None,
    renormalize: bool = True,
) -> Routing:
    """Send each token to its ``top_k`` most preferred experts, weighted by their scores.

    Args:
        score_TE: (T, E); the weight is the score itself at k = 1, and its share among the chosen at k > 1.
        top_k: how many.
        padding_T: (T,) bool, tokens that visit no expert.
        logits_TE, probability_TE: (T, E) with softmax(logits) = probability, of which the statistics and so the losses
            speak.
        preference_TE: (T, E), whose largest are chosen; None: the scores.
        renormalize: False: the weight is the score itself at k > 1 too.
    """
    num_experts = score_TE.shape[1]
    index_TK = largest((score_TE if preference_TE is None else preference_TE).detach(), top_k)
    weight_TK = score_TE.gather(1, index_TK)
    if top_k > 1 and renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    if padding_T is not None:
        index_TK = index_TK.masked_fill(padding_T[:, None], num_experts)
    return Routing(
        index_TK, weight_TK, num_experts, lambda: observe(logits_TE, probability_TE, index_TK, padding_T)
    )


def largest(score_TE: Tensor, count: int) -> Tensor:
    """Return (T, count) indices of the largest scores, best first; ties go to the lower index, on every device."""
    if count == 1:
        return score_TE.argmax(-1, keepdim=True)
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(score_TE.argmax(-1, keepdim=True))
        if len(chosen) < count:
            score_TE = score_TE.scatter(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)


def observe(
    logits_TE: Tensor, probability_TE: Tensor, index_TK: Tensor, padding_T: Tensor | None
) -> RouterStats:
    """Sum up what a token-choice router saw; ``index_TK`` from before any dropping, with E at padding."""
    tokens, experts = logits_TE.shape
    # With i the preferred expert, whose probability is at least 1/E: lse = logit_i − log p_i, and the entropy is
    # lse − Σ p·logit. Both come cheaper than from their definitions; a decoding step feels it.
    preferred_T1 = probability_TE.detach().argmax(-1, keepdim=True)
    logsumexp_T = (logits_TE.gather(1, preferred_T1) - probability_TE.gather(1, preferred_T1).log()).squeeze(
        1
    )
    squared_logsumexp_T = logsumexp_T.square()
    entropy_T = (logsumexp_T - (probability_TE * logits_TE).sum(-1)).detach()
    num_tokens = torch.full(
        (), tokens, dtype=torch.int64, device=logits_TE.device
    )  # tensor() would synchronise
    if padding_T is not None:
        probability_TE = probability_TE.masked_fill(padding_T[:, None], 0)
        squared_logsumexp_T = squared_logsumexp_T.masked_fill(padding_T, 0)
        entropy_T = entropy_T.masked_fill(padding_T, 0)
        num_tokens = (~padding_T).sum()
    index_M = index_TK.flatten()
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=logits_TE.device)
    counts.scatter_add_(0, index_M, torch.ones_like(index_M))
    return RouterStats(
        tokens_per_expert_E=counts[:experts],
        probability_sum_E=probability_TE.sum(0),
        squared_logsumexp_sum=squared_logsumexp_T.sum(),
        entropy_sum=entropy_T.sum(),
        dropped=torch.zeros((), dtype=torch.int64, device=logits_TE.device),
        num_tokens=num_tokens,
        top_k=index_TK.shape[1],
    )
