"""A decoding step in few launches: one token per row, inference only, states updated in place, on a GPU.

These are no operations of their own but compositions of others, so they have no reference here: the layers' ordinary
forward pass is theirs (``Layer.decode_`` says when which runs). ``linear_step`` is a norm, a product and a residual
sum; ``inward_step_`` a norm, Mamba's in_proj, its convolution's step and x_proj; ``selective_step_`` the recurrent
step; ``experts_step`` a norm, a top-k router, the chosen experts and a residual sum, or
without the first and the last; ``argmax_step`` chooses greedily,
and ``largest_logit_step`` does so from the head's input.
"""

import torch

from switchmamba.ops.gpu import imported_when_called, needs_triton, shared_memory

_TRITON = "switchmamba.ops.fused_step.triton"

linear_step = imported_when_called(_TRITON, "linear_step")
inward_step_ = imported_when_called("switchmamba.ops.fused_step.mixer", "inward_step_")
selective_step_ = imported_when_called("switchmamba.ops.fused_step.mixer", "selective_step_")
experts_step = imported_when_called("switchmamba.ops.fused_step.experts", "experts_step")
largest_logit_step = imported_when_called("switchmamba.ops.fused_step.head", "largest_logit_step")
argmax_step = imported_when_called(_TRITON, "argmax_step")


_SHARED_BYTES = 163 * 1024
"""What the largest tiles need of a block's shared memory; compute capabilities 8.6, 8.9 and 12 have less."""


def fused_step_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the fused step cannot serve a device and dtype, or None if it can."""
    lacking = needs_triton(device, dtype)
    if lacking is None and shared_memory(device) < _SHARED_BYTES:
        lacking = f"it needs {_SHARED_BYTES} bytes of shared memory in a block, the device has {shared_memory(device)}"
    return lacking
