"""Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, §2.1): experts read mixtures of tokens.

Each expert has p slots with a learnt vector each; S = E·p slots, of a segment of L tokens:

l = x Φ                          (L, S), fp32
D = softmax of l over tokens     what a slot reads:    x̃ = Dᵀ x
C = softmax of l over slots      what a token gets:    y = C ỹ,  ỹ_s = Expert_{⌊s/p⌋}(x̃_s)

Everything is differentiable, no token is dropped, and the load is even by construction. Every output depends on all
tokens of its segment: it is not causal, and generation, where a segment is what is read at once, perhaps a single
token, computes something else than training. A segment is one document of one row. The paper's optional normalisation
of x and Φ (§2.3), for large D, is left out.
"""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from switchmamba.layers.interface import RouterStats
from switchmamba.layers.routing.interface import RouterConfig, Routing
from switchmamba.layers.routing.linear import refuse_nan
from switchmamba.layers.routing.segments import SegmentRouter, one_segment


class SoftRouterConfig(RouterConfig):
    """Each expert reads ``slots_per_expert`` mixtures of the tokens of a sequence, however long that is.

    Costs are counted for a sequence of as many tokens as there are slots; one of L tokens pays E·p/L of the experts'.
    """

    kind: Literal["soft"] = "soft"
    slots_per_expert: PositiveInt = 1

    drops: ClassVar[bool] = False

    @property
    def experts_per_token(self) -> int:  # noqa: D102
        return 1

    def build(self, d_model: int, num_experts: int) -> "SoftRouter":  # noqa: D102
        return SoftRouter(self, d_model, num_experts)

    def parameters(self, d_model: int, num_experts: int) -> int:  # noqa: D102
        return d_model * num_experts * self.slots_per_expert

    def flops_per_token(self, d_model: int, num_experts: int) -> int:
        """Logits, and the mixing into slots and out of them."""
        return 3 * 2 * self.parameters(d_model, num_experts)

    def activation_values(self, d_model: int, num_experts: int) -> int:
        """Logits, both softmaxes, and the slots before and behind the experts."""
        return 3 * num_experts * self.slots_per_expert + 3 * d_model


class SoftRouter(SegmentRouter):
    """Slots that mix the tokens of a segment."""

    why_not_causal: ClassVar[str] = (
        "it routes by Soft MoE, where every output is mixed of all tokens of the sequence, later ones too"
    )

    def __init__(self, config: SoftRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts * config.slots_per_expert)
        self.slots_per_expert = config.slots_per_expert

    def forward(self, x_TD: Tensor, padding_T: Tensor | None, segment_T: Tensor | None = None) -> Routing:
        """Route x (T, D); the experts read E·p rows for each of the G segments."""
        if segment_T is None:
            segment_T = one_segment(padding_T, x_TD)
        real_M = (segment_T >= 0).nonzero().squeeze(1)  # M real tokens, in order
        logits_MS = self.logits(x_TD.index_select(0, real_M))
        slots, experts = logits_MS.shape[1], logits_MS.shape[1] // self.slots_per_expert
        padded = _Padded(segment_T.index_select(0, real_M))
        dispatch_GLS = padded(logits_MS, -torch.inf).softmax(1)
        combine_MS = logits_MS.softmax(-1)
        refuse_nan(combine_MS)
        x_GLD = padded(x_TD.index_select(0, real_M), 0.0)
        slot_GSD = torch.einsum("gls,gld->gsd", dispatch_GLS.to(x_GLD.dtype), x_GLD)
        rows = len(slot_GSD) * slots
        expert_S = torch.arange(experts, device=x_TD.device).repeat_interleave(self.slots_per_expert)

        def combine(y: Tensor) -> Tensor:
            y_GSD = y.view(len(slot_GSD), slots, y.shape[1])
            y_GLD = torch.einsum("gls,gsd->gld", padded(combine_MS, 0.0).to(y.dtype), y_GSD)
            y_MD = y_GLD.flatten(0, 1).index_select(0, padded.place_M)
            return y_MD.new_zeros(x_TD.shape[0], y.shape[1]).index_copy(0, real_M, y_MD)

        def stats() -> RouterStats:
            probability_ME = combine_MS.view(-1, experts, self.slots_per_expert).sum(-1)
            none = torch.zeros((), dtype=torch.int64, device=x_TD.device)
            return RouterStats(
                tokens_per_expert_E=(none + len(slot_GSD) * self.slots_per_expert).repeat(experts),
                probability_sum_E=probability_ME.sum(0),
                squared_logsumexp_sum=logits_MS.logsumexp(-1).square().sum(),
                entropy_sum=torch.special.entr(probability_ME.detach()).sum(),
                dropped=none,
                num_tokens=none + len(real_M),
                top_k=1,
            )

        heaviest_GS = dispatch_GLS.detach().argmax(1) + padded.start_G[:, None]
        return Routing(
            expert_S.repeat(len(slot_GSD))[:, None],
            torch.ones(rows, 1, dtype=logits_MS.dtype, device=x_TD.device),
            experts,
            stats,
            x_TD=slot_GSD.flatten(0, 1),
            combine=combine,
            token_S=real_M[heaviest_GS.flatten()],
        )


class _Padded:
    """Lays M tokens out by segments, (G, longest segment, …), and fills what stays empty."""

    def __init__(self, segment_M: Tensor) -> None:
        length_G = torch.bincount(segment_M)
        self.start_G = length_G.cumsum(0) - length_G
        self._shape = (len(length_G), int(length_G.max()) if len(length_G) else 1)
        offset_M = torch.arange(len(segment_M), device=segment_M.device) - self.start_G[segment_M]
        self.place_M = segment_M * self._shape[1] + offset_M

    def __call__(self, value_MX: Tensor, empty: float) -> Tensor:
        groups, longest = self._shape
        laid = value_MX.new_full((groups * longest, value_MX.shape[1]), empty)
        laid = laid.index_copy(0, self.place_M, value_MX)
        return laid.view(groups, longest, value_MX.shape[1])
