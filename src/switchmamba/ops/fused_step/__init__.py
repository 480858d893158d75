"""A decoding step in few launches: one token per row, inference only, states updated in place, on a GPU.

These are no operations of their own but compositions of others, so they have no reference here: the layers' ordinary
forward pass is theirs (``Layer.decode`` says when which runs). ``linear_step`` is a norm, a product and a residual sum;
``causal_conv1d_step_`` and ``selective_step_`` are the recurrent steps of their namesakes; ``experts_step`` is a norm,
a top-k router, the chosen experts and a residual sum; ``argmax_step`` chooses greedily.
"""

import torch

from switchmamba.ops.gpu import imported_when_called, needs_triton

_TRITON = "switchmamba.ops.fused_step.triton"

linear_step = imported_when_called(_TRITON, "linear_step")
inward_step_ = imported_when_called("switchmamba.ops.fused_step.mixer", "inward_step_")
selective_step_ = imported_when_called("switchmamba.ops.fused_step.mixer", "selective_step_")
experts_step = imported_when_called("switchmamba.ops.fused_step.experts", "experts_step")
largest_logit_step = imported_when_called("switchmamba.ops.fused_step.head", "largest_logit_step")
argmax_step = imported_when_called(_TRITON, "argmax_step")


def fused_step_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the fused step cannot serve a device and dtype, or None if it can."""
    return needs_triton(device, dtype)
