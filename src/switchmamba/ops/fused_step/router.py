# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Triton kernel of a decoding step's router: norm, logits in fp32, softmax and the choice, in one launch.

Suffixes: B rows, D d_model, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from switchmamba.ops.fused_step.triton import (
    _begin,
    _norm,
    _normed_piece,
    _statistics,
    launch_arguments,
)
from switchmamba.ops.selective_scan.triton import _LOG2_E

_DOT_ROWS = 256
"""Up to here a program has one row; with more of them it would read the router's weights too often."""


@triton.jit
def _route(
    x, weight, norm_weight, norm_bias, normed, index, scores, rows, experts, eps,
    columns: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr, COLUMNS_PADDED: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill normed = norm(x) (B, D), and index and scores (B, K) with each row's K most probable experts."""
    row, expert = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, EXPERTS_PADDED)
    _begin(PDL)
    row_exists, real = row < rows, expert < experts
    every = tl.arange(0, COLUMNS_PADDED)
    exists = row_exists[:, None] & (every < columns)[None, :]
    whole = tl.load(x + row[:, None] * columns + every[None, :], mask=exists, other=0.0).to(tl.float32)
    mean, scale = _statistics(whole, every < columns, columns, eps, NORM)
    logit = tl.zeros([BLOCK_B, EXPERTS_PADDED], tl.float32)
    of_middle, of_low = logit, logit  # sums of their own, which need not wait for each other
    for first in tl.range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(
            weight + expert[:, None] * columns + k[None, :],
            mask=real[:, None] & (k < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        v = _normed_piece(
            x, norm_weight, norm_bias, row, row_exists, mean, scale, first, columns, columns, NORM, BLOCK_K
        ).to(x.dtype.element_ty)
        place = normed + row[:, None] * columns + k[None, :]
        tl.store(place, v, mask=row_exists[:, None] & (k < columns)[None, :])
        if BLOCK_B == 1:
            logit += tl.sum(w * v.to(tl.float32), axis=1)[None, :]
        elif PIECES == 3:  # fp32 is the sum of three bf16, whose products with bf16 are exact
            high = w.to(tl.bfloat16)
            rest = w - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            of_low = tl.dot(v, tl.trans(low), of_low)
            of_middle = tl.dot(v, tl.trans(middle), of_middle)
            logit = tl.dot(v, tl.trans(high), logit)
        else:
            logit = tl.dot(v.to(tl.float32), tl.trans(w), logit, input_precision="tf32x3")
    logit = tl.where(real[None, :], logit + (of_middle + of_low), float("-inf"))
    probability = tl.exp2((logit - tl.max(logit, axis=1)[:, None]) * _LOG2_E)
    partition = tl.sum(probability, axis=1)
    probability = probability / partition[:, None]
    left, total = tl.where(real[None, :], probability, -1.0), tl.zeros([BLOCK_B], tl.float32)
    for _choice in tl.static_range(K):
        total += tl.max(left, axis=1)
        best = tl.minimum(tl.argmax(left, axis=1), experts - 1)  # of NaN, too, an expert that exists
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)
    left = tl.where(real[None, :], probability, -1.0)
    for choice in tl.static_range(K):
        best, score = tl.minimum(tl.argmax(left, axis=1), experts - 1), tl.max(left, axis=1)
        if K > 1:
            score = score / total
        score = tl.where(partition == partition, score, partition)  # NaN stays
        tl.store(index + row * K + choice, best.to(tl.int32), mask=row_exists)
        tl.store(scores + row * K + choice, score, mask=row_exists)
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)


def route_step(
    x_BD: Tensor,
    norm: nn.Module | None,
    weight_ED: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm(x) (B, D), the top_k experts of softmax(router norm(x)) (B·K,) int32, and their weights in fp32.

    Without a norm it is x.
    """
    x_BD = x_BD.contiguous()
    (rows, columns), experts = x_BD.shape, weight_ED.shape[0]
    normed_BD = torch.empty_like(x_BD)
    index = torch.empty(rows * top_k, dtype=torch.int32, device=x_BD.device)
    scores = torch.empty(rows * top_k, dtype=torch.float32, device=x_BD.device)
    kind, norm_weight, norm_bias, eps = _norm(norm)
    experts_padded = max(16, triton.next_power_of_2(experts))
    block_b, block_k, warps, stages = _tile(rows, x_BD.dtype, experts_padded)
    # Programmatic dependent launch for many rows as well: the experts' kernels, launched likewise, wait for this one.
    with torch.cuda.device_of(x_BD):
        _route[(triton.cdiv(rows, block_b),)](
            x_BD, weight_ED, norm_weight, norm_bias, normed_BD, index, scores, rows, experts, eps, columns=columns,
            NORM=kind, K=top_k, EXPERTS_PADDED=experts_padded, BLOCK_B=block_b,
            BLOCK_K=min(block_k, max(16, triton.next_power_of_2(columns))),
            COLUMNS_PADDED=triton.next_power_of_2(columns), PIECES=3 if x_BD.dtype == torch.bfloat16 else 1,
            num_warps=warps, num_stages=stages, **launch_arguments(x_BD.device, 1),
        )  # fmt: skip
    return normed_BD, index, scores


def _tile(rows: int, dtype: torch.dtype, experts_padded: int) -> tuple[int, int, int, int]:
    """Return rows and columns of a program, warps and stages; more experts leave shared memory for fewer columns."""
    if rows <= _DOT_ROWS:
        return 1, 128, 8, 3
    if dtype == torch.bfloat16:
        return 16, max(16, min(512, 32768 // experts_padded)), 8, 1
    return 16, 64, 8, 3
