"""State space duality, the obvious way: the recurrence of Mamba-2 (arXiv 2405.21060) §3, one step after the other.

    h_t = exp(Δ_t A_h) h_{t-1} + Δ_t x_t ⊗ B_t          y_t = h_t C_t + D_h x_t

It runs on every device; in fp64 it is the truth that the other backends are held to. It is slow, and autograd keeps the
(B, H, P, N) tensors of every step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, P) in x's dtype and the next state (B, H, P, N); computed in fp32, in fp64 if x is."""
    compute = torch.float64 if x_BHP.dtype == torch.float64 else torch.float32
    group_size = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN = B_BGN.to(compute).repeat_interleave(group_size, dim=1)
    C_BHN = C_BGN.to(compute).repeat_interleave(group_size, dim=1)
    x = x_BHP.to(compute)

    delta = dt_BH.to(compute)
    if dt_bias_H is not None:
        delta = delta + dt_bias_H.to(compute)
    if dt_softplus:
        delta = F.softplus(delta)

    decay_BH = torch.exp(delta * A_H.to(compute))
    drive_BHPN = (delta[..., None] * x)[..., None] * B_BHN[:, :, None, :]
    state_BHPN = decay_BH[..., None, None] * state_BHPN.to(compute) + drive_BHPN
    y = (state_BHPN * C_BHN[:, :, None, :]).sum(-1)
    if D_H is not None:
        y = y + D_H.to(compute)[:, None] * x
    return y.to(x_BHP.dtype), state_BHPN


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
    initial_state_BHPN: Tensor | None,
    starts_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N).

    ``starts_BL`` is True at the first step of a document other than a row's first; the state before it is nothing.
    """
    rows, length, heads, head_dim = x_BLHP.shape
    if initial_state_BHPN is None:
        compute = torch.float64 if x_BLHP.dtype == torch.float64 else torch.float32
        initial_state_BHPN = x_BLHP.new_zeros(rows, heads, head_dim, B_BLGN.shape[3], dtype=compute)
    state_BHPN = initial_state_BHPN
    outputs = []
    for t in range(length):
        if starts_BL is not None:
            state_BHPN = state_BHPN.masked_fill(starts_BL[:, t, None, None, None], 0)
        y_BHP, state_BHPN = ssd_step(
            state_BHPN,
            x_BLHP[:, t],
            dt_BLH[:, t],
            A_H,
            B_BLGN[:, t],
            C_BLGN[:, t],
            D_H,
            dt_bias_H,
            dt_softplus,
        )
        outputs.append(y_BHP)
    return torch.stack(outputs, dim=1), state_BHPN
