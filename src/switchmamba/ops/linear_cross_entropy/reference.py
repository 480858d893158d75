"""Cross-entropy of a linear head with all logits at once: the truth that other backends are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    reduction: str,
    chunk_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the loss, fp32 (fp64 for fp64 x); the logits are a product in ``dtype``, never cut into chunks."""
    del chunk_size
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    kept_T = target_T != ignore_index
    logits_TV = (x_TD[kept_T].to(dtype) @ weight_VD.to(dtype).t()).to(wide)
    loss_T = torch.zeros(target_T.shape, dtype=wide, device=x_TD.device)
    loss_T[kept_T] = F.cross_entropy(logits_TV, target_T[kept_T], reduction="none")
    if reduction == "none":
        return loss_T
    return loss_T.sum() / kept_T.sum().clamp(min=1) if reduction == "mean" else loss_T.sum()
