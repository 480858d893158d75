# mypy: allow-untyped-calls
"""Gated RMS norm that keeps nothing but its inputs for the backward pass.

With v = x · silu(z), r = 1/√(mean v² + eps) and n = v · r, the gradient g of y gives, over each group of channels,
∂v = r · (g · weight - n · mean(g · weight · n)).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_rms_norm(x_TI: Tensor, z_TI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """Return y (T, I) in x's dtype; computed in fp32, in fp64 if x is."""
    y_TI: Tensor = _GatedRMSNorm.apply(x_TI, z_TI, weight_I, groups, eps)
    return y_TI


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.groups, ctx.eps = groups, eps
        normal, _, _ = _normalise(x, z, groups, eps)
        return (normal.flatten(-2) * weight.to(normal.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        normal, scale, gate = _normalise(x, z, ctx.groups, ctx.eps)
        dy, weight32 = dy.to(normal.dtype), weight.to(normal.dtype)
        dnormal = (dy * weight32).unflatten(-1, (ctx.groups, -1))
        dv = (scale * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))).flatten(-2)
        z32 = z.to(normal.dtype)
        dx = dv * (z32 * gate)
        dz = dv * x.to(normal.dtype) * gate * (1 + z32 * (1 - gate))
        dweight = (dy * normal.flatten(-2)).sum(0)
        return dx.to(x.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None


def _normalise(x_TI: Tensor, z_TI: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return n (T, G, I/G), r (T, G, 1) and sigmoid(z) (T, I)."""
    compute = torch.float64 if x_TI.dtype == torch.float64 else torch.float32
    z = z_TI.to(compute)
    gate = torch.sigmoid(z)
    v_TGJ = (x_TI.to(compute) * z * gate).unflatten(-1, (groups, -1))
    scale = torch.rsqrt(v_TGJ.square().mean(-1, keepdim=True) + eps)
    return v_TGJ * scale, scale, gate
