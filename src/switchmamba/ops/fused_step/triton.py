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

_FEW_ROWS = 64
"""Up to here our product beats a library's; beyond, products are large enough to be bound by arithmetic."""

_SHORT_ROWS = 16
"""Up to here kernels are so short that setting up the next one shows."""


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel be set up, and wait for what the ones before have written.

    Programmatic dependent launch, on Hopper and later: half a microsecond less for each of a step's dozens of kernels.
    Every kernel waits, so that each sees the results of all before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


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


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_arguments(device: torch.device, rows: int) -> dict[str, bool]:
    """Return the arguments for programmatic dependent launch, where the device has it and it pays.

    In longer kernels the next one's programs would take room from those still to run.
    """
    if rows > _SHORT_ROWS or not _dependent_launch(device):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def _norm(norm: nn.Module | None) -> tuple[int, Tensor | None, Tensor | None, float]:
    """Return a norm's kind, weight, bias and eps."""
    if norm is None:
        return _NO_NORM, None, None, 0.0
    if isinstance(norm, nn.LayerNorm):
        return _LAYER_NORM, norm.weight, norm.bias, norm.eps
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    return _RMS_NORM, norm.weight, None, norm.eps


def product_precision(dtype: torch.dtype) -> str:
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
    residual_BO = None if residual_BO is None else residual_BO.contiguous()
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
    # Few outputs from many rows, a router's logits: a program per row; one for many rows would wait for its loads.
    single, wide = (
        rows == 1 or (rows <= 256 and outputs <= 64 and weight_OK.dtype == torch.float32),
        outputs >= 16384,
    )
    block_b = 1 if single else min(64, max(16, triton.next_power_of_2(rows)))
    block_o = (16 if wide or rows > 1 else 4) if single else ((128 if rows <= 16 else 64) if wide else 16)
    block_k = min(512 if single else 128, max(16, triton.next_power_of_2(columns)))
    if wide and not single:
        block_k = min(block_k, 64 if rows <= 16 else 128)
    with torch.cuda.device_of(x_BK):
        _linear[(triton.cdiv(outputs, block_o), triton.cdiv(rows, block_b))](
            x_BK, weight_OK, norm_weight, norm_bias, residual_BO, y_BO, rows, outputs, eps,
            x_BK.stride(0), outputs, columns=columns, NORM=kind, BLOCK_B=block_b, BLOCK_O=block_o, BLOCK_K=block_k,
            COLUMNS_PADDED=triton.next_power_of_2(columns), DOT=not single,
            PRECISION=product_precision(weight_OK.dtype), num_warps=4, **launch_arguments(x_BK.device, rows),
        )  # fmt: skip
    return y_BO


def norm_step(x_BD: Tensor, norm: nn.Module) -> Tensor:
    """Return norm(x), (B, D) in the dtype of x."""
    kind, norm_weight, norm_bias, eps = _norm(norm)
    (rows, columns), x_BD = x_BD.shape, x_BD.contiguous()
    y_BD = torch.empty(rows, columns, dtype=x_BD.dtype, device=x_BD.device)
    with torch.cuda.device_of(x_BD):
        _norm_rows[(rows,)](
            x_BD, norm_weight, norm_bias, y_BD, columns, eps, NORM=kind,
            COLUMNS_PADDED=triton.next_power_of_2(columns), num_warps=1 if columns <= 1024 else 8,
            **launch_arguments(x_BD.device, rows),
        )  # fmt: skip
    return y_BD


def argmax_step(x_BV: Tensor, index_B: Tensor | None = None) -> Tensor:
    """Return the first place of each row's maximum, (B,) int64, in ``index_B`` if given; rows without NaN."""
    if index_B is None:
        index_B = torch.empty(x_BV.shape[0], dtype=torch.int64, device=x_BV.device)
    with torch.cuda.device_of(x_BV):
        _largest[(x_BV.shape[0],)](
            x_BV,
            index_B,
            x_BV.shape[1],
            x_BV.stride(0),
            BLOCK=4096,
            num_warps=16,
            **launch_arguments(x_BV.device, x_BV.shape[0]),
        )
    return index_B


def causal_conv1d_step_(state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None) -> Tensor:
    """Return y (B, I), SiLU included; the state (B, W-1, I) is moved on in place."""
    rows, channels = x_BI.shape
    y_BI = torch.empty(rows, channels, dtype=x_BI.dtype, device=x_BI.device)
    with torch.cuda.device_of(x_BI):
        _convolution[(triton.cdiv(channels, 128), rows)](
            x_BI, weight_IW, bias_I, state_BWI, y_BI, channels, x_BI.stride(0), REACH=weight_IW.shape[1] - 1,
            BLOCK=128, num_warps=4, **launch_arguments(x_BI.device, rows),
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
    """Return y (B, I) and update the state (B, I, N) in place; ``low_rank`` (B, R + 2N): Δ to be projected, B, C."""
    (rows, channels), states, rank = x_BI.shape, A_log_IN.shape[1], dt_weight_IR.shape[1]
    y_BI = torch.empty_like(x_BI)
    block = 32 if rows < 16 else 128
    with torch.cuda.device_of(x_BI):
        _selective[(triton.cdiv(channels, block), rows)](
            x_BI, low_rank, z_BI, dt_weight_IR, dt_bias_I, A_log_IN, D_I, state_BIN, y_BI, channels,
            low_rank.stride(0), z_BI.stride(0), RANK=rank, RANK_PADDED=triton.next_power_of_2(rank), N=states,
            N_PADDED=triton.next_power_of_2(states), BLOCK=block, num_warps=4, **launch_arguments(x_BI.device, rows),
        )  # fmt: skip
    return y_BI
