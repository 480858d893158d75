"""Cross-entropy of a linear head in chunks of tokens, with the gradients computed on the way forward.

For one token with logits z, target t and probabilities p = softmax(z): loss = logsumexp(z) - z_t and
∂loss/∂z = p - onehot(t). A chunk's logits turn into that gradient in place, so each chunk is multiplied out once, and
no (T, V) tensor ever exists (the idea of Liger Kernel, Hsu et al. 2024, arXiv 2410.10989, §3.2).

Kept for the backward pass of a sum or a mean: dx (T, D) and dweight (V, D). For ``"none"``, whose weights of the
tokens are not known yet, only the inputs are kept and the logits are made again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy_eager(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    reduction: str,
    chunk_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the loss, fp32 (fp64 for fp64 x); the matrix products run in ``dtype``."""
    kept_T = target_T != ignore_index
    x_TD = x_TD.masked_fill(~kept_T[:, None], 0)  # an ignored token's x may be anything, even NaN
    target_T = target_T.masked_fill(~kept_T, 0)
    arguments = (x_TD, weight_VD, target_T, kept_T, chunk_size, dtype)
    if reduction == "none":
        loss_T: Tensor = _TokenLosses.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss_T
    loss: Tensor = _SumOfLosses.apply(*arguments, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss / kept_T.sum().clamp(min=1) if reduction == "mean" else loss


class _SumOfLosses(torch.autograd.Function):
    """Σ over kept tokens, (); its gradients are computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        kept: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        differentiated: bool,
    ) -> Tensor:
        needs = [differentiated and needed for needed in ctx.needs_input_grad[:2]]
        loss, dx, dweight = _losses(x, weight, target, kept, chunk_size, dtype, *needs)
        ctx.save_for_backward(dx, dweight)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors)
        return dx, dweight, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Each token's loss, (T,)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, kept: Tensor, chunk_size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, target, kept)
        ctx.chunk_size, ctx.dtype = chunk_size, dtype
        return _losses(x, weight, target, kept, chunk_size, dtype, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target, kept = ctx.saved_tensors
        share = dloss.masked_fill(~kept, 0)
        _, dx, dweight = _losses(
            x, weight, target, share, ctx.chunk_size, ctx.dtype, *ctx.needs_input_grad[:2]
        )
        return dx, dweight, None, None, None, None


def _losses(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    share_T: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses (T,), zero where the share is, and the gradients of Σ share·loss where they are needed."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    narrow_VD = weight_VD.to(dtype)
    loss_T = torch.empty(x_TD.shape[0], dtype=wide, device=x_TD.device)
    dx_TD = torch.empty_like(x_TD) if needs_dx else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_dweight else None
    rows = min(chunk_size, x_TD.shape[0])
    logits_CV = x_TD.new_empty(
        rows, weight_VD.shape[0], dtype=dtype
    )  # the chunks share two buffers: fresh memory
    log_p_CV = torch.empty_like(logits_CV, dtype=wide)  # for each would cost as much as the softmax
    for start in range(0, x_TD.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        x, target, share = x_TD[chunk].to(dtype), target_T[chunk, None], share_T[chunk, None]
        logits = torch.mm(x, narrow_VD.t(), out=logits_CV[: x.shape[0]])
        log_p = torch.log_softmax(logits, dim=1, dtype=wide, out=log_p_CV[: x.shape[0]])
        loss_T[chunk] = -log_p.gather(1, target).masked_fill(share == 0, 0)[:, 0]
        if not (needs_dx or needs_dweight):
            continue
        dlogits = log_p.exp_().scatter_add_(1, target, log_p.new_full((), -1).expand_as(target)).to(dtype)
        if dx_TD is not None:
            dx_TD[chunk] = torch.mm(dlogits, narrow_VD) * share
        if dweight_VD is not None:
            _add_product(dweight_VD, dlogits.t(), (x * share).to(dtype))
    return loss_T, dx_TD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)
