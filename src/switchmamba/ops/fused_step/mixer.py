# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles a sum of tuples, but no starred element)
"""Triton kernels of a decoding step through Mamba's mixer, up to its last product.

Of one row, a first kernel makes norm, in_proj, convolution and x_proj. Its programs have all of a few channels'
convolution, but only a part of x_proj's sum over channels; the second kernel, the state's, adds the parts up in a fixed
order. Of several rows each of these is a kernel of its own: norms made again by every program, and many parts to add,
take longer than launches.

Suffixes: B rows, D d_model, I d_inner, N d_state, W d_conv, R dt_rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from switchmamba.ops.fused_step.triton import (
    _begin,
    _norm,
    _product,
    launch_arguments,
    linear_step,
)
from switchmamba.ops.selective_scan.triton import _LOG2_E, _sigmoid_and_small, _step_size

_ONE_I = 16


@triton.jit
def _inward(
    x, weight, norm_weight, norm_bias, conv_weight, conv_bias, state, low_weight, u, z, parts, rows, channels, eps,
    columns: tl.constexpr, NORM: tl.constexpr, REACH: tl.constexpr, LOW: tl.constexpr, LOW_PADDED: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill u = silu(conv(x half)), z and a part of x_proj u for one row's BLOCK_I channels; move the state on."""
    row = tl.program_id(1) + tl.arange(0, 1)
    blocks = tl.cdiv(channels, BLOCK_I)
    part = tl.program_id(0) % blocks
    is_gate = tl.program_id(0) >= blocks
    channel = part * BLOCK_I + tl.arange(0, BLOCK_I)
    exists = channel < channels
    low = tl.arange(0, LOW_PADDED)
    # What no kernel of this step has written is read before the wait.
    held = state + tl.program_id(1).to(tl.int64) * (REACH * channels) + channel
    tap_weight = conv_weight + channel * (REACH + 1)
    older, tap_weights = (), ()
    for tap in tl.static_range(REACH):
        older = older + (tl.load(held + tap * channels, mask=exists, other=0.0),)
        tap_weights = tap_weights + (tl.load(tap_weight + tap, mask=exists, other=0.0).to(tl.float32),)
    newest_weight = tl.load(tap_weight + REACH, mask=exists, other=0.0).to(tl.float32)
    low_w = tl.load(
        low_weight + low[:, None] * channels + channel[None, :],
        mask=(low < LOW)[:, None] & exists[None, :],
        other=0.0,
    )
    sums = _product(
        x, weight, norm_weight, norm_bias, row, row < rows, channel + is_gate.to(tl.int32) * channels, exists, eps,
        columns, columns, NORM, 1, BLOCK_I, BLOCK_K, COLUMNS_PADDED, False, "ieee", PDL,
    )  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * channels + channel
    newest = tl.sum(sums, axis=0).to(u.dtype.element_ty)
    if is_gate:
        tl.store(z + place, newest, mask=exists)
    else:
        conv = newest.to(tl.float32) * newest_weight
        if conv_bias is not None:
            conv += tl.load(conv_bias + channel, mask=exists, other=0.0).to(tl.float32)
        for tap in tl.static_range(REACH):
            conv += older[tap].to(tl.float32) * tap_weights[tap]
            if tap > 0:
                tl.store(held + (tap - 1) * channels, older[tap], mask=exists)
        if REACH > 0:
            tl.store(held + (REACH - 1) * channels, newest.to(state.dtype.element_ty), mask=exists)
        gate, _small = _sigmoid_and_small(conv)
        u_i = (conv * gate).to(u.dtype.element_ty)
        tl.store(u + place, u_i, mask=exists)
        of_low = tl.sum(low_w.to(tl.float32) * u_i.to(tl.float32)[None, :], axis=1)
        tl.store(parts + (part * rows + tl.program_id(1)).to(tl.int64) * LOW + low, of_low, mask=low < LOW)


@triton.jit
def _convolution(
    x, weight, bias, state, y, rows, channels, x_row, REACH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, I) = silu(conv), and move the state (B, W-1, I) on by one input."""
    _begin(PDL)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = channel < channels
    exists = (row < rows) & inside
    newest = tl.load(x + row * x_row + channel, mask=exists, other=0.0)
    place = state + row * (REACH * channels) + channel
    tap_weight = weight + channel * (REACH + 1)
    sums = newest.to(tl.float32) * tl.load(tap_weight + REACH, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    held = ()
    for tap in tl.static_range(REACH):
        older = tl.load(place + tap * channels, mask=exists, other=0.0)
        sums += older.to(tl.float32) * tl.load(tap_weight + tap, mask=inside, other=0.0).to(tl.float32)
        held = held + (older,)
    for tap in tl.static_range(1, REACH):
        tl.store(place + (tap - 1) * channels, held[tap], mask=exists)
    if REACH > 0:
        tl.store(place + (REACH - 1) * channels, newest.to(state.dtype.element_ty), mask=exists)
    gate, _small = _sigmoid_and_small(sums)
    tl.store(y + row * channels + channel, (sums * gate).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _low(
    parts, row, rows, first, COUNT: tl.constexpr, PADDED: tl.constexpr, LOW: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):  # fmt: skip
    """Return COUNT outputs of x_proj from ``first`` on, of one row: the sum of the parts."""
    column = tl.arange(0, PADDED)
    if PARTS == 1:
        at = parts + row.to(tl.int64) * LOW + first + column
        value = tl.load(at, mask=column < COUNT, other=0.0).to(tl.float32)
    else:
        part = tl.arange(0, PARTS_PADDED)
        at = parts + (part[:, None] * rows + row).to(tl.int64) * LOW + first + column[None, :]
        exists = (part < PARTS)[:, None] & (column < COUNT)[None, :]
        value = tl.sum(tl.load(at, mask=exists, other=0.0).to(tl.float32), axis=0)
    return value


@triton.jit
def _selective(
    u, parts, z, dt_weight, dt_bias, A_log, D, state, y, rows, channels, z_row,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, N: tl.constexpr,
    N_PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y (B, I) and update the state (B, I, N) of one row's BLOCK channels; old state is read before the wait."""
    row = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    r, n = tl.arange(0, RANK_PADDED), tl.arange(0, N_PADDED)
    tile_exists = exists[:, None] & (n < N)[None, :]
    LOW: tl.constexpr = RANK + 2 * N
    held = state + (row.to(tl.int64) * channels + channel[:, None]) * N + n[None, :]
    dt_place, dt_exists = (
        dt_weight + channel[:, None] * RANK + r[None, :],
        exists[:, None] & (r < RANK)[None, :],
    )
    w = tl.load(dt_place, mask=dt_exists, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=exists, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=exists, other=0.0).to(tl.float32)
    A = tl.load(A_log + channel[:, None] * N + n[None, :], mask=tile_exists, other=0.0).to(tl.float32)
    h = tl.load(held, mask=tile_exists, other=0.0)
    _begin(PDL)
    dt_r = _low(parts, row, rows, 0, RANK, RANK_PADDED, LOW, PARTS, PARTS_PADDED)
    delta, _slope = _step_size(tl.sum(w * dt_r[None, :], axis=1) + bias, True)
    B = _low(parts, row, rows, RANK, N, N_PADDED, LOW, PARTS, PARTS_PADDED)
    C = _low(parts, row, rows, RANK + N, N, N_PADDED, LOW, PARTS, PARTS_PADDED)
    place = row.to(tl.int64) * channels + channel
    u_i = tl.load(u + place, mask=exists, other=0.0).to(tl.float32)
    z_i = tl.load(z + row.to(tl.int64) * z_row + channel, mask=exists, other=0.0).to(tl.float32)
    rate = -tl.exp2(A * _LOG2_E) * _LOG2_E
    h = tl.exp2(delta[:, None] * rate) * h + (delta * u_i)[:, None] * B[None, :]
    tl.store(held, h, mask=tile_exists)
    y_i = tl.sum(h * C[None, :], axis=1) + skip * u_i
    gate, _small = _sigmoid_and_small(z_i)
    tl.store(y + place, (y_i * z_i * gate).to(y.dtype.element_ty), mask=exists)


def inward_step_(
    x_BD: Tensor,
    norm: nn.Module,
    weight_OD: Tensor,
    conv_weight_IW: Tensor,
    conv_bias_I: Tensor | None,
    state_BWI: Tensor,
    low_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u = silu(conv(x half of in_proj norm(x))) and z, (B, I), and x_proj u in parts (P, B, R + 2N) fp32.

    ``weight_OD`` (2I, D) is in_proj's, ``low_weight`` (R + 2N, I) x_proj's. The state (B, W-1, I) is moved on in place.
    """
    x_BD = x_BD.contiguous()
    (rows, columns), (low, channels) = x_BD.shape, low_weight.shape
    if rows > 1:
        x_BI, z_BI = linear_step(x_BD, weight_OD, norm).chunk(2, dim=-1)
        u_BI = convolution_step_(state_BWI, x_BI, conv_weight_IW, conv_bias_I)
        return u_BI, z_BI, linear_step(u_BI, low_weight)[None]
    kind, norm_weight, norm_bias, eps = _norm(norm)
    block, blocks = _ONE_I, triton.cdiv(channels, _ONE_I)
    u_BI, z_BI = x_BD.new_empty(rows, channels), x_BD.new_empty(rows, channels)
    parts = x_BD.new_empty(blocks, rows, low, dtype=torch.float32)
    with torch.cuda.device_of(x_BD):
        _inward[(2 * blocks, rows)](
            x_BD, weight_OD, norm_weight, norm_bias, conv_weight_IW, conv_bias_I, state_BWI, low_weight, u_BI, z_BI,
            parts, rows, channels, eps, columns=columns, NORM=kind, REACH=conv_weight_IW.shape[1] - 1, LOW=low,
            LOW_PADDED=triton.next_power_of_2(low), BLOCK_I=block, BLOCK_K=min(512, triton.next_power_of_2(columns)),
            COLUMNS_PADDED=triton.next_power_of_2(columns), num_warps=4, **launch_arguments(x_BD.device, rows),
        )  # fmt: skip
    return u_BI, z_BI, parts


def convolution_step_(state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None) -> Tensor:
    """Return y (B, I), SiLU included; the state (B, W-1, I) is moved on in place."""
    rows, channels = x_BI.shape
    y_BI = torch.empty(rows, channels, dtype=x_BI.dtype, device=x_BI.device)
    rows_each = 1 if rows <= 256 else 8
    with torch.cuda.device_of(x_BI):
        _convolution[(triton.cdiv(channels, 128), triton.cdiv(rows, rows_each))](
            x_BI, weight_IW, bias_I, state_BWI, y_BI, rows, channels, x_BI.stride(0), REACH=weight_IW.shape[1] - 1,
            ROWS=rows_each, BLOCK=128, num_warps=4, **launch_arguments(x_BI.device, rows),
        )  # fmt: skip
    return y_BI


def selective_step_(
    state_BIN: Tensor,
    u_BI: Tensor,
    parts: Tensor,
    z_BI: Tensor,
    dt_weight_IR: Tensor,
    dt_bias_I: Tensor,
    A_log_IN: Tensor,
    D_I: Tensor,
) -> Tensor:
    """Return y (B, I) and update the state (B, I, N) in place; ``parts`` (P, B, R + 2N): Δ to be projected, B, C."""
    (rows, channels), states, rank = u_BI.shape, A_log_IN.shape[1], dt_weight_IR.shape[1]
    y_BI = torch.empty_like(u_BI)
    block = 32 if rows < 16 else 128
    with torch.cuda.device_of(u_BI):
        _selective[(triton.cdiv(channels, block), rows)](
            u_BI, parts, z_BI, dt_weight_IR, dt_bias_I, A_log_IN, D_I, state_BIN, y_BI, rows, channels, z_BI.stride(0),
            PARTS=len(parts), PARTS_PADDED=triton.next_power_of_2(len(parts)), RANK=rank,
            RANK_PADDED=triton.next_power_of_2(rank), N=states, N_PADDED=triton.next_power_of_2(states), BLOCK=block,
            num_warps=4, **launch_arguments(u_BI.device, rows),
        )  # fmt: skip
    return y_BI
