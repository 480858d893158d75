# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The Switch router on a GPU: bf16 matrix products that are exact to fp32, and one kernel per pass around them.

x is bf16, so x·w is exact to fp32 if w is written as a sum of three bf16 numbers, w = hi + mid + lo: one product with
three times as many columns, on the matrix units, instead of an fp32 product without them. The gradient of the logits is
split the same way. Every program writes its share of the sums to a slab, and the slabs are summed afterwards: no
atomics, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TOKENS = 32


@triton.jit
def _split(value):
    """Return three bf16 numbers whose sum is the fp32 value, the largest first."""
    high = value.to(tl.bfloat16)
    value -= high.to(tl.float32)
    middle = value.to(tl.bfloat16)
    return high, middle, (value - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_weight(weight, pieces, experts, width, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Fill pieces (6, PADDED, D): hi, mid, lo for the logits; hi, hi, mid for the gradient of x. Zeros behind E."""
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
        tl.store(place + 3 * PADDED * width, high, mask=column < width)
        tl.store(place + 4 * PADDED * width, high, mask=column < width)
        tl.store(place + 5 * PADDED * width, middle, mask=column < width)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    products, probability, logsumexp, index, weight, sums, counts, tokens, experts, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Fill probability (T, PADDED), logsumexp, index and weight (T,), and slabs of sums (programs, E + 2) and counts.

    ``products`` (T, 3, PADDED) are x times hi, mid and lo. The last two sums are of logsumexp² and of the entropy.
    """
    program = tl.program_id(0)
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    there = (token < tokens)[:, None] & (expert < experts)[None, :]
    stored = (token < tokens)[:, None] & (expert < PADDED)[None, :]
    place = products + token[:, None] * (3 * PADDED) + expert[None, :]
    z = tl.load(place + PADDED, mask=stored, other=0.0) + tl.load(place + 2 * PADDED, mask=stored, other=0.0)
    z += tl.load(place, mask=stored, other=0.0)
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


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    probability, logsumexp, index, dweight, dprobability_sum, dsquared_sum, pieces, tokens, experts,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Fill pieces (T, 4, PADDED): the gradient of the logits as hi, mid, hi, lo. A gradient may be None."""
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
    place = pieces + token[:, None] * (4 * PADDED) + expert[None, :]
    tl.store(place, high, mask=stored)
    tl.store(place + PADDED, middle, mask=stored)
    tl.store(place + 2 * PADDED, high, mask=stored)
    tl.store(place + 3 * PADDED, low, mask=stored)


def switch_router(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
    """Return index, weight and the sums; x is bf16."""
    results: tuple[Tensor, ...] = _SwitchRouter.apply(x_TD.contiguous(), weight_ED.contiguous())
    return results


class _SwitchRouter(torch.autograd.Function):
    """(index, weight, Σp, Σlse², Σentropy, counts) from x (T, D) and weight (E, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        (tokens, width), experts = x.shape, weight.shape[0]
        padded, programs = triton.cdiv(experts, 16) * 16, triton.cdiv(tokens, _TOKENS)
        pieces = x.new_empty(6, padded, width)
        probability = x.new_empty(tokens, padded, dtype=torch.float32)
        logsumexp, chosen_weight = x.new_empty(2, tokens, dtype=torch.float32)
        index = x.new_empty(tokens, 1, dtype=torch.int64)
        sums = x.new_empty(programs, experts + 2, dtype=torch.float32)
        counts = x.new_empty(programs, experts, dtype=torch.int32)
        with torch.cuda.device_of(x):
            _split_weight[(padded,)](
                weight, pieces, experts, width, PADDED=padded, BLOCK=triton.cdiv(width, 1024) * 1024
            )
            products = _wide_product(x, pieces[:3].flatten(0, 1).t())
            _forward[(programs,)](
                products, probability, logsumexp, index, chosen_weight, sums, counts, tokens, experts,
                PADDED=padded, TOKENS=_TOKENS, EXPERTS=triton.next_power_of_2(padded),
            )  # fmt: skip
        sums, counts = sums.sum(0), counts.sum(0)
        ctx.save_for_backward(x, pieces[3:], probability, logsumexp, index)
        ctx.experts, ctx.weight_dtype = experts, weight.dtype
        ctx.mark_non_differentiable(index, counts, entropy := sums[experts + 1].clone())
        ctx.set_materialize_grads(False)
        return index, chosen_weight[:, None], sums[:experts].clone(), sums[experts].clone(), entropy, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _index: Any,
        dweight: Tensor | None,
        dprobability: Tensor | None,
        dsquared: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight_pieces, probability, logsumexp, index = ctx.saved_tensors
        (tokens, padded), experts = probability.shape, ctx.experts
        pieces = x.new_empty(tokens, 4 * padded)
        with torch.cuda.device_of(x):
            _backward[(triton.cdiv(tokens, _TOKENS),)](
                probability, logsumexp, index,
                *(None if g is None else g.contiguous() for g in (dweight, dprobability, dsquared)),
                pieces, tokens, experts,
                PADDED=padded, TOKENS=_TOKENS, EXPERTS=triton.next_power_of_2(padded),
            )  # fmt: skip
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(pieces[:, : 3 * padded], weight_pieces.flatten(0, 1))
        if ctx.needs_input_grad[1]:
            high, middle, _, low = _wide_product(pieces.t(), x).view(4, padded, -1)
            dw = (high + (middle + low))[:experts].to(ctx.weight_dtype)
        return dx, dw


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the fp32 product of bf16 matrices; every term is exact."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
