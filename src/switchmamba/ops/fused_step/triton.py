# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Triton kernels of a decoding step: everything that one token per row passes through, in few launches.

At batch 1 a step reads tens of megabytes of weights in about 10 µs, and each launch costs 2 µs even in a CUDA graph.
So norms are computed again by every program that needs them, residuals are added where a product ends, and states are
written where they were read.

Suffixes: B rows, D d_model, I d_inner, N d_state, W d_conv, R dt_rank, E experts, F d_expert, K experts per token.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from switchmamba.ops.selective_scan.triton import _LOG2_E, _sigmoid_and_small, _step_size

_NO_NORM, _LAYER_NORM, _RMS_NORM = 0, 1, 2
_SELF, _RELU, _GELU, _SILU, _SWIGLU = range(5)
_ACTIVATIONS = {"relu": _RELU, "gelu": _GELU, "silu": _SILU, "swiglu": _SWIGLU}

_FEW_ROWS = 64
"""Up to here our product beats a library's; beyond, products are large enough to be bound by arithmetic."""

_DIRECT_ASSIGNMENTS = 16
"""Up to here each assignment gets programs of its own; beyond, an expert reads its weights once for its tokens."""

_ONE_F, _ONE_D, _ONE_WARPS = 4, 4, 1
_BLOCK_T = 32
_SELECTIVE = (64, 4)
_UP = {"BLOCK_F": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
_DOWN = {"BLOCK_D": 32, "BLOCK_F": 256, "num_warps": 4, "num_stages": 3}


@triton.jit
def _begin(PDL: tl.constexpr):
    """Wait for what earlier kernels have written; a short kernel lets the next one be set up at once.

    Programmatic dependent launch, on Hopper and later: a microsecond less for each of a step's dozens of kernels. Every
    kernel waits, so that each sees the results of all before it.
    """
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL != 0:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _end(PDL: tl.constexpr):
    """Let the next kernel be set up: in a long kernel it would take room from programs still to run before."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _statistics(x, inside, count, eps, NORM: tl.constexpr):
    """Return mean (0 for RMSNorm) and inverse deviation of the rows of x (rows, columns) over columns ``inside``."""
    if NORM == 1:
        mean = tl.sum(x, axis=1) / count
    else:
        mean = tl.sum(x, axis=1) * 0.0
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1) / count + eps)


@triton.jit
def _linear(
    x, weight, norm_weight, norm_bias, residual, y, rows, outputs, eps, x_row, y_row,
    columns: tl.constexpr, NORM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y = residual + norm(x) weightᵀ for BLOCK_B rows and BLOCK_O outputs."""
    _begin(PDL)
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_exists, output_exists = row < rows, output < outputs
    if NORM != 0:
        every = tl.arange(0, COLUMNS_PADDED)
        exists = row_exists[:, None] & (every < columns)[None, :]
        whole = tl.load(x + row[:, None] * x_row + every[None, :], mask=exists, other=0.0).to(tl.float32)
        mean, scale = _statistics(whole, every < columns, columns, eps, NORM)
    sums = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
    for first in tl.range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < columns
        w = tl.load(
            weight + output[:, None].to(tl.int64) * columns + k[None, :],
            mask=output_exists[:, None] & inside[None, :],
            other=0.0,
        )
        v = tl.load(
            x + row[:, None] * x_row + k[None, :], mask=row_exists[:, None] & inside[None, :], other=0.0
        )
        if NORM != 0:
            v = (v.to(tl.float32) - mean[:, None]) * scale[:, None]
            v = v * tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            if norm_bias is not None:
                v = v + tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        v = v.to(w.dtype)
        if DOT:
            sums = tl.dot(v, tl.trans(w), sums, input_precision=PRECISION)
        else:  # one row
            sums += tl.sum(w.to(tl.float32) * v.to(tl.float32), axis=1)[None, :]
    place = row[:, None] * y_row + output[None, :]
    exists = row_exists[:, None] & output_exists[None, :]
    if residual is not None:
        sums += tl.load(residual + row[:, None] * outputs + output[None, :], mask=exists, other=0.0).to(
            tl.float32
        )
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=exists)
    _end(PDL)


@triton.jit
def _convolution(
    x, weight, bias, state, y, channels, x_row, REACH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, I) = silu(conv), and move the state (B, W-1, I) on by one input."""
    _begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    newest = tl.load(x + row * x_row + channel, mask=exists, other=0.0)
    sums = newest.to(tl.float32) * tl.load(weight + channel * (REACH + 1) + REACH, mask=exists, other=0.0).to(
        tl.float32
    )
    if bias is not None:
        sums += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    place = state + row * REACH * channels + channel
    for tap in tl.static_range(REACH):
        older = tl.load(place + tap * channels, mask=exists, other=0.0)
        sums += older.to(tl.float32) * tl.load(
            weight + channel * (REACH + 1) + tap, mask=exists, other=0.0
        ).to(tl.float32)
        if tap > 0:
            tl.store(place + (tap - 1) * channels, older, mask=exists)
    if REACH > 0:
        tl.store(place + (REACH - 1) * channels, newest.to(state.dtype.element_ty), mask=exists)
    gate, _small = _sigmoid_and_small(sums)
    tl.store(y + row * channels + channel, (sums * gate).to(y.dtype.element_ty), mask=exists)
    _end(PDL)


@triton.jit
def _selective(
    x, low_rank, z, dt_weight, dt_bias, A_log, D, state, y, channels, low_rank_row, z_row,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, I) and update the state (B, I, N); ``low_rank`` (B, R + 2N) holds Δ before its projection, B and C."""
    _begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    low_rank += row * low_rank_row
    r, n = tl.arange(0, RANK_PADDED), tl.arange(0, N_PADDED)
    dt_r = tl.load(low_rank + r, mask=r < RANK, other=0.0).to(tl.float32)
    w = tl.load(
        dt_weight + channel[:, None] * RANK + r[None, :],
        mask=exists[:, None] & (r < RANK)[None, :],
        other=0.0,
    ).to(tl.float32)
    raw = tl.sum(w * dt_r[None, :], axis=1) + tl.load(dt_bias + channel, mask=exists, other=0.0).to(
        tl.float32
    )
    delta, _slope = _step_size(raw, True)
    B = tl.load(low_rank + RANK + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(low_rank + RANK + N + n, mask=n < N, other=0.0).to(tl.float32)
    tile_exists = exists[:, None] & (n < N)[None, :]
    A = -tl.exp2(
        tl.load(A_log + channel[:, None] * N + n[None, :], mask=tile_exists, other=0.0).to(tl.float32)
        * _LOG2_E
    )
    place = state + (row * channels + channel[:, None]) * N + n[None, :]
    h = tl.load(place, mask=tile_exists, other=0.0)
    x_i = tl.load(x + row * channels + channel, mask=exists, other=0.0).to(tl.float32)
    h = tl.exp2(delta[:, None] * A * _LOG2_E) * h + (delta * x_i)[:, None] * B[None, :]
    tl.store(place, h, mask=tile_exists)
    y_i = tl.sum(h * C[None, :], axis=1) + tl.load(D + channel, mask=exists, other=0.0).to(tl.float32) * x_i
    z_i = tl.load(z + row * z_row + channel, mask=exists, other=0.0).to(tl.float32)
    gate, _small = _sigmoid_and_small(z_i)
    tl.store(y + row * channels + channel, (y_i * z_i * gate).to(y.dtype.element_ty), mask=exists)
    _end(PDL)


@triton.jit
def _norm_rows(
    x, norm_weight, norm_bias, y, columns, eps, NORM: tl.constexpr, COLUMNS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y = norm(x) (B, D), a row a program."""
    _begin(PDL)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS_PADDED)
    inside = column < columns
    v = _normed(
        tl.load(x + row * columns + column, mask=inside, other=0.0), norm_weight, norm_bias, column, inside, columns,
        eps, NORM,
    )  # fmt: skip
    tl.store(y + row * columns + column, v.to(y.dtype.element_ty), mask=inside)
    _end(PDL)


@triton.jit
def _normed(x, norm_weight, norm_bias, column, inside, columns, eps, NORM: tl.constexpr):
    """Return norm(x) of one row in fp32."""
    v = x.to(tl.float32)
    mean, scale = _statistics(v[None, :], inside, columns, eps, NORM)
    v = (
        (v - tl.sum(mean))
        * tl.sum(scale)
        * tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    )
    if norm_bias is not None:
        v += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _chosen(logits, row, choice, experts, K: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    """Return the expert of one assignment and its weight; ties go to the lower index."""
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < experts
    logit = tl.load(logits + row * experts + expert, mask=real, other=float("-inf"))
    probability = tl.exp2((logit - tl.max(logit, axis=0)) * _LOG2_E)
    probability = probability / tl.sum(probability, axis=0)
    left = tl.where(real, probability, -1.0)
    total, best, score = 0.0, 0, 0.0
    for place in tl.static_range(K):
        largest, largest_at = tl.max(left, axis=0), tl.argmax(left, axis=0)
        best, score = tl.where(choice == place, largest_at, best), tl.where(choice == place, largest, score)
        total += largest
        left = tl.where(expert == largest_at, -1.0, left)
    if K > 1:
        score = score / total
    return best, score


@triton.jit
def _route(
    x, norm_weight, norm_bias, weight, normed, index, scores, rows, experts, eps,
    columns: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, EXPERTS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill normed = norm(x) (B, D), and index and scores (B, K) of each row's K most probable experts."""
    _begin(PDL)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    expert, every = tl.arange(0, EXPERTS_PADDED), tl.arange(0, COLUMNS_PADDED)
    row_exists, real = row < rows, expert < experts
    whole = tl.load(
        x + row[:, None] * columns + every[None, :],
        mask=row_exists[:, None] & (every < columns)[None, :],
        other=0.0,
    ).to(tl.float32)
    mean, scale = _statistics(whole, every < columns, columns, eps, NORM)
    logits = tl.zeros([BLOCK_B, EXPERTS_PADDED], tl.float32)
    for first in range(0, columns, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < columns
        exists = row_exists[:, None] & inside[None, :]
        v = tl.load(x + row[:, None] * columns + k[None, :], mask=exists, other=0.0).to(tl.float32)
        v = (v - mean[:, None]) * scale[:, None]
        v = v * tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            v = v + tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        narrow = v.to(normed.dtype.element_ty)
        tl.store(normed + row[:, None] * columns + k[None, :], narrow, mask=exists)
        w = tl.load(
            weight + expert[:, None] * columns + k[None, :], mask=real[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        logits = tl.dot(narrow.to(tl.float32), tl.trans(w), logits, input_precision="tf32x3")
    logits = tl.where(real[None, :], logits, float("-inf"))
    probability = tl.exp2((logits - tl.max(logits, axis=1)[:, None]) * _LOG2_E)
    probability = probability / tl.sum(probability, axis=1)[:, None]
    left, total = tl.where(real[None, :], probability, -1.0), tl.zeros([BLOCK_B], tl.float32)
    for _choice in tl.static_range(K):
        total += tl.max(left, axis=1)
        left = tl.where(expert[None, :] == tl.argmax(left, axis=1)[:, None], -1.0, left)
    left = tl.where(real[None, :], probability, -1.0)
    for choice in tl.static_range(K):
        best, score = tl.argmax(left, axis=1), tl.max(left, axis=1)
        if K > 1:
            score = score / total
        tl.store(index + row * K + choice, best.to(tl.int32), mask=row_exists)
        tl.store(scores + row * K + choice, score, mask=row_exists)
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)
    _end(PDL)


@triton.jit
def _lists(index, members, sizes, count, COUNT_PADDED: tl.constexpr, PDL: tl.constexpr):
    """Fill an expert's assignments ``members`` (E, B·K), in order, and their number ``sizes`` (E,)."""
    _begin(PDL)
    expert = tl.program_id(0)
    assignment = tl.arange(0, COUNT_PADDED)
    mine = tl.load(index + assignment, mask=assignment < count, other=-1) == expert
    place = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(members + expert * count + place, assignment, mask=mine)
    tl.store(sizes + expert, tl.sum(mine.to(tl.int32), axis=0))
    _end(PDL)


@triton.jit
def _largest(x, index, columns, x_row, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Fill index (B,) int64 with the first place of each row's maximum, a row a program."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < columns:
        v = tl.load(x + row * x_row + first + column, mask=first + column < columns, other=float("-inf")).to(
            tl.float32
        )
        place = tl.where(v > best, first + column, place)
        best = tl.maximum(best, v)
        first += BLOCK
    top = tl.max(best, axis=0)
    tl.store(index + row, tl.min(tl.where(best == top, place, columns), axis=0).to(tl.int64))
    _end(PDL)


@triton.jit
def _activate(value, KIND: tl.constexpr):
    if KIND == 1:
        result = tl.maximum(value, 0.0)
    elif KIND == 2:
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        gate, _small = _sigmoid_and_small(value)
        result = value * gate
    return result


@triton.jit
def _one_up(
    x, norm_weight, norm_bias, logits, w1, hidden, experts, eps,
    columns: tl.constexpr, d_expert: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr, COLUMNS_PADDED: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill hidden (B·K, F) = act(norm(x) w1ᵀ): BLOCK_F of one assignment."""
    _begin(PDL)
    assignment = tl.program_id(1)
    row = assignment // K
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    column = tl.arange(0, COLUMNS_PADDED)
    inside, tile_exists = column < columns, (f < d_expert)[:, None] & (column < columns)[None, :]
    x_d = tl.load(x + row * columns + column, mask=inside, other=0.0)
    expert, _score = _chosen(logits, row, assignment % K, experts, K, EXPERTS_PADDED)
    matrix_rows: tl.constexpr = d_expert * 2 if KIND == 4 else d_expert
    place = w1 + expert.to(tl.int64) * (matrix_rows * columns) + f[:, None] * columns + column[None, :]
    w = tl.load(place, mask=tile_exists, other=0.0)
    v = _normed(x_d, norm_weight, norm_bias, column, inside, columns, eps, NORM).to(w.dtype).to(tl.float32)
    value = tl.sum(w.to(tl.float32) * v[None, :], axis=1)
    if KIND == 4:
        up = tl.load(place + d_expert * columns, mask=tile_exists, other=0.0)
        value = _activate(value, KIND) * tl.sum(up.to(tl.float32) * v[None, :], axis=1)
    else:
        value = _activate(value, KIND)
    tl.store(hidden + assignment * d_expert + f, value.to(hidden.dtype.element_ty), mask=f < d_expert)
    _end(PDL)


@triton.jit
def _one_down(
    hidden, logits, w2, residual, y, experts,
    columns: tl.constexpr, d_expert: tl.constexpr, K: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, D) = residual + Σ_k score · hidden w2ᵀ: BLOCK_D of one row."""
    _begin(PDL)
    row = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_exists = d < columns
    y_d = tl.load(residual + row * columns + d, mask=d_exists, other=0.0).to(tl.float32)
    for choice in tl.static_range(K):
        expert, score = _chosen(logits, row, choice, experts, K, EXPERTS_PADDED)
        matrix = w2 + expert.to(tl.int64) * (columns * d_expert)
        sums = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        for first in tl.static_range(0, d_expert, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            w = tl.load(
                matrix + d[:, None] * d_expert + f[None, :],
                mask=d_exists[:, None] & (f < d_expert)[None, :],
                other=0.0,
            )
            v = tl.load(hidden + (row * K + choice) * d_expert + f, mask=f < d_expert, other=0.0)
            sums += w.to(tl.float32) * v.to(tl.float32)[None, :]
        y_d += score * tl.sum(sums, axis=1)
    tl.store(y + row * columns + d, y_d.to(y.dtype.element_ty), mask=d_exists)
    _end(PDL)


@triton.jit
def _experts_up(
    x, members, sizes, w1, hidden, count,
    columns: tl.constexpr, d_expert: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill hidden (B·K, F) = act(x w1ᵀ): BLOCK_F of one expert, for all its assignments."""
    _begin(PDL)
    expert = tl.program_id(1).to(tl.int64)
    number = tl.load(sizes + expert)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    f_exists = f < d_expert
    matrix_rows: tl.constexpr = d_expert * 2 if KIND == 4 else d_expert
    w1 += expert * matrix_rows * columns
    members += expert * count
    start = 0
    while start < number:
        slot = start + tl.arange(0, BLOCK_T)
        exists = slot < number
        assignment = tl.load(members + slot, mask=exists, other=0)
        sums = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        gates = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
        for first in range(0, columns, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            v = tl.load(
                x + (assignment // K)[:, None] * columns + k[None, :],
                mask=exists[:, None] & (k < columns)[None, :],
                other=0.0,
            )
            place = w1 + f[:, None] * columns + k[None, :]
            tile_exists = f_exists[:, None] & (k < columns)[None, :]
            if KIND == 4:
                gate = tl.load(place, mask=tile_exists, other=0.0)
                gates = tl.dot(v, tl.trans(gate), gates, input_precision=PRECISION)
                place += d_expert * columns
            w = tl.load(place, mask=tile_exists, other=0.0)
            sums = tl.dot(v, tl.trans(w), sums, input_precision=PRECISION)
        if KIND == 4:
            sums = _activate(gates, KIND) * sums
        else:
            sums = _activate(sums, KIND)
        place = hidden + assignment[:, None] * d_expert + f[None, :]
        tl.store(place, sums.to(hidden.dtype.element_ty), mask=exists[:, None] & f_exists[None, :])
        start += BLOCK_T
    _end(PDL)


@triton.jit
def _experts_down(
    hidden, members, sizes, scores, w2, residual, y, count,
    columns: tl.constexpr, d_expert: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B·K, D) = residual + score · hidden w2ᵀ: BLOCK_D of one expert; a residual only with K = 1."""
    _begin(PDL)
    expert = tl.program_id(1).to(tl.int64)
    number = tl.load(sizes + expert)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_exists = d < columns
    w2 += expert * columns * d_expert
    members += expert * count
    start = 0
    while start < number:
        slot = start + tl.arange(0, BLOCK_T)
        exists = slot < number
        assignment = tl.load(members + slot, mask=exists, other=0)
        sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first in range(0, d_expert, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            v = tl.load(
                hidden + assignment[:, None] * d_expert + f[None, :],
                mask=exists[:, None] & (f < d_expert)[None, :],
                other=0.0,
            )
            w = tl.load(
                w2 + d[:, None] * d_expert + f[None, :],
                mask=d_exists[:, None] & (f < d_expert)[None, :],
                other=0.0,
            )
            sums = tl.dot(v, tl.trans(w), sums, input_precision=PRECISION)
        sums *= tl.load(scores + assignment, mask=exists, other=0.0)[:, None]
        place = assignment[:, None] * columns + d[None, :]
        tile_exists = exists[:, None] & d_exists[None, :]
        if residual is not None:
            sums += tl.load(residual + place, mask=tile_exists, other=0.0).to(tl.float32)
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=tile_exists)
        start += BLOCK_T
    _end(PDL)


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(device: torch.device, rows: int) -> dict[str, int | bool]:
    """Return the arguments for programmatic dependent launch, where the device has it."""
    if not _dependent_launch(device):
        return {"PDL": 0}
    return {"PDL": 1 if rows <= _DIRECT_ASSIGNMENTS else 2, "launch_pdl": True}


def _norm(norm: nn.Module | None) -> tuple[int, Tensor | None, Tensor | None, float]:
    """Return a norm's kind, weight, bias and eps."""
    if norm is None:
        return _NO_NORM, None, None, 0.0
    if isinstance(norm, nn.LayerNorm):
        return _LAYER_NORM, norm.weight, norm.bias, norm.eps
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    return _RMS_NORM, norm.weight, None, norm.eps


def _precision(dtype: torch.dtype) -> str:
    """Return how ``tl.dot`` multiplies: fp32 as three tf32 products, which keeps fp32's accuracy on matrix units."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def linear_step(
    x_BK: Tensor,
    weight_OK: Tensor,
    norm: nn.Module | None = None,
    residual_BO: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return residual + norm(x) weightᵀ, (B, O), in ``dtype``, by default that of x."""
    (rows, columns), outputs = x_BK.shape, weight_OK.shape[0]
    if rows > 1 and norm is not None:
        x_BK, norm = norm_step(x_BK, norm), None
    if rows > _FEW_ROWS and outputs > 64:
        if outputs % 8:  # a copy of the weights costs less than a product whose rows are not aligned
            padded = weight_OK.new_empty(outputs + -outputs % 8, columns)
            padded[:outputs] = weight_OK
            weight_OK = padded
        x_BK = x_BK.to(weight_OK.dtype)
        if residual_BO is None:
            y_BO = (x_BK @ weight_OK.t())[:, :outputs]
        else:
            y_BO = torch.addmm(residual_BO, x_BK, weight_OK[:outputs].t())
        return y_BO if dtype is None else y_BO.to(dtype)
    kind, norm_weight, norm_bias, eps = _norm(norm)
    y_BO = torch.empty(rows, outputs, dtype=dtype or x_BK.dtype, device=x_BK.device)
    single, wide = rows == 1, outputs >= 16384
    block_b = 1 if single else min(64, max(16, triton.next_power_of_2(rows)))
    block_o = (16 if wide else 4) if single else ((128 if rows <= 16 else 64) if wide else 16)
    block_k = min(512 if single else 128, max(16, triton.next_power_of_2(columns)))
    if wide and not single:
        block_k = min(block_k, 64 if rows <= 16 else 128)
    with torch.cuda.device_of(x_BK):
        _linear[(triton.cdiv(outputs, block_o), triton.cdiv(rows, block_b))](
            x_BK, weight_OK, norm_weight, norm_bias, residual_BO, y_BO, rows, outputs, eps,
            x_BK.stride(0), outputs, columns=columns, NORM=kind, BLOCK_B=block_b, BLOCK_O=block_o, BLOCK_K=block_k,
            COLUMNS_PADDED=triton.next_power_of_2(columns), DOT=not single, PRECISION=_precision(weight_OK.dtype),
            num_warps=4, **_launch(x_BK.device, rows),
        )  # fmt: skip
    return y_BO


def norm_step(x_BD: Tensor, norm: nn.Module) -> Tensor:
    """Return norm(x), (B, D) in the dtype of x."""
    kind, norm_weight, norm_bias, eps = _norm(norm)
    rows, columns = x_BD.shape
    y_BD = torch.empty(rows, columns, dtype=x_BD.dtype, device=x_BD.device)
    with torch.cuda.device_of(x_BD):
        _norm_rows[(rows,)](
            x_BD, norm_weight, norm_bias, y_BD, columns, eps, NORM=kind,
            COLUMNS_PADDED=triton.next_power_of_2(columns), num_warps=1 if columns <= 1024 else 8,
            **_launch(x_BD.device, rows),
        )  # fmt: skip
    return y_BD


def argmax_step(x_BV: Tensor) -> Tensor:
    """Return the first place of each row's maximum, (B,) int64; rows without NaN."""
    index_B = torch.empty(x_BV.shape[0], dtype=torch.int64, device=x_BV.device)
    with torch.cuda.device_of(x_BV):
        _largest[(x_BV.shape[0],)](
            x_BV,
            index_B,
            x_BV.shape[1],
            x_BV.stride(0),
            BLOCK=4096,
            num_warps=16,
            **_launch(x_BV.device, x_BV.shape[0]),
        )
    return index_B


def causal_conv1d_step_(state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None) -> Tensor:
    """Return y (B, I), SiLU included; the state (B, W-1, I) is moved on in place."""
    rows, channels = x_BI.shape
    y_BI = torch.empty(rows, channels, dtype=x_BI.dtype, device=x_BI.device)
    with torch.cuda.device_of(x_BI):
        _convolution[(triton.cdiv(channels, 128), rows)](
            x_BI, weight_IW, bias_I, state_BWI, y_BI, channels, x_BI.stride(0), REACH=weight_IW.shape[1] - 1,
            BLOCK=128, num_warps=4, **_launch(x_BI.device, rows),
        )  # fmt: skip
    return y_BI


def selective_step_(
    state_BIN: Tensor,
    x_BI: Tensor,
    low_rank: Tensor,
    z_BI: Tensor,
    dt_weight_IR: Tensor,
    dt_bias_I: Tensor,
    A_log_IN: Tensor,
    D_I: Tensor,
) -> Tensor:
    """Return y (B, I); the state (B, I, N) is updated in place. ``low_rank`` (B, R + 2N): Δ to be projected, B, C."""
    (rows, channels), states, rank = x_BI.shape, A_log_IN.shape[1], dt_weight_IR.shape[1]
    y_BI = torch.empty_like(x_BI)
    block, warps = (32, 4) if rows < 16 else _SELECTIVE
    with torch.cuda.device_of(x_BI):
        _selective[(triton.cdiv(channels, block), rows)](
            x_BI, low_rank, z_BI, dt_weight_IR, dt_bias_I, A_log_IN, D_I, state_BIN, y_BI, channels,
            low_rank.stride(0), z_BI.stride(0), RANK=rank, RANK_PADDED=triton.next_power_of_2(rank), N=states,
            N_PADDED=triton.next_power_of_2(states), BLOCK=block, num_warps=warps, **_launch(x_BI.device, rows),
        )  # fmt: skip
    return y_BI


def experts_step(
    x_BD: Tensor,
    norm: nn.Module,
    router_weight_ED: Tensor,
    top_k: int,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    activation: str,
) -> Tensor:
    """Return x + Σ_k score_k · w2 act(w1 norm(x)) over the top_k experts of softmax(router norm(x)), (B, D).

    An expert's weights are read once if it has tokens, and not at all if it has none.
    """
    (rows, columns), (experts, _, d_expert) = x_BD.shape, w2_EDF.shape
    count, kind, launch = rows * top_k, _ACTIVATIONS[activation], _launch(x_BD.device, rows)
    experts_padded = triton.next_power_of_2(experts)
    hidden = x_BD.new_empty(count, d_expert)
    norm_kind, norm_weight, norm_bias, eps = _norm(norm)
    if count <= _DIRECT_ASSIGNMENTS:
        y_BD = torch.empty_like(x_BD)
        logits_BE = linear_step(x_BD, router_weight_ED, norm, dtype=torch.float32)
        with torch.cuda.device_of(x_BD):
            _one_up[(triton.cdiv(d_expert, _ONE_F), count)](
                x_BD, norm_weight, norm_bias, logits_BE, w1_EFD, hidden, experts, eps, columns=columns,
                d_expert=d_expert, NORM=norm_kind, K=top_k, KIND=kind, EXPERTS_PADDED=experts_padded,
                COLUMNS_PADDED=triton.next_power_of_2(columns), BLOCK_F=_ONE_F, num_warps=_ONE_WARPS, **launch,
            )  # fmt: skip
            _one_down[(triton.cdiv(columns, _ONE_D), rows)](
                hidden, logits_BE, w2_EDF, x_BD, y_BD, experts, columns=columns, d_expert=d_expert, K=top_k,
                EXPERTS_PADDED=experts_padded, BLOCK_D=_ONE_D, BLOCK_F=min(512, triton.next_power_of_2(d_expert)),
                num_warps=_ONE_WARPS, **launch,
            )  # fmt: skip
        return y_BD
    normed_BD = torch.empty_like(x_BD)
    index, members = (
        torch.empty(size, count, dtype=torch.int32, device=x_BD.device) for size in (1, experts)
    )
    sizes_E = torch.empty(experts, dtype=torch.int32, device=x_BD.device)
    scores = torch.empty(count, dtype=torch.float32, device=x_BD.device)
    y = x_BD.new_empty(count, columns)
    block_t, precision = (16 if count < 8 * experts else _BLOCK_T), _precision(w1_EFD.dtype)
    with torch.cuda.device_of(x_BD):
        _route[(triton.cdiv(rows, 16),)](
            x_BD, norm_weight, norm_bias, router_weight_ED, normed_BD, index, scores, rows, experts, eps,
            columns=columns, NORM=norm_kind, K=top_k, BLOCK_B=16, BLOCK_K=128 if experts_padded <= 64 else 32,
            COLUMNS_PADDED=triton.next_power_of_2(columns), EXPERTS_PADDED=max(16, experts_padded), num_warps=4,
            num_stages=2, **launch,
        )  # fmt: skip
        _lists[(experts,)](
            index, members, sizes_E, count, COUNT_PADDED=triton.next_power_of_2(count), num_warps=4, **launch
        )
        _experts_up[(triton.cdiv(d_expert, _UP["BLOCK_F"]), experts)](
            normed_BD, members, sizes_E, w1_EFD, hidden, count, columns=columns, d_expert=d_expert, K=top_k,
            KIND=kind, BLOCK_T=block_t, PRECISION=precision, **_UP, **launch,
        )  # fmt: skip
        _experts_down[(triton.cdiv(columns, _DOWN["BLOCK_D"]), experts)](
            hidden, members, sizes_E, scores, w2_EDF, x_BD if top_k == 1 else None, y, count, columns=columns,
            d_expert=d_expert, BLOCK_T=block_t, PRECISION=precision, **_DOWN, **launch,
        )  # fmt: skip
    if top_k == 1:
        return y
    return x_BD + y.view(rows, top_k, columns).sum(1)
