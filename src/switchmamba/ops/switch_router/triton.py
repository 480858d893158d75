# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The Switch router on a GPU: bf16 matrix products that are exact to fp32, and one kernel per pass around them.

x is bf16, so x·w is exact to fp32 if w is written as a sum of three bf16 numbers, w = hi + mid + lo: one product with
three times as many columns, on the matrix units, instead of an fp32 product without them. The gradient of the logits is
split the same way; the backward kernel multiplies it by w and adds the gradient that reaches x from the experts. Every
program writes its share of the sums to a slab, and one kernel sums the slabs afterwards: no atomics, so results repeat
bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TOKENS, _NUMBERS = 64, 4096
"""Tokens of a program, and these times experts."""
_COLUMNS, _WEIGHTS = 64, 16384
"""Columns of x that a program reads, or of its gradient that it makes, at a time, and these times experts."""


@triton.jit
def _split(value):
    """Return three bf16 numbers whose sum is the fp32 value, the largest first."""
    high = value.to(tl.bfloat16)
    value -= high.to(tl.float32)
    middle = value.to(tl.bfloat16)
    return high, middle, (value - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_weight(weight, pieces, experts, width, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Fill pieces (3, PADDED, D): hi, mid and lo. Zeros behind E."""
    expert = tl.program_id(0)
    for start in tl.static_range(0, BLOCK, 1024):
        column = start + tl.arange(0, 1024)
        value = tl.load(
            weight + expert * width + column, mask=(column < width) & (expert < experts), other=0.0
        )
        high, middle, low = _split(value.to(tl.float32))
        place = pieces + expert * width + column
        tl.store(place, high, mask=column < width)
        tl.store(place + PADDED * width, middle, mask=column < width)
        tl.store(place + 2 * PADDED * width, low, mask=column < width)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x, pieces, probability, logsumexp, index, weight, sums, counts, tokens, experts, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Fill probability (T, PADDED), logsumexp, index and weight (T,), and slabs of sums (programs, E + 2) and counts.

    The logits are x (T, D) times hi, mid and lo, added up in fp32. The last two sums are of logsumexp² and of the
    entropy.
    """
    program = tl.program_id(0)
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    there = (token < tokens)[:, None] & (expert < experts)[None, :]
    stored = (token < tokens)[:, None] & (expert < PADDED)[None, :]
    z = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for start in tl.range(0, WIDTH, DEPTH):
        column = start + tl.arange(0, DEPTH)
        inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
        x_tile = tl.load(x + token[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        of_w = (column < WIDTH)[:, None] & (expert < PADDED)[None, :]
        w_place = pieces + expert[None, :] * WIDTH + column[:, None]
        low = tl.load(w_place + 2 * PADDED * WIDTH, mask=of_w, other=0.0)
        middle = tl.load(w_place + PADDED * WIDTH, mask=of_w, other=0.0)
        high = tl.load(w_place, mask=of_w, other=0.0)
        z = tl.dot(x_tile, low, z)
        z = tl.dot(x_tile, middle, z)
        z = tl.dot(x_tile, high, z)
    z = tl.where((expert < experts)[None, :], z, float("-inf"))
    top = tl.max(z, 1)
    p = tl.exp(z - top[:, None])
    total = tl.sum(p, 1)
    p = p / total[:, None]
    lse = top + tl.log(total)
    chosen = tl.minimum(tl.argmax(p, 1, tie_break_left=True), experts - 1)  # also of NaN
    exists = token < tokens
    tl.store(probability + token[:, None] * PADDED + expert[None, :], p, mask=stored)
    tl.store(logsumexp + token, lse, mask=exists)
    tl.store(index + token, chosen.to(tl.int64), mask=exists)
    tl.store(weight + token, tl.max(p, 1), mask=exists)

    entropy = lse - tl.sum(p * tl.where(there, z, 0.0), 1)
    is_chosen = (expert[None, :] == chosen[:, None]) & there
    tl.store(counts + program * experts + expert, tl.sum(is_chosen.to(tl.int32), 0), mask=expert < experts)
    sums += program * (experts + 2)
    tl.store(sums + expert, tl.sum(tl.where(there, p, 0.0), 0), mask=expert < experts)
    tl.store(sums + experts, tl.sum(tl.where(exists, lse * lse, 0.0), 0))
    tl.store(sums + experts + 1, tl.sum(tl.where(exists, entropy, 0.0), 0))


@triton.jit(do_not_specialize=["programs", "experts"])
def _sum_slabs(
    sums, counts, probability_sum, squared_sum, entropy_sum, total_count, programs, experts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the slabs of sums and counts over programs, always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([COLUMNS], tl.int32)
    start = 0
    while start < programs:
        row = start + tl.arange(0, ROWS)
        exists = (row < programs)[:, None] & (column < experts + 2)[None, :]
        total += tl.sum(
            tl.load(sums + row[:, None] * (experts + 2) + column[None, :], mask=exists, other=0.0), 0
        )
        exists = (row < programs)[:, None] & (column < experts)[None, :]
        count += tl.sum(tl.load(counts + row[:, None] * experts + column[None, :], mask=exists, other=0), 0)
        start += ROWS
    tl.store(probability_sum + column, total, mask=column < experts)
    tl.store(total_count + column, count.to(tl.int64), mask=column < experts)
    tl.store(squared_sum + column - experts, total, mask=column == experts)
    tl.store(entropy_sum + column - experts - 1, total, mask=column == experts + 1)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    probability, logsumexp, index, dweight, dprobability_sum, dsquared_sum, dx_experts, weight_pieces, dx, pieces,
    tokens, experts, width,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill pieces (T, 3, PADDED), the gradient of the logits as hi, mid and lo, and dx (T, D) = dx_experts + dz · w.

    A gradient may be None. dx is bf16: of the products those of hi and mid are enough.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    exists = token < tokens
    stored = exists[:, None] & (expert < PADDED)[None, :]
    p = tl.load(probability + token[:, None] * PADDED + expert[None, :], mask=stored, other=0.0)
    dp = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if dprobability_sum is not None:
        dp += tl.load(dprobability_sum + expert, mask=expert < experts, other=0.0)[None, :]
    if dweight is not None:
        chosen = tl.load(index + token, mask=exists, other=0)
        of_chosen = tl.load(dweight + token, mask=exists, other=0.0)
        dp += tl.where(expert[None, :] == chosen[:, None], of_chosen[:, None], 0.0)
    dz = p * (dp - tl.sum(p * dp, 1)[:, None])
    if dsquared_sum is not None:
        lse = tl.load(logsumexp + token, mask=exists, other=0.0)
        dz += p * (2 * lse * tl.load(dsquared_sum))[:, None]
    high, middle, low = _split(dz)
    if pieces is not None:
        place = pieces + token[:, None] * (3 * PADDED) + expert[None, :]
        tl.store(place, high, mask=stored)
        tl.store(place + PADDED, middle, mask=stored)
        tl.store(place + 2 * PADDED, low, mask=stored)
    if dx is not None:
        start = 0
        while start < width:
            column = start + tl.arange(0, COLUMNS)
            there = (expert < PADDED)[:, None] & (column < width)[None, :]
            w_place = weight_pieces + expert[:, None] * width + column[None, :]
            w_high = tl.load(w_place, mask=there, other=0.0)
            w_middle = tl.load(w_place + PADDED * width, mask=there, other=0.0)
            total = tl.dot(high, w_middle)
            total = tl.dot(middle, w_high, total)
            total = tl.dot(high, w_high, total)
            inside = exists[:, None] & (column < width)[None, :]
            x_place = token[:, None] * width + column[None, :]
            if dx_experts is not None:
                total += tl.load(dx_experts + x_place, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + x_place, total.to(dx.dtype.element_ty), mask=inside)
            start += COLUMNS


def switch_router(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
    """Return index, weight, the sums and x; x is bf16."""
    results: tuple[Tensor, ...] = _SwitchRouter.apply(x_TD.contiguous(), weight_ED.contiguous())
    return results


class _SwitchRouter(torch.autograd.Function):
    """(index, weight, Σp, Σlse², Σentropy, counts, x) from x (T, D) and weight (E, D).

    x itself is handed on, so that the gradients of both its uses meet in one kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        (tokens, width), experts = x.shape, weight.shape[0]
        padded = triton.cdiv(experts, 16) * 16
        bins = triton.next_power_of_2(padded)
        own = _tokens(bins)
        programs = triton.cdiv(tokens, own)

        def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return x.new_empty(shape, dtype=dtype)

        pieces = x.new_empty(3, padded, width)
        probability, logsumexp, chosen_weight = numbers(tokens, padded), numbers(tokens), numbers(tokens, 1)
        index = numbers(tokens, 1, dtype=torch.int64)
        sums, counts = numbers(programs, experts + 2), numbers(programs, experts, dtype=torch.int32)
        probability_sum, squared_sum, entropy_sum = numbers(experts), numbers(), numbers()
        total_count = numbers(experts, dtype=torch.int64)
        with torch.cuda.device_of(x):
            _split_weight[(padded,)](
                weight, pieces, experts, width, PADDED=padded, BLOCK=triton.cdiv(width, 1024) * 1024
            )
            _forward[(programs,)](
                x, pieces, probability, logsumexp, index, chosen_weight, sums, counts, tokens, experts,
                WIDTH=width, PADDED=padded, TOKENS=own, EXPERTS=bins, DEPTH=_columns(bins),
            )  # fmt: skip
            _sum_slabs[(triton.cdiv(experts + 2, 8),)](
                sums, counts, probability_sum, squared_sum, entropy_sum, total_count, programs, experts,
                ROWS=min(1024, triton.next_power_of_2(programs)), COLUMNS=8, num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(x, pieces, probability, logsumexp, index)
        ctx.experts, ctx.weight_dtype = experts, weight.dtype
        ctx.mark_non_differentiable(index, total_count, entropy_sum)
        ctx.set_materialize_grads(False)
        return index, chosen_weight, probability_sum, squared_sum, entropy_sum, total_count, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _index: Any,
        dweight: Tensor | None,
        dprobability: Tensor | None,
        dsquared: Tensor | None,
        _entropy: Any,
        _count: Any,
        dx_experts: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight_pieces, probability, logsumexp, index = ctx.saved_tensors
        (tokens, padded), width = probability.shape, x.shape[1]
        bins = triton.next_power_of_2(padded)
        own = _tokens(bins)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        pieces = x.new_empty(tokens, 3 * padded) if ctx.needs_input_grad[1] else None
        gradients = (
            None if g is None else g.contiguous() for g in (dweight, dprobability, dsquared, dx_experts)
        )
        with torch.cuda.device_of(x):
            _backward[(triton.cdiv(tokens, own),)](
                probability, logsumexp, index, *gradients, weight_pieces, dx, pieces,
                tokens, ctx.experts, width, PADDED=padded, TOKENS=own, EXPERTS=bins, COLUMNS=_columns(bins),
            )  # fmt: skip
        dw = None
        if pieces is not None:
            high, middle, low = _wide_product(pieces.t(), x).view(3, padded, -1)
            dw = (high + (middle + low))[: ctx.experts].to(ctx.weight_dtype)
        return dx, dw


def _tokens(bins: int) -> int:
    return max(16, min(_TOKENS, _NUMBERS // bins))


def _columns(bins: int) -> int:
    return max(16, min(_COLUMNS, _WEIGHTS // bins))


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the fp32 product of bf16 matrices; every term is exact."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
