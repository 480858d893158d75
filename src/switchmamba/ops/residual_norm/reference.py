"""Sum and norm in torch's own operations: the truth that other backends are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def residual_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x + branch in the dtype of x, and its norm in ``dtype``."""
    total = x if branch is None else (x + branch).to(x.dtype)
    wide, width = torch.promote_types(x.dtype, torch.float32), (x.shape[-1],)
    weight_D = None if weight_D is None else weight_D.to(wide)
    bias_D = None if bias_D is None else bias_D.to(wide)
    if centered:
        return total, F.layer_norm(total.to(wide), width, weight_D, bias_D, eps).to(dtype)
    normed = F.rms_norm(total.to(wide), width, weight_D, eps)
    return total, (normed if bias_D is None else normed + bias_D).to(dtype)
