"""Expert choice (Zhou et al. 2022, arXiv 2202.09368, §3.2): experts choose tokens.

p = softmax(W x)                                     fp32, over the experts
expert i takes the C tokens of a segment with the largest p_ti,   C = max(1, ⌊c · L / E⌋)
y_t = Σ over the experts that took t of p_ti · Expert_i(x_t)

c is the capacity factor, how many experts take a token on average; a token may be taken by all of them or by none. The
load is even by construction. Ties go to the earlier token. Whom an expert takes depends on all tokens of the segment:
the choice is not causal, and generation, where a segment is what is read at once, perhaps a single token, computes
something else than training. The paper chooses over the whole batch; here a segment is one document of one row, which
keeps rows apart.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import refuse_nan
from switchmamba.layers.routing.segments import SegmentRouter, one_segment
from switchmamba.layers.routing.top_k import observe


class ExpertChoiceRouterConfig(RouterConfig):
    """Each expert takes ``capacity_factor`` · L / E tokens of a sequence of L."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    drops: ClassVar[bool] = False

    @property
    def experts_per_token(self) -> float:  # noqa: D102
        return self.capacity_factor

    def build(self, d_model: int, num_experts: int) -> "ExpertChoiceRouter":  # noqa: D102
        return ExpertChoiceRouter(self, d_model, num_experts)

    def check(self, num_experts: int) -> None:
        """Raise ValueError if each expert would have to take more than all tokens."""
        if self.capacity_factor > num_experts:
            raise ValueError(
                f"router.capacity_factor={self.capacity_factor} exceeds num_experts={num_experts}, where every expert "
                "takes every token; lower it"
            )

    def activation_values(self, d_model: int, num_experts: int) -> int:
        """Beside the router's own: the tokens as the experts took them, and their outputs."""
        return 2 * num_experts + int(2 * self.capacity_factor * d_model)


class ExpertChoiceRouter(SegmentRouter):
    """Experts choose tokens, segment by segment."""

    why_not_causal: ClassVar[str] = (
        "it routes by expert choice, where later tokens decide whether an expert takes an earlier one"
    )

    def __init__(self, config: ExpertChoiceRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts)
        self.capacity_factor = config.capacity_factor

    def forward(self, x_TD: Tensor, padding_T: Tensor | None, segment_T: Tensor | None = None) -> Routing:
        """Route x (T, D); the number of rows that the experts read is Σ over segments of E·C."""
        logits_TE = self.logits(x_TD)
        probability_TE = logits_TE.softmax(-1)
        refuse_nan(probability_TE)
        if segment_T is None:
            segment_T = one_segment(padding_T, x_TD)
        token_ES = taken(probability_TE.detach(), segment_T, self.capacity_factor)
        experts, each = token_ES.shape
        token_S = token_ES.flatten()
        expert_S = torch.arange(experts, device=token_S.device).repeat_interleave(each)
        tokens = x_TD.shape[0]

        def combine(y_SD: Tensor) -> Tensor:
            return y_SD.new_zeros(tokens, y_SD.shape[1]).index_add(0, token_S, y_SD)

        def stats() -> RouterStats:
            nowhere_T1 = torch.full_like(segment_T[:, None], experts)
            plain = observe(logits_TE, probability_TE, nowhere_T1, padding_T)
            missed_T = segment_T >= 0
            missed_T[token_S] = False
            return replace(
                plain,
                tokens_per_expert_E=torch.full_like(plain.tokens_per_expert_E, each),
                dropped=missed_T.sum(),
            )

        return Routing(
            expert_S[:, None],
            probability_TE[token_S, expert_S][:, None],
            experts,
            stats,
            x_TD=x_TD.index_select(0, token_S),
            combine=combine,
            token_S=token_S,
        )


def taken(probability_TE: Tensor, segment_T: Tensor, capacity_factor: float) -> Tensor:
    """Return the tokens (E, S) that each expert takes, segment by segment, the most probable first.

    ``segment_T`` (T,) int64 is −1 at padding, which nobody takes.
    """
    tokens, experts = probability_TE.shape
    by_score_ET = probability_TE.T.argsort(dim=1, descending=True, stable=True)
    by_segment_ET = segment_T[by_score_ET].argsort(dim=1, stable=True)
    order_ET = by_score_ET.gather(1, by_segment_ET)
    # Behind every expert's order the segments stand alike, so that all take the same places in it.
    sorted_T = segment_T.sort(stable=True).values + 1
    lengths_G = torch.bincount(sorted_T, minlength=1)
    start_G = lengths_G.cumsum(0) - lengths_G
    capacity_G = (capacity_factor * lengths_G.double() / experts).floor().clamp(min=1)
    rank_T = torch.arange(tokens, device=sorted_T.device) - start_G[sorted_T]
    return order_ET[:, (sorted_T > 0) & (rank_T < capacity_G[sorted_T])]
