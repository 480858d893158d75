# mypy: allow-untyped-calls
"""Gated RMS norm, the obvious way: v = x · silu(z), y = v / √(mean v² + eps) · weight over each group of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x_TI: Tensor, z_TI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """Return y (T, I) in x's dtype; computed in fp32, in fp64 if x is."""
    compute = torch.float64 if x_TI.dtype == torch.float64 else torch.float32
    v_TGJ: Tensor = (x_TI.to(compute) * F.silu(z_TI.to(compute))).unflatten(-1, (groups, -1))
    normal_TGJ = v_TGJ * torch.rsqrt(v_TGJ.square().mean(-1, keepdim=True) + eps)
    return (normal_TGJ.flatten(-2) * weight_I.to(compute)).to(x_TI.dtype)
