"""The definition: the weight that is meant, times x."""

import torch
from torch import Tensor


def int8_linear(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return y (…, O) in the dtype of x; the sum is in fp32, or fp64 for fp64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    meant_OI = weight_OI.to(wide) * scale_O.to(wide)[:, None]
    return (x.to(wide) @ meant_OI.t()).to(x.dtype)
