"""Layers whose matrices are stored in eight bits, for inference: projections, the head, experts.

What decides the recurrence stays as it is: A_log, D, the convolution, x_proj and dt_proj of a Mamba (B, C and Δ),
routers and norms; so does the embedding, of which a token reads one row.
"""

import torch
from torch import Tensor, nn

from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.interface import KeepsFloat32
from switchmamba.layers.routing import Router
from switchmamba.ops.expert_feed_forward.activations import activate
from switchmamba.ops.expert_feed_forward.eager import FEW_ASSIGNMENTS, make_plan
from switchmamba.ops.int8_linear import int8_linear, quantize_rows

KEPT = ("x_proj", "dt_proj")
"""Projections by name that stay as they are."""


class Int8Linear(KeepsFloat32):
    """In place of a ``nn.Linear``: ``weight`` (O, I) int8 and ``scale`` (O,) fp32, neither of which is trained."""

    float32_parameters = ("scale",)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _quantized(linear.weight)
        self.weight, self.scale = _constant(weight), _constant(scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, I) to (…, O)."""
        y = int8_linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8MoE(MoE):
    """In place of a :class:`MoE`: experts w1_EFD and w2_EDF int8 with a scale for each row, the router as it was."""

    float32_parameters = ("w1_scale_EF", "w2_scale_ED")

    def __init__(self, moe: MoE) -> None:
        nn.Module.__init__(self)
        self.activation, self.capacity_factor = moe.activation, moe.capacity_factor
        self.router, self.shared = moe.router, moe.shared
        self.causal, self.batch_invariant = moe.causal, moe.batch_invariant
        self.why_not_causal = moe.why_not_causal
        w1_EFD, w1_scale_EF = _quantized(moe.w1_EFD)
        w2_EDF, w2_scale_ED = _quantized(moe.w2_EDF)
        self.w1_EFD, self.w1_scale_EF = _constant(w1_EFD), _constant(w1_scale_EF)
        self.w2_EDF, self.w2_scale_ED = _constant(w2_EDF), _constant(w2_scale_ED)

    def apply_experts(self, x_TD: Tensor, expert_index_TK: Tensor, expert_weight_TK: Tensor) -> Tensor:
        """Visit one expert after the other, with the tokens that chose it; of a few tokens each by itself."""
        if expert_index_TK.numel() <= FEW_ASSIGNMENTS:
            return self._apply_to_few(x_TD, expert_index_TK, expert_weight_TK)
        plan = make_plan(expert_index_TK, self.w1_EFD.shape[0])
        x_SD = x_TD.index_select(0, plan.token)
        outputs = [self._expert(expert, x_SD[start:stop]) for expert, start, stop in plan.segments]
        done = sum(len(output) for output in outputs)
        outputs.append(x_SD.new_zeros(len(x_SD) - done, self.w2_EDF.shape[1]))  # dropped
        y_TKO = torch.cat(outputs).index_select(0, plan.place).view(*expert_weight_TK.shape, -1)
        return (y_TKO * expert_weight_TK[..., None]).sum(dim=1).to(x_TD.dtype)

    def _apply_to_few(self, x_TD: Tensor, expert_index_TK: Tensor, expert_weight_TK: Tensor) -> Tensor:
        """Like :meth:`apply_experts`, without sorting."""
        rows = []
        for x_1D, experts, weight_K in zip(
            x_TD.unsqueeze(1), expert_index_TK.tolist(), expert_weight_TK.unbind(), strict=True
        ):
            y_1D = x_1D.new_zeros(1, self.w2_EDF.shape[1])
            for expert, weight in zip(experts, weight_K.unbind(), strict=True):
                if expert < self.w1_EFD.shape[0]:  # the others are dropped
                    y_1D = y_1D + self._expert(expert, x_1D) * weight
            rows.append(y_1D.to(x_TD.dtype))
        return torch.cat(rows) if rows else x_TD.new_zeros(0, self.w2_EDF.shape[1])

    def _expert(self, expert: int, x_TD: Tensor) -> Tensor:
        hidden_TF = int8_linear(x_TD, self.w1_EFD[expert], self.w1_scale_EF[expert])
        y_TO = int8_linear(
            activate(hidden_TF, self.activation), self.w2_EDF[expert], self.w2_scale_ED[expert]
        )
        return y_TO.to(x_TD.dtype)

    def why_not_capturable(self, dtype: torch.dtype, decoding: bool) -> str | None:  # noqa: D102
        return "experts in eight bits wait for the number of tokens that each has"

    def _has_fused_step(self) -> bool:
        return False


def quantize_layers(module: nn.Module) -> None:
    """Replace, in place, the projections and experts inside ``module``; on the meta device only their shapes."""
    for name, child in list(module.named_children()):
        if isinstance(child, Router):
            continue  # one that learns from rewards has a projection inside
        if isinstance(child, MoE) and type(child) is MoE:
            child = Int8MoE(child)
            setattr(module, name, child)
        elif type(child) is nn.Linear and name not in KEPT:
            setattr(module, name, Int8Linear(child))
            continue
        quantize_layers(child)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.is_meta:
        scale = torch.empty(weight.shape[:-1], device="meta")
        return torch.empty_like(weight, dtype=torch.int8, requires_grad=False), scale
    return quantize_rows(weight)


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
