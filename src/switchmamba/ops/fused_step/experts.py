# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles a sum of tuples, but no starred element)
"""Triton kernels of a decoding step through experts: norm, router, the chosen experts, residual.

Few assignments have programs of their own, which find their expert from the router's logits. With more of them a list
per expert is made first, and an expert's weights are read once for all its tokens.

Suffixes: B rows, D d_model, O outputs, E experts, F d_expert, K experts per token.
"""

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from switchmamba.ops.fused_step import experts_cuda
from switchmamba.ops.fused_step.router import route_step
from switchmamba.ops.fused_step.triton import (
    _begin,
    _norm,
    _normed,
    launch_arguments,
    linear_step,
    product_precision,
)
from switchmamba.ops.selective_scan.triton import _LOG2_E, _sigmoid_and_small

logger = logging.getLogger("switchmamba")

_ACTIVATIONS = experts_cuda.KINDS

_DIRECT_ASSIGNMENTS = 16
"""Up to here each assignment gets programs of its own; beyond, an expert reads its weights once for its tokens."""

_ONE_F, _ONE_D, _ONE_WARPS = 4, 4, 1
_UP = {"BLOCK_F": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
_DOWN = {"BLOCK_D": 32, "BLOCK_F": 256, "num_warps": 4, "num_stages": 3}
_BLOCK_T = 32


@triton.jit
def _chosen(logits, row, choice, experts, K: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    """Return the expert of one assignment and its weight; ties go to the lower index."""
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < experts
    logit = tl.load(logits + row * experts + expert, mask=real, other=float("-inf"))
    probability = tl.exp2((logit - tl.max(logit, axis=0)) * _LOG2_E)
    partition = tl.sum(probability, axis=0)
    probability = probability / partition
    left = tl.where(real, probability, -1.0)
    total, best, score = 0.0, 0, 0.0
    for place in tl.static_range(K):
        largest = tl.max(left, axis=0)
        largest_at = tl.minimum(tl.argmax(left, axis=0), experts - 1)  # of NaN, too, an expert that exists
        best, score = tl.where(choice == place, largest_at, best), tl.where(choice == place, largest, score)
        total += largest
        left = tl.where(expert == largest_at, -1.0, left)
    if K > 1:
        score = score / total
    return best, tl.where(partition == partition, score, partition)  # NaN stays


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
    """Fill hidden (B·K, F) = act(norm(x) w1ᵀ): BLOCK_F of one assignment. The kernel before wrote the logits, not x."""
    assignment = tl.program_id(1)
    row = assignment // K
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    column = tl.arange(0, COLUMNS_PADDED)
    inside, tile_exists = column < columns, (f < d_expert)[:, None] & (column < columns)[None, :]
    x_d = tl.load(x + row * columns + column, mask=inside, other=0.0)
    v = _normed(x_d, norm_weight, norm_bias, column, inside, columns, eps, NORM).to(w1.dtype.element_ty)
    v = v.to(tl.float32)
    _begin(PDL)
    expert, _score = _chosen(logits, row, assignment % K, experts, K, EXPERTS_PADDED)
    matrix_rows: tl.constexpr = d_expert * 2 if KIND == 4 else d_expert
    place = w1 + expert.to(tl.int64) * (matrix_rows * columns) + f[:, None] * columns + column[None, :]
    w = tl.load(place, mask=tile_exists, other=0.0)
    value = tl.sum(w.to(tl.float32) * v[None, :], axis=1)
    if KIND == 4:
        up = tl.load(place + d_expert * columns, mask=tile_exists, other=0.0)
        value = _activate(value, KIND) * tl.sum(up.to(tl.float32) * v[None, :], axis=1)
    else:
        value = _activate(value, KIND)
    tl.store(hidden + assignment * d_expert + f, value.to(hidden.dtype.element_ty), mask=f < d_expert)


@triton.jit
def _one_down(
    hidden, logits, w2, residual, y, experts,
    columns: tl.constexpr, d_expert: tl.constexpr, K: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, O) = residual + Σ_k score · hidden w2ᵀ: BLOCK_D of one row. The kernel before wrote hidden alone."""
    row = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_exists = d < columns
    y_d = tl.zeros([BLOCK_D], tl.float32)
    if residual is not None:
        y_d = tl.load(residual + row * columns + d, mask=d_exists, other=0.0).to(tl.float32)
    for choice in tl.static_range(K):
        expert, score = _chosen(logits, row, choice, experts, K, EXPERTS_PADDED)
        matrix = w2 + expert.to(tl.int64) * (columns * d_expert)
        weights = ()
        for first in tl.static_range(0, d_expert, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            place = matrix + d[:, None] * d_expert + f[None, :]
            weights = weights + (tl.load(place, mask=d_exists[:, None] & (f < d_expert)[None, :], other=0.0),)
        if choice == 0:
            _begin(PDL)
        sums = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
        for piece in tl.static_range(len(weights)):
            f = piece * BLOCK_F + tl.arange(0, BLOCK_F)
            v = tl.load(hidden + (row * K + choice) * d_expert + f, mask=f < d_expert, other=0.0)
            sums += weights[piece].to(tl.float32) * v.to(tl.float32)[None, :]
        y_d += score * tl.sum(sums, axis=1)
    tl.store(y + row * columns + d, y_d.to(y.dtype.element_ty), mask=d_exists)


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


@triton.jit
def _experts_down(
    hidden, members, sizes, scores, w2, residual, y, count,
    columns: tl.constexpr, d_expert: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B·K, O) = residual + score · hidden w2ᵀ: BLOCK_D of one expert; a residual only with K = 1."""
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


def experts_step(
    x_BD: Tensor,
    norm: nn.Module | None,
    router_weight_ED: Tensor,
    top_k: int,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    activation: str,
    residual: bool = True,
) -> Tensor:
    """Return x + Σ_k score_k · w2 act(w1 norm(x)) over the top_k experts of softmax(router norm(x)), (B, O).

    Without ``residual`` it is the sum alone, and O may differ from D. An expert's weights are read once if it has
    tokens, and not at all if it has none.
    """
    x_BD = x_BD.contiguous()
    (rows, columns), (experts, outputs, d_expert) = x_BD.shape, w2_EOF.shape
    count, kind, launch = rows * top_k, _ACTIVATIONS[activation], launch_arguments(x_BD.device, rows)
    experts_padded = triton.next_power_of_2(experts)
    if count <= _DIRECT_ASSIGNMENTS:
        norm_kind, norm_weight, norm_bias, eps = _norm(norm)
        hidden = x_BD.new_empty(count, d_expert)
        y_BO = x_BD.new_empty(rows, outputs)
        logits_BE = linear_step(x_BD, router_weight_ED, norm, dtype=torch.float32)
        with torch.cuda.device_of(x_BD):
            _one_up[(triton.cdiv(d_expert, _ONE_F), count)](
                x_BD, norm_weight, norm_bias, logits_BE, w1_EFD, hidden, experts, eps, columns=columns,
                d_expert=d_expert, NORM=norm_kind, K=top_k, KIND=kind, EXPERTS_PADDED=experts_padded,
                COLUMNS_PADDED=triton.next_power_of_2(columns), BLOCK_F=_ONE_F, num_warps=_ONE_WARPS, **launch,
            )  # fmt: skip
            _one_down[(triton.cdiv(outputs, _ONE_D), rows)](
                hidden, logits_BE, w2_EOF, x_BD if residual else None, y_BO, experts, columns=outputs,
                d_expert=d_expert, K=top_k,
                EXPERTS_PADDED=experts_padded, BLOCK_D=_ONE_D, BLOCK_F=min(512, triton.next_power_of_2(d_expert)),
                num_warps=_ONE_WARPS, **launch,
            )  # fmt: skip
        return y_BO
    normed_BD, index, scores = route_step(x_BD, norm, router_weight_ED, top_k)
    added_BD = x_BD if residual and top_k == 1 else None
    reason = experts_cuda.unavailable(x_BD, w1_EFD, w2_EOF, top_k)
    if reason is None:
        y = experts_cuda.experts_products(normed_BD, index, scores, w1_EFD, w2_EOF, added_BD, activation)
    else:
        _say_once(reason)
        y = _experts_products(normed_BD, index, scores, w1_EFD, w2_EOF, added_BD, activation)
    if top_k > 1:
        y = y.view(rows, top_k, outputs).sum(1)
        y = x_BD + y if residual else y
    return y


@functools.cache
def _say_once(reason: str) -> None:
    logger.info("decoding: the experts' products run in Triton, not in CUDA C++: %s", reason)


def _experts_products(
    normed_BD: Tensor,
    index: Tensor,
    scores: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    residual_BO: Tensor | None,
    activation: str,
) -> Tensor:
    """Return residual + score · w2 act(w1 x) of each assignment, (B·K, O); a residual only with K = 1."""
    (rows, columns), (experts, outputs, d_expert), count = normed_BD.shape, w2_EOF.shape, len(index)
    top_k, launch = count // rows, launch_arguments(normed_BD.device, rows)
    hidden, y = normed_BD.new_empty(count, d_expert), normed_BD.new_empty(count, outputs)
    members = torch.empty(experts, count, dtype=torch.int32, device=normed_BD.device)
    sizes_E = torch.empty(experts, dtype=torch.int32, device=normed_BD.device)
    block_t, precision = (16 if count < 8 * experts else _BLOCK_T), product_precision(w1_EFD.dtype)
    with torch.cuda.device_of(normed_BD):
        _lists[(experts,)](
            index, members, sizes_E, count, COUNT_PADDED=triton.next_power_of_2(count), num_warps=4, **launch
        )
        _experts_up[(triton.cdiv(d_expert, _UP["BLOCK_F"]), experts)](
            normed_BD, members, sizes_E, w1_EFD, hidden, count, columns=columns, d_expert=d_expert, K=top_k,
            KIND=_ACTIVATIONS[activation], BLOCK_T=block_t, PRECISION=precision, **_UP, **launch,
        )  # fmt: skip
        _experts_down[(triton.cdiv(outputs, _DOWN["BLOCK_D"]), experts)](
            hidden, members, sizes_E, scores, w2_EOF, residual_BO, y, count, columns=outputs,
            d_expert=d_expert, BLOCK_T=block_t, PRECISION=precision, **_DOWN, **launch,
        )  # fmt: skip
    return y
