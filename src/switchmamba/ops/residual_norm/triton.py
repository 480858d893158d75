# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sum and norm on a GPU: one Triton kernel forward, one backward, each tensor read or written once.

The backward pass adds the gradient that reaches the sum from elsewhere, which is what a residual stream needs. It
computes the statistics again from the sum. A program owns some rows and writes its share of the gradients of weight and
bias to a slab; the slabs are summed afterwards: no atomics, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.slabs import sum_slabs

_TILE = 2048
"""Numbers of a tile of the forward pass, four warps' worth; a row is never cut."""
_PROGRAMS = 1056
"""Programs of the backward pass, each with a slab of its own; a constant, so that no GPU sums in another order."""


@triton.jit
def _normalized(s, inside, width, eps, CENTERED: tl.constexpr, AXIS: tl.constexpr):
    """Return the rows of s, whose mean is taken off and whose size is 1, and the factor that made it so."""
    if CENTERED:
        mean = tl.sum(s, AXIS, keep_dims=True) / width
        s = tl.where(inside, s - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(s * s, AXIS, keep_dims=True) / width + eps)
    return s * factor, factor


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, branch, weight, bias, total, normed, rows, width, eps, CENTERED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Fill total = x + branch, if there is a branch, and normed (rows, width)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    s = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        s += tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        s = s.to(total.dtype.element_ty)
        tl.store(total + place, s, mask=inside)
        s = s.to(tl.float32)
    y, _ = _normalized(s, inside, width, eps, CENTERED, 1)
    if weight is not None:
        y *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "own"])
def _backward(
    total, weight, dnormed, dtotal, dx, dbranch, slab, rows, own, width, eps, CENTERED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Fill dx, dbranch (the same in another dtype) and slab (programs, 2, width); a program owns ``own`` rows."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    w = tl.full([WIDTH], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([WIDTH], tl.float32)
    dbias = tl.zeros([WIDTH], tl.float32)
    row = program * own
    end = tl.minimum(row + own, rows)
    while row < end:
        place = row * width + column
        s = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dnormed + place, mask=inside, other=0.0).to(tl.float32)
        further = tl.zeros([WIDTH], tl.float32)
        if dtotal is not None:  # loaded early, used late
            further = tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        y, factor = _normalized(s, inside, width, eps, CENTERED, 0)
        dweight += dy * y
        dbias += dy
        dy *= w
        ds = dy - y * (tl.sum(dy * y, 0) / width)
        if CENTERED:
            ds -= tl.sum(dy, 0) / width
        ds = ds * factor + further
        tl.store(dx + place, ds.to(dx.dtype.element_ty), mask=inside)
        if dbranch is not None:
            tl.store(dbranch + place, ds.to(dbranch.dtype.element_ty), mask=inside)
        row += 1
    slab += program * 2 * width + column
    tl.store(slab, dweight, mask=inside)
    tl.store(slab + width, dbias, mask=inside)


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    centered: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x + branch in the dtype of x, and its norm in ``dtype``."""
    tensors = (x, branch, weight_D, bias_D)
    total, normed = _ResidualNorm.apply(
        *(None if tensor is None else tensor.contiguous() for tensor in tensors), eps, centered, dtype
    )
    return total, normed


class _ResidualNorm(torch.autograd.Function):
    """(x + branch, its norm); without a branch x itself is handed on, so that its gradients meet in one kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rows = x.numel() // width
        total = x.view_as(x) if branch is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=dtype)
        padded = triton.next_power_of_2(width)
        tile = max(1, _TILE // padded)
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, tile),)](
                x, branch, weight, bias, total, normed, rows, width, eps,
                CENTERED=centered, ROWS=tile, WIDTH=padded, num_warps=min(16, max(4, padded // 512)),
            )  # fmt: skip
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.centered = eps, centered
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if dnormed is None:
            dbranch = None if dtotal is None or ctx.branch_dtype is None else dtotal.to(ctx.branch_dtype)
            return dtotal, dbranch, None, None, None, None, None
        width = total.shape[-1]
        rows = total.numel() // width
        padded = triton.next_power_of_2(width)
        own = triton.cdiv(rows, _PROGRAMS)
        programs = triton.cdiv(rows, own)
        dx = torch.empty_like(total)
        dbranch = None
        if ctx.branch_dtype is not None:
            dbranch = dx if ctx.branch_dtype == dx.dtype else torch.empty_like(dx, dtype=ctx.branch_dtype)
        slab = total.new_empty(programs, 2 * width, dtype=torch.float32)
        with torch.cuda.device_of(total):
            _backward[(programs,)](
                total, weight, dnormed.contiguous(), None if dtotal is None else dtotal.contiguous(),
                dx, None if dbranch is dx else dbranch, slab, rows, own, width, ctx.eps,
                CENTERED=ctx.centered, WIDTH=padded, num_warps=_backward_warps(padded),
            )  # fmt: skip
        dweight, dbias = sum_slabs(slab).split(width)
        return (
            dx,
            dbranch,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


def _backward_warps(padded: int) -> int:
    """Return how many warps share a row: the fastest of those tried (README.md)."""
    return max(1, padded // 128 if padded <= 512 else min(16, padded // 1024))
