"""Experts on a GPU: sort the assignments once, then one grouped matrix product (``F.grouped_mm``) for all experts.

As in the eager backend a stable sort by expert makes each expert's assignments contiguous, dropped ones (index E) come
last, and results return to their tokens by the inverse permutation: no atomics, the same bits every time. Here the
number of assignments per expert never leaves the device, and all shapes are static.

A grouped product leaves the rows behind the last segment as it finds the memory, and a product over rows ignores them.
So these rows may hold anything, and only what goes back to tokens is masked.

Kept for the backward pass: x, the routing, the weights in bf16, and the hidden layer before its activation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from switchmamba.ops.expert_feed_forward.activations import activate, activate_with_pullback

_ALIGNMENT = 8
"""bf16 numbers in the 16 bytes that rows of the product's operands must be aligned to."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why grouped products cannot serve a device and a dtype of the products."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the inputs are on {device.type}"
    if dtype != torch.bfloat16:
        return f"it multiplies in bfloat16, not {dtype}; autocast to bfloat16 enables it"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"it needs compute capability 9 or 10, the device has {major}.{minor}"
    return None


def expert_feed_forward_grouped(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (T, D) in the dtype of x; the matrix products run in ``dtype``, bf16."""
    if x_TD.shape[0] == 0:
        return x_TD
    (_, hidden_rows, _), (num_experts, d_model, d_expert) = w1_EFD.shape, w2_EDF.shape
    more_d, more_f = -d_model % _ALIGNMENT, -d_expert % _ALIGNMENT
    if more_d or more_f:  # zeros change nothing: every activation maps 0 to 0
        x_TD = F.pad(x_TD, (0, more_d))
        w1_EFD = F.pad(
            w1_EFD.view(num_experts, hidden_rows // d_expert, d_expert, d_model), (0, more_d, 0, more_f)
        ).flatten(1, 2)
        w2_EDF = F.pad(w2_EDF, (0, more_f, 0, more_d))
    y_TD: Tensor = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
        x_TD, expert_weight_TK, w1_EFD, w2_EDF, expert_index_TK, activation, dtype
    )
    return y_TD[:, :d_model] if more_d else y_TD


class _GroupedExperts(torch.autograd.Function):
    """y (T, D) from x (T, D), expert_weight (T, K), w1 (E, F or 2F, D) and w2 (E, D, F)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert_weight: Tensor,
        w1: Tensor,
        w2: Tensor,
        expert_index: Tensor,
        activation: str,
        dtype: torch.dtype,
    ) -> Tensor:
        order, place, ends_E = _sort(expert_index, w1.shape[0])
        kept_TK1 = (expert_index < w1.shape[0])[..., None]
        ctx.activation = activation
        ctx.weight_dtypes = w1.dtype, w2.dtype
        w1, w2 = w1.to(dtype).contiguous(), w2.to(dtype).contiguous()
        x_SD = x.to(dtype).index_select(0, order // expert_index.shape[1])
        hidden_SF = F.grouped_mm(x_SD, w1.transpose(1, 2), offs=ends_E)
        out_SD = F.grouped_mm(activate(hidden_SF, activation), w2.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(x, expert_weight, w1, w2, hidden_SF, order, place, ends_E, kept_TK1)
        out_TKD = out_SD.index_select(0, place).view(*expert_index.shape, x.shape[1])
        return torch.where(kept_TK1, out_TKD * expert_weight[..., None], 0).sum(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, expert_weight, w1, w2, hidden_SF, order, place, ends_E, kept_TK1 = ctx.saved_tensors
        token = order // expert_weight.shape[1]
        dout_SD = dy.to(w2.dtype).index_select(0, token)
        weight_S1 = expert_weight.reshape(-1, 1).index_select(0, order)
        activated_SF, pullback = activate_with_pullback(hidden_SF, ctx.activation)
        dactivated_SF = F.grouped_mm(dout_SD, w2, offs=ends_E)
        dweight_S = (dactivated_SF * activated_SF).sum(1, dtype=torch.float32)
        dhidden_SF = pullback(dactivated_SF.mul_(weight_S1))
        dw2 = F.grouped_mm(dout_SD.mul_(weight_S1).t(), activated_SF, offs=ends_E)
        x_SD = x.to(w1.dtype).index_select(0, token)
        dw1 = F.grouped_mm(dhidden_SF.t(), x_SD, offs=ends_E)
        dx_SD = F.grouped_mm(dhidden_SF, w1, offs=ends_E)
        dx_TKD = torch.where(kept_TK1, dx_SD.index_select(0, place).view(*expert_weight.shape, x.shape[1]), 0)
        dweight_TK = torch.where(kept_TK1[..., 0], dweight_S.index_select(0, place).view_as(expert_weight), 0)
        w1_dtype, w2_dtype = ctx.weight_dtypes
        return (
            dx_TKD.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype),
            dweight_TK.to(expert_weight.dtype),
            dw1.to(w1_dtype),
            dw2.to(w2_dtype),
            None,
            None,
            None,
        )


def _sort(expert_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the assignment at each sorted place (S,), its inverse (S,), and where each expert's segment ends (E,)."""
    few_bits = torch.int16 if num_experts < torch.iinfo(torch.int16).max else torch.int32
    expert_S, order = torch.sort(expert_index_TK.flatten().to(few_bits), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(num_experts, dtype=few_bits, device=order.device)
    return order, place, torch.searchsorted(expert_S, experts, right=True, out_int32=True)
