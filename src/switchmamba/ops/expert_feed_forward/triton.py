"""Experts on a GPU in Triton: one sort, then one kernel a product for all experts, with what is around it fused in.

A counting sort gives every expert a contiguous segment of rows, filled up with zeros to whole tiles (dispatch.py). Four
products (products.py) do the rest; with one choice a token they write straight to the token's row:

    forward    activated = act(x w1ᵀ)             y = weight · activated w2ᵀ
    backward   dactivated = dy w2, dweight = Σ_f dactivated · activated, dhidden = weight · dactivated · act'(hidden)
               dw2 = (weight · dy)ᵀ activated     dw1 = dhiddenᵀ x           dx = dhidden w1

Everything stays on the device, shapes do not depend on the routing, no float is added atomically: the calls fit into a
CUDA graph, and the same inputs give the same bits. Products accumulate in fp32; gradients of weights leave it only for
the weights' own dtype.

Kept for the backward pass, in the products' dtype: the sorted x, the weights, and the hidden layer before its
activation (for ReLU after it); and the routing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from switchmamba.ops.expert_feed_forward.dispatch import Plan, dispatch, gather
from switchmamba.ops.expert_feed_forward.products import (
    TILE_ROWS,
    contract,
    expand,
    pull_back,
    weight_gradient,
)

_ALIGNMENT = 8
"""Numbers of two bytes in the 16 bytes that a matrix's rows must be aligned to."""


def expert_feed_forward_triton(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (T, O) in the dtype of x; the matrix products run in ``dtype``, bf16 or fp16."""
    if x_TD.shape[0] == 0:
        return x_TD.new_empty(0, w2_EOF.shape[1])
    (_, hidden_rows, d_in), (num_experts, d_out, d_expert) = w1_EFD.shape, w2_EOF.shape
    w1 = w1_EFD.reshape(num_experts, hidden_rows // d_expert, d_expert, d_in)
    more_d, more_f, more_o = (-width % _ALIGNMENT for width in (d_in, d_expert, d_out))
    if more_d or more_f or more_o:  # zeros change nothing: every activation maps 0 to 0
        x_TD, w1 = F.pad(x_TD, (0, more_d)), F.pad(w1, (0, more_d, 0, more_f))
        w2_EOF = F.pad(w2_EOF, (0, more_f, 0, more_o))
    inputs = (x_TD, expert_weight_TK, w1, w2_EOF)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        y_TO: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
            *inputs, expert_index_TK, activation, dtype, differentiated
        )
    return y_TO[:, :d_out] if more_o else y_TO


class _Experts(torch.autograd.Function):
    """y (T, O) from x (T, D), expert_weight (T, K), w1 (E, parts, F, D), two parts for SwiGLU, and w2 (E, O, F)."""

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
        differentiated: bool,
    ) -> Tensor:
        ctx.activation, ctx.x_shape, ctx.dtypes = activation, x.shape, (x.dtype, w1.dtype, w2.dtype)
        choices, expert_weight = expert_index.shape[1], expert_weight.contiguous()
        w1, w2 = _matrices(w1.to(dtype)), _matrices(w2.to(dtype))
        y = torch.empty(x.shape[0], w2.shape[1], dtype=x.dtype, device=x.device)
        plan, x_PD = dispatch(x, expert_index, w1.shape[0], TILE_ROWS, dtype, y if choices == 1 else None)
        activated, hidden = expand(x_PD, w1, plan, activation, differentiated and activation != "relu")
        contract(activated, w2[:, None], plan, expert_weight, y, choices)
        if differentiated:
            hidden = activated[:, None] if hidden is None else hidden
            ctx.save_for_backward(x_PD, expert_weight, w1, w2, hidden, *plan)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, expert_weight, w1, w2, hidden, *saved = ctx.saved_tensors
        plan, choices, relu = Plan(*saved), expert_weight.shape[1], ctx.activation == "relu"
        needs_dx, _, needs_dw1, needs_dw2, *_ = ctx.needs_input_grad
        x_dtype, w1_dtype, w2_dtype = ctx.dtypes
        dx = dw1 = dw2 = None
        if needs_dx:
            dx = torch.empty(ctx.x_shape, dtype=x_dtype, device=dy.device)
        weight = expert_weight if relu and needs_dw2 else None
        dy_PD, weighted_dy_PD = gather(dy, weight, plan, w2.dtype, choices, dx if choices == 1 else None)
        dhidden, activated, dweight = pull_back(dy_PD, w2, hidden, plan, expert_weight, ctx.activation)
        dhidden = dhidden.flatten(1)
        if weighted_dy_PD is not None:
            dw2 = weight_gradient(weighted_dy_PD, hidden.flatten(1), plan, w2_dtype)
        elif activated is not None and needs_dw2:
            dw2 = weight_gradient(dy_PD, activated, plan, w2_dtype)
        if needs_dw1:
            dw1 = weight_gradient(dhidden, x_PD, plan, w1_dtype).view_as(w1)
        if dx is not None:
            contract(dhidden, w1.flatten(1, 2), plan, None, dx, choices)
        return dx, dweight, dw1, dw2, None, None, None, None


def _matrices(weight: Tensor) -> Tensor:
    """Return the weights as the kernels load them: contiguous, and aligned even where they are a slice of a buffer."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
