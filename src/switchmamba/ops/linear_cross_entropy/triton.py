# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Cross-entropy of a linear head on a GPU: matrix products by cuBLAS, everything between them in one Triton kernel.

    z = W x        loss = logsumexp(z) - z_t        ∂loss/∂z = softmax(z) - onehot(t)

Chunks of tokens as in the eager backend. The kernel reads a row of logits twice (the second time from the cache) and
writes the gradient over it: no fp32 copy of the logits, no gather or scatter. The vocabulary is padded with rows of
zeros to a multiple of 128, because matrix products over an odd number of columns (50,257) run five times slower; a
padded column has probability and gradient zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_MULTIPLE = 128
_BLOCK = 8192
"""Columns that a program looks at together; 32 warps with 32 registers a thread, so that two rows fill a multiprocessor
and are still in the cache when they are read again."""
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(logits, column, vocab_size, VOCAB_PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Return logits in fp32; with MASKED the lowest number stands for those outside the vocabulary."""
    if MASKED:
        z = tl.load(logits + column, mask=column < VOCAB_PADDED, other=0.0).to(tl.float32)
        z = tl.where(column < vocab_size, z, _LOWEST)
    else:
        z = tl.load(logits + column).to(tl.float32)
    return z


@triton.jit
def _add_exponentials(
    largest, total, logits, column, vocab_size, VOCAB_PADDED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Take the logits of ``column`` (lanes, 8) into the lanes' largest logits and Σ exp(z - largest)."""
    z = _load(logits, column, vocab_size, VOCAB_PADDED, MASKED)
    new = tl.maximum(largest, tl.max(z, 1))
    more = tl.exp2((z - new[:, None]) * _LOG2_E)
    if MASKED:
        more = tl.where(column < vocab_size, more, 0.0)
    return new, total * tl.exp2((largest - new) * _LOG2_E) + tl.sum(more, 1)


@triton.jit
def _store_gradient(
    logits, column, top, log2_total, vocab_size, VOCAB_PADDED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Turn the logits of ``column`` into probabilities."""
    z = _load(logits, column, vocab_size, VOCAB_PADDED, MASKED)
    p = tl.exp2((z - top) * _LOG2_E - log2_total)
    if MASKED:
        p = tl.where(column < vocab_size, p, 0.0)
        tl.store(logits + column, p.to(logits.dtype.element_ty), mask=column < VOCAB_PADDED)
    else:
        tl.store(logits + column, p.to(logits.dtype.element_ty))


@triton.jit
def _cross_entropy(
    logits, target, loss, vocab_size, ignore_index, VOCAB_PADDED: tl.constexpr, WHOLE: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill loss (C,) from logits (C, V padded); with GRADIENT turn the logits into its gradient.

    A program owns one row and goes over it in blocks of BLOCK // 8 lanes with 8 columns each; the first WHOLE columns
    need no mask. A lane keeps the largest logit that it met and Σ exp(z - largest); the lanes meet at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB_PADDED
    lane = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    wanted = tl.load(target + row)
    if wanted == ignore_index:
        tl.store(loss + row, 0.0)
        if GRADIENT:
            for start in tl.range(0, VOCAB_PADDED, BLOCK):
                zeros = tl.zeros([BLOCK // 8, 8], logits.dtype.element_ty)
                tl.store(logits + start + lane, zeros, mask=start + lane < VOCAB_PADDED)
    else:
        exists = (wanted >= 0) & (wanted < vocab_size)  # else the loss is NaN, which stops the run
        z_wanted = tl.load(logits + wanted, mask=exists, other=float("nan")).to(tl.float32)
        largest = tl.full([BLOCK // 8], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK // 8], tl.float32)
        for start in tl.range(0, WHOLE, BLOCK):
            largest, total = _add_exponentials(
                largest, total, logits, start + lane, vocab_size, VOCAB_PADDED, False
            )
        if WHOLE < VOCAB_PADDED:
            largest, total = _add_exponentials(
                largest, total, logits, WHOLE + lane, vocab_size, VOCAB_PADDED, True
            )
        top = tl.max(largest, 0)
        log2_total = tl.log2(tl.sum(total * tl.exp2((largest - top) * _LOG2_E), 0))
        tl.store(loss + row, (top - z_wanted) + log2_total / _LOG2_E)
        if GRADIENT:
            for start in tl.range(0, WHOLE, BLOCK):
                _store_gradient(logits, start + lane, top, log2_total, vocab_size, VOCAB_PADDED, False)
            if WHOLE < VOCAB_PADDED:
                _store_gradient(logits, WHOLE + lane, top, log2_total, vocab_size, VOCAB_PADDED, True)
            tl.debug_barrier()  # the column of the target was another thread's
            dz_wanted = tl.exp2((z_wanted - top) * _LOG2_E - log2_total) - 1
            tl.store(logits + wanted, dz_wanted.to(logits.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def _copy_rows(
    x, target, factor, out, tokens, columns, x_row, x_column, ignore_index, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Fill out (T, D) with x, times a factor if given, and zeros where the target, if given, is ignored."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < columns)[None, :]
    wanted = inside
    if target is not None:
        wanted = inside & (tl.load(target + row, mask=row < tokens, other=0) != ignore_index)[:, None]
    value = tl.load(
        x + row[:, None] * x_row + column.to(tl.int64)[None, :] * x_column, mask=wanted, other=0.0
    )
    if factor is not None:
        value = value.to(tl.float32) * tl.load(factor)
    tl.store(out + row[:, None] * columns + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def _copied(
    x_TD: Tensor, dtype: torch.dtype, target_T: Tensor | None, ignore_index: int, factor: Tensor | None
) -> Tensor:
    """Return x in ``dtype``, with zeros for ignored tokens, whatever their x is, even NaN; or times ``factor``, ()."""
    tokens, columns = x_TD.shape
    out_TD = x_TD.new_empty(tokens, columns, dtype=dtype)
    width = min(512, triton.next_power_of_2(columns))
    rows = max(1, 4096 // width)
    with torch.cuda.device_of(x_TD):
        _copy_rows[(triton.cdiv(tokens, rows), triton.cdiv(columns, width))](
            x_TD,
            target_T,
            factor,
            out_TD,
            tokens,
            columns,
            *x_TD.stride(),
            ignore_index,
            ROWS=rows,
            COLUMNS=width,
        )
    return out_TD


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    ignore_index: int,
    reduction: str,
    chunk_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the loss, fp32; the matrix products run in ``dtype``."""
    kept_T = target_T != ignore_index
    how = (ignore_index, chunk_size, dtype)
    if reduction == "none":
        loss_T: Tensor = _TokenLosses.apply(x_TD, weight_VD, target_T, kept_T, *how)
        return loss_T
    loss: Tensor = _SumOfLosses.apply(x_TD, weight_VD, target_T, *how, torch.is_grad_enabled())
    return loss / kept_T.sum().clamp(min=1) if reduction == "mean" else loss


class _SumOfLosses(torch.autograd.Function):
    """Σ over kept tokens, (); its gradients are computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        ignore_index: int,
        chunk_size: int,
        dtype: torch.dtype,
        differentiated: bool,
    ) -> Tensor:
        needs = [differentiated and needed for needed in ctx.needs_input_grad[:2]]
        loss, dx, dweight = _losses(x, weight, target, None, ignore_index, chunk_size, dtype, *needs)
        ctx.save_for_backward(dx, dweight)
        ctx.x_dtype = x.dtype
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        if dx is not None:
            dx = _copied(dx, ctx.x_dtype, None, 0, dloss)
        return dx, None if dweight is None else dweight * dloss, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Each token's loss, (T,). What weight each has is not known yet: the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        kept: Tensor,
        ignore_index: int,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, target, kept)
        ctx.ignore_index, ctx.chunk_size, ctx.dtype = ignore_index, chunk_size, dtype
        return _losses(x, weight, target, None, ignore_index, chunk_size, dtype, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target, kept = ctx.saved_tensors
        share_T = dloss.masked_fill(~kept, 0)
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        _, dx, dweight = _losses(
            x,
            weight,
            target,
            share_T,
            ctx.ignore_index,
            ctx.chunk_size,
            ctx.dtype,
            needs_dx,
            needs_dweight,
        )
        return dx, dweight, None, None, None, None, None


def _losses(
    x_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    share_T: Tensor | None,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses (T,), and the gradients of Σ share·loss (share 1 without ``share_T``) where they are needed."""
    vocab_size, d_model = weight_VD.shape
    padded = triton.cdiv(vocab_size, _MULTIPLE) * _MULTIPLE
    weight_PD = weight_VD.new_empty(padded, d_model, dtype=dtype)
    weight_PD[:vocab_size].copy_(weight_VD)
    weight_PD[vocab_size:].zero_()
    target_T = target_T.contiguous()
    x_TD = _copied(x_TD, dtype, target_T, ignore_index, None)
    loss_T = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
    dx_TD = torch.empty_like(x_TD) if needs_dx else None
    dweight_PD = weight_PD.new_zeros(padded, d_model, dtype=torch.float32) if needs_dweight else None
    logits_CP = x_TD.new_empty(min(chunk_size, x_TD.shape[0]), padded)
    block = min(_BLOCK, max(8, triton.next_power_of_2(padded)))
    for start in range(0, x_TD.shape[0], chunk_size):
        chunk = slice(start, start + chunk_size)
        x = x_TD[chunk]
        logits = torch.mm(x, weight_PD.t(), out=logits_CP[: x.shape[0]])
        with torch.cuda.device_of(x):
            _cross_entropy[(x.shape[0],)](
                logits, target_T[chunk], loss_T[chunk], vocab_size, ignore_index,
                VOCAB_PADDED=padded, WHOLE=vocab_size // block * block, GRADIENT=needs_dx or needs_dweight,
                BLOCK=block, num_warps=max(1, block // 256), maxnreg=32,
            )  # fmt: skip
        share = None if share_T is None else share_T[chunk, None]
        if dx_TD is not None:
            dx = torch.mm(logits, weight_PD, out=dx_TD[chunk])
            if share is not None:
                dx *= share
        if dweight_PD is not None:
            add_product(dweight_PD, logits.t(), x if share is None else (x * share).to(dtype))
    dweight_VD = None if dweight_PD is None else dweight_PD[:vocab_size].to(weight_VD.dtype)
    return loss_T, dx_TD, dweight_VD


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to ``total``, which may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)
