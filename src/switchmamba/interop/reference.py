"""Layers of other programs, written as their equations read: a loop over time, plain tensors, nothing of ours.

Imports and exports are compared with these where the other program itself is not at hand. Slow, for a few tokens.
Weights come by the names of the upstream Mamba code (github.com/state-spaces/mamba). Suffixes as in the glossary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def inside(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) · weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def any_norm(x: Tensor, weights: Weights, eps: float) -> Tensor:
    """Return the RMS norm, or the layer norm where there is a bias."""
    if "bias" in weights:
        return F.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps)
    return rms_norm(x, weights["weight"], eps)


def causal_convolution(x_BLI: Tensor, weight_I1W: Tensor, bias_I: Tensor | None) -> Tensor:
    """Return silu of the depthwise convolution over the last W inputs."""
    taps = weight_I1W.shape[-1]
    padded = F.pad(x_BLI, (0, 0, taps - 1, 0))
    y_BLI = torch.zeros_like(x_BLI)
    for tap in range(taps):
        y_BLI = y_BLI + weight_I1W[:, 0, tap] * padded[:, tap : tap + x_BLI.shape[1]]
    return F.silu(y_BLI if bias_I is None else y_BLI + bias_I)


def scan(x_BLI: Tensor, dt_BLI: Tensor, A_IN: Tensor, B_BLIN: Tensor, C_BLIN: Tensor) -> Tensor:
    """Return y_t = C_t h_t with h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, channel by channel."""
    h_BIN = torch.zeros(*x_BLI[:, 0].shape, A_IN.shape[-1], dtype=x_BLI.dtype)
    ys = []
    for t in range(x_BLI.shape[1]):
        dt_BI1 = dt_BLI[:, t, :, None]
        h_BIN = torch.exp(dt_BI1 * A_IN) * h_BIN + dt_BI1 * B_BLIN[:, t] * x_BLI[:, t, :, None]
        ys.append((h_BIN * C_BLIN[:, t]).sum(-1))
    return torch.stack(ys, 1)


def mamba1(x_BLD: Tensor, w: Weights, A_IN: Tensor, norms: tuple[Weights, float] | None = None) -> Tensor:
    """Return Mamba's mixer (arXiv 2312.00752, figure 3).

    ``norms``: weights ``dt``, ``B`` and ``C`` of Jamba's RMS norms, and their eps.
    """
    states, rank = A_IN.shape[1], w["dt_proj.weight"].shape[1]
    x_BLI, z_BLI = F.linear(x_BLD, w["in_proj.weight"]).chunk(2, dim=-1)
    x_BLI = causal_convolution(x_BLI, w["conv1d.weight"], w.get("conv1d.bias"))
    dt_BLR, B_BLN, C_BLN = torch.split(F.linear(x_BLI, w["x_proj.weight"]), [rank, states, states], dim=-1)
    if norms is not None:
        weights, eps = norms
        dt_BLR, B_BLN, C_BLN = (
            rms_norm(value, weights[name], eps)
            for name, value in (("dt", dt_BLR), ("B", B_BLN), ("C", C_BLN))
        )
    dt_BLI = F.softplus(F.linear(dt_BLR, w["dt_proj.weight"], w["dt_proj.bias"]))
    y_BLI = scan(x_BLI, dt_BLI, A_IN, B_BLN[:, :, None], C_BLN[:, :, None]) + w["D"] * x_BLI
    return F.linear(y_BLI * F.silu(z_BLI), w["out_proj.weight"])


def mamba2(x_BLD: Tensor, w: Weights, A_H: Tensor, groups: int, states: int, eps: float) -> Tensor:
    """Return Mamba-2's mixer (arXiv 2405.21060, §7.1), its norm behind the gate, over each group of channels."""
    inner, heads = w["norm.weight"].shape[0], A_H.shape[0]
    shared = groups * states
    sizes = [inner, inner + 2 * shared, heads]
    z_BLI, xBC, dt_BLH = torch.split(F.linear(x_BLD, w["in_proj.weight"]), sizes, dim=-1)
    xBC = causal_convolution(xBC, w["conv1d.weight"], w.get("conv1d.bias"))
    x_BLI, B, C = torch.split(xBC, [inner, shared, shared], dim=-1)
    dt_BLH = F.softplus(dt_BLH + w["dt_bias"])

    def each_channel(per_head: Tensor) -> Tensor:
        return per_head.repeat_interleave(inner // heads, dim=-1)

    def each_channel_of_groups(per_group: Tensor) -> Tensor:
        split = per_group.view(*per_group.shape[:2], groups, states)
        return split.repeat_interleave(inner // groups, dim=2)

    A_I1 = each_channel(A_H)[:, None]
    y_BLI = scan(x_BLI, each_channel(dt_BLH), A_I1.expand(-1, states), *map(each_channel_of_groups, (B, C)))
    y_BLI = (y_BLI + each_channel(w["D"]) * x_BLI) * F.silu(z_BLI)
    grouped = y_BLI.view(*y_BLI.shape[:2], groups, -1)
    y_BLI = rms_norm(grouped, w["norm.weight"].view(groups, -1), eps).flatten(2)
    return F.linear(y_BLI, w["out_proj.weight"])
