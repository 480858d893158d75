"""Experts as a loop with boolean masks: the truth that other backends are tested against."""

import torch
from torch import Tensor

from switchmamba.ops.expert_feed_forward.activations import activate


def expert_feed_forward_reference(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return y (T, O) in the dtype of x; the matrix products run in ``dtype``."""
    wide = torch.promote_types(x_TD.dtype, expert_weight_TK.dtype)
    y_TO = x_TD.new_zeros(x_TD.shape[0], w2_EOF.shape[1], dtype=wide)
    for expert, (w1_FD, w2_OF) in enumerate(zip(w1_EFD.to(dtype), w2_EOF.to(dtype), strict=True)):
        for choice in range(expert_index_TK.shape[1]):
            mine_T = expert_index_TK[:, choice] == expert
            out_TO = activate(x_TD[mine_T].to(dtype) @ w1_FD.t(), activation) @ w2_OF.t()
            y_TO[mine_T] += expert_weight_TK[mine_T, choice, None] * out_TO
    return y_TO.to(x_TD.dtype)
