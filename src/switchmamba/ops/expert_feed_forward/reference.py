"""Experts as a loop with boolean masks: the truth that other backends are tested against."""

import torch
from torch import Tensor

from switchmamba.ops.expert_feed_forward.activations import activate


def expert_feed_forward_reference(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (T, D) in the dtype of x; the matrix products run in ``dtype``."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, expert_weight_TK.dtype))
    for expert, (w1_FD, w2_DF) in enumerate(zip(w1_EFD.to(dtype), w2_EDF.to(dtype), strict=True)):
        for choice in range(expert_index_TK.shape[1]):
            mine_T = expert_index_TK[:, choice] == expert
            out_TD = activate(x_TD[mine_T].to(dtype) @ w1_FD.t(), activation) @ w2_DF.t()
            y_TD[mine_T] += expert_weight_TK[mine_T, choice, None] * out_TD
    return y_TD.to(x_TD.dtype)
