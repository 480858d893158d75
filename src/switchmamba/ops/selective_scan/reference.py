"""Selective scan, the obvious way: the recurrence of Mamba §3.2, eq. 2, one step after the other.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

It runs on every device; in fp64 it is the truth that the other backends are held to. It is slow, and autograd keeps the
(B, I, N) tensors of every step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_step(
    state_BIN: Tensor,
    x_BI: Tensor,
    dt_BI: Tensor,
    A_IN: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_I: Tensor | None,
    z_BI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) in x's dtype and the next state (B, I, N); computed in fp32, in fp64 if x is."""
    compute = torch.float64 if x_BI.dtype == torch.float64 else torch.float32
    group_size = x_BI.shape[1] // B_BGN.shape[1]
    B_BIN = B_BGN.to(compute).repeat_interleave(group_size, dim=1)
    C_BIN = C_BGN.to(compute).repeat_interleave(group_size, dim=1)
    x = x_BI.to(compute)

    delta = dt_BI.to(compute)
    if dt_bias_I is not None:
        delta = delta + dt_bias_I.to(compute)
    if dt_softplus:
        delta = F.softplus(delta)

    decay_BIN = torch.exp(delta.unsqueeze(-1) * A_IN.to(compute))
    state_BIN = decay_BIN * state_BIN.to(compute) + (delta * x).unsqueeze(-1) * B_BIN
    y = (state_BIN * C_BIN).sum(-1)
    if D_I is not None:
        y = y + D_I.to(compute) * x
    if z_BI is not None:
        y = y * F.silu(z_BI.to(compute))
    return y.to(x_BI.dtype), state_BIN


def selective_scan(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_I: Tensor | None,
    z_BLI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
    initial_state_BIN: Tensor | None,
    starts_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, I) in x's dtype and the final state (B, I, N).

    ``starts_BL`` is True at the first step of a document other than a row's first; the state before it is nothing.
    """
    (rows, length, channels), states = x_BLI.shape, A_IN.shape[1]
    if initial_state_BIN is None:
        compute = torch.float64 if x_BLI.dtype == torch.float64 else torch.float32
        initial_state_BIN = x_BLI.new_zeros(rows, channels, states, dtype=compute)
    state_BIN = initial_state_BIN
    outputs = []
    for t in range(length):
        if starts_BL is not None:
            state_BIN = state_BIN.masked_fill(starts_BL[:, t, None, None], 0)
        y_BI, state_BIN = selective_step(
            state_BIN,
            x_BLI[:, t],
            dt_BLI[:, t],
            A_IN,
            B_BLGN[:, t],
            C_BLGN[:, t],
            D_I,
            None if z_BLI is None else z_BLI[:, t],
            dt_bias_I,
            dt_softplus,
        )
        outputs.append(y_BI)
    return torch.stack(outputs, dim=1), state_BIN
