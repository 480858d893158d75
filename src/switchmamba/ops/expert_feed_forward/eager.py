"""Experts on contiguous segments: sort the assignments once, then four matrix products per expert and direction.

An assignment is one (token, choice) pair; a stable sort by expert makes each expert's assignments contiguous, and
dropped ones (index E) come last. An expert without assignments costs nothing. Results return to their tokens by the
inverse permutation and are summed over the K choices in order: no atomics, the same bits every time.

Kept for the backward pass: x, the routing, and the hidden layer before its activation, (T·K, F) or (T·K, 2F).
Sorted copies of x, the activations and the experts' outputs are made again; each costs less than 5% of a product.

The number of assignments per expert passes through the host: on a GPU this synchronises once per call.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.expert_feed_forward.activations import activate, activate_with_pullback

FEW_ASSIGNMENTS = 8
"""Up to here, sorting costs more than it saves."""


def expert_feed_forward_eager(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (T, O) in the dtype of x; the matrix products run in ``dtype``."""
    inputs = (x_TD, expert_weight_TK, w1_EFD, w2_EOF)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if expert_index_TK.numel() <= FEW_ASSIGNMENTS and not differentiated:
        return _few(*inputs, expert_index_TK, activation, dtype)
    y_TO: Tensor = _Experts.apply(*inputs, expert_index_TK, activation, dtype)  # type: ignore[no-untyped-call]
    return y_TO


def _few(
    x_TD: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    expert_index_TK: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Visit one expert after the other without sorting, as decoding a few sequences does."""
    wide = torch.promote_types(x_TD.dtype, expert_weight_TK.dtype)
    y_TO = x_TD.new_zeros(x_TD.shape[0], w2_EOF.shape[1], dtype=wide)
    choices = zip(expert_index_TK.tolist(), expert_weight_TK.tolist(), strict=True)
    for x_D, y_O, (experts, weights) in zip(x_TD.to(dtype).unbind(), y_TO.unbind(), choices, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            if expert < w1_EFD.shape[0]:
                hidden_F = torch.mv(w1_EFD[expert].to(dtype), x_D)
                out_O = torch.mv(w2_EOF[expert].to(dtype), activate(hidden_F, activation))
                y_O.add_(out_O, alpha=weight)
    return y_TO.to(x_TD.dtype)


class Plan(NamedTuple):
    """Where each of the S = T·K assignments stands once they are sorted by expert.

    Attributes:
        segments: (expert, start, stop) of each expert that has assignments.
        order: (S,) assignment at each sorted place; t·K + k is token t's choice k.
        place: (S,) sorted place of each assignment: the inverse of ``order``.
        token: (S,) token at each sorted place.
    """

    segments: list[tuple[int, int, int]]
    order: Tensor
    place: Tensor
    token: Tensor


def make_plan(expert_index_TK: Tensor, num_experts: int) -> Plan:
    """Sort assignments by expert, and by token within an expert."""
    expert_S = expert_index_TK.flatten()
    order = torch.argsort(expert_S, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    segments, start = [], 0
    for expert, count in enumerate(
        torch.bincount(expert_S, minlength=num_experts + 1)[:num_experts].tolist()
    ):
        if count:
            segments.append((expert, start, start + count))
            start += count
    return Plan(segments, order, place, order // expert_index_TK.shape[1])


class _Experts(torch.autograd.Function):
    """y (T, O) from x (T, D), expert_weight (T, K), w1 (E, F or 2F, D) and w2 (E, O, F)."""

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
        plan = make_plan(expert_index, w1.shape[0])
        x_SD = x.index_select(0, plan.token).to(dtype)
        hidden_SF = x_SD.new_empty(x_SD.shape[0], w1.shape[1])
        out_SO = _with_dropped_zero(x_SD.new_empty(x_SD.shape[0], w2.shape[1]), plan.segments)
        for expert, start, stop in plan.segments:
            hidden = torch.mm(x_SD[start:stop], w1[expert].to(dtype).t(), out=hidden_SF[start:stop])
            torch.mm(activate(hidden, activation), w2[expert].to(dtype).t(), out=out_SO[start:stop])
        ctx.save_for_backward(x, expert_weight, w1, w2, hidden_SF, plan.order, plan.place, plan.token)
        ctx.segments, ctx.activation = plan.segments, activation
        out_TKO = out_SO.index_select(0, plan.place).view(*expert_weight.shape, w2.shape[1])
        kept_weight = expert_weight.masked_fill(expert_index == w1.shape[0], 0)
        return _sum_of_choices(out_TKO * kept_weight[..., None]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, expert_weight, w1, w2, hidden_SF, order, place, token = ctx.saved_tensors
        _, _, needs_dw1, needs_dw2, *_ = ctx.needs_input_grad
        dtype = hidden_SF.dtype
        x_SD = x.index_select(0, token).to(dtype)
        dy_SO = dy.index_select(0, token).to(dtype)
        weight_S1 = expert_weight.reshape(-1, 1).index_select(0, order)
        dx_SD = _with_dropped_zero(torch.empty_like(x_SD), ctx.segments)
        dweight_S = torch.zeros_like(weight_S1[:, 0])
        dw1 = _with_idle_zero(w1, ctx.segments) if needs_dw1 else None
        dw2 = _with_idle_zero(w2, ctx.segments) if needs_dw2 else None
        for expert, start, stop in ctx.segments:
            hidden, dout, weight = hidden_SF[start:stop], dy_SO[start:stop], weight_S1[start:stop]
            activated, pullback = activate_with_pullback(hidden, ctx.activation)
            dactivated = torch.mm(dout, w2[expert].to(dtype))
            dweight_S[start:stop] = (dactivated * activated).sum(dim=1)
            dactivated *= weight
            dout *= weight
            if dw2 is not None:
                _multiply(dout.t(), activated, out=dw2[expert])
            dhidden = pullback(dactivated)
            if dw1 is not None:
                _multiply(dhidden.t(), x_SD[start:stop], out=dw1[expert])
            torch.mm(dhidden, w1[expert].to(dtype), out=dx_SD[start:stop])
        dx_TKD = dx_SD.index_select(0, place).view(*expert_weight.shape, x.shape[1])
        dx = _sum_of_choices(dx_TKD).to(x.dtype)
        return dx, dweight_S.index_select(0, place).view_as(expert_weight), dw1, dw2, None, None, None


def _with_dropped_zero(value_SD: Tensor, segments: list[tuple[int, int, int]]) -> Tensor:
    """Zero the rows of dropped assignments, which stand behind the last segment."""
    value_SD[segments[-1][2] if segments else 0 :] = 0
    return value_SD


def _with_idle_zero(weight: Tensor, segments: list[tuple[int, int, int]]) -> Tensor:
    """Return memory for the gradient of ``weight`` (E, …), zero for the experts without assignments."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert in set(range(weight.shape[0])).difference(expert for expert, _, _ in segments):
        gradient[expert] = 0
    return gradient


def _sum_of_choices(value_TKD: Tensor) -> Tensor:
    return value_TKD.squeeze(1) if value_TKD.shape[1] == 1 else value_TKD.sum(dim=1)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a·b to ``out``, which may have a wider dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
