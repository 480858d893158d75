"""Causal depthwise convolution as a loop over taps: the truth that other backends are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_reference(
    x_BLI: Tensor,
    weight_IW: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    initial_state_BWI: Tensor | None,
    document_starts_BL: Tensor | None,
) -> Tensor:
    """Return y (B, L, I); all floating inputs share one dtype, fp32 or fp64."""
    batch, length, channels = x_BLI.shape
    reach = weight_IW.shape[1] - 1
    if initial_state_BWI is None:
        initial_state_BWI = x_BLI.new_zeros(batch, reach, channels)
    history = torch.cat([initial_state_BWI, x_BLI], dim=1)
    position_L = torch.arange(length, device=x_BLI.device)
    y_BLI = torch.zeros_like(x_BLI)
    for tap in range(reach + 1):
        input_BLI = history[:, tap : tap + length]
        if document_starts_BL is not None:
            same_document_BL = position_L - (reach - tap) >= document_starts_BL
            input_BLI = torch.where(same_document_BL[..., None], input_BLI, 0)
        y_BLI = y_BLI + weight_IW[:, tap] * input_BLI
    if bias_I is not None:
        y_BLI = y_BLI + bias_I
    return F.silu(y_BLI) if activation == "silu" else y_BLI


def causal_conv1d_step_reference(
    state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) and the state after it; all floating inputs share one dtype, fp32 or fp64."""
    window_BWI = torch.cat([state_BWI, x_BI[:, None]], dim=1)
    y_BI = (window_BWI * weight_IW.t()).sum(dim=1)
    if bias_I is not None:
        y_BI = y_BI + bias_I
    return F.silu(y_BI) if activation == "silu" else y_BI, window_BWI[:, 1:]
