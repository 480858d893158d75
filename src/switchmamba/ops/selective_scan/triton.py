# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles a sum of tuples, but no starred element)
"""Selective scan on a GPU: Triton kernels behind torch's autograd (Mamba §3.2, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

A program is one warp: it owns a row of the batch and a block of channels of one group, keeps their states in
registers and walks through time. Where a block is narrower than a warp, the states of a channel are spread over
lanes. Nothing of size (B, L, I, N) exists.

Time runs in chunks of ``_STEPS`` unrolled steps. When gradients are wanted, the forward pass stores the fp32 state
that enters each chunk. The backward pass takes the chunks last first: it recomputes the chunk's states into registers
and walks back with g_t = ∂loss/∂(C_t h_t + D x_t) and λ_t = ∂loss/∂h_t = C_t g_t + exp(Δ_{t+1} A) λ_{t+1}:

    ∂B_t = Σ λ_t Δ_t x_t    ∂C_t = Σ h_t g_t    ∂(Δ_t A) = λ_t exp(Δ_t A) h_{t-1}    ∂(Δ_t x_t) = Σ_n λ_t B_t

∂B and ∂C sum over channels: every program writes its share to a slab, and the slabs are summed afterwards. There are
no atomics, so results repeat bit for bit. Long sequences of few rows and channels leave most of a GPU idle.

In memory a state is "paired", (…, P/2, N, 2): two neighbouring channels together, each group's channels filled up to a
multiple of 32, P in all. From this Triton gives a thread of the backward pass two channels, which it can then load and
store as one.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_SOFTPLUS_THRESHOLD = tl.constexpr(20.0)

_STEPS = 8
"""Steps of a chunk: their states fill the registers of the backward pass."""

_ENOUGH_WARPS = 1024
"""Programs below which blocks are made narrower: two for each of a large GPU's schedulers."""

_WIDEST = 32
"""Channels of the widest block."""


@triton.jit
def _sigmoid_and_small(x):
    """Return sigmoid(x) and exp(-|x|), from which it comes without overflow."""
    small = tl.exp2(-tl.abs(x) * _LOG2_E)
    larger = 1.0 / (1.0 + small)
    return tl.where(x >= 0.0, larger, small * larger), small


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x in [0, 1] with a small relative error: 2 artanh(x / (2 + x)) as a series."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """Return Δ and its slope: softplus of the raw value (as torch's, linear above 20), or the value itself."""
    if SOFTPLUS:
        slope, small = _sigmoid_and_small(raw)
        delta = tl.where(raw > _SOFTPLUS_THRESHOLD, raw, tl.maximum(raw, 0.0) + _log1p(small))
        slope = tl.where(raw > _SOFTPLUS_THRESHOLD, 1.0, slope)
    else:
        delta, slope = raw, raw * 0.0 + 1.0
    return delta, slope


@triton.jit
def _load_vector(vector, channel, exists):
    """Load a value per channel in fp32; zeros where there is no vector."""
    if vector is None:
        value = tl.zeros(channel.shape, tl.float32)
    else:
        value = tl.load(vector + channel, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit
def _place(
    blocks_per_group, groups, width, padded, N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the program's row, group, block and channels, which of these exist, and a tile's places in a state."""
    program = tl.program_id(0)
    blocks = blocks_per_group * groups
    row, block = (program // blocks).to(tl.int64), program % blocks
    group = block // blocks_per_group
    within = (block % blocks_per_group) * BLOCK + tl.arange(0, BLOCK)
    slot = group * padded + within
    tile = tl.arange(0, N_PADDED)[:, None] * 2 + (slot // 2 * (2 * N) + slot % 2)[None, :]
    return row, group, block, group * width + within, within < width, tile


# One compilation serves all lengths, so pieces repeat the bits of the whole; and vectors of A would spread channels.
@triton.jit(
    do_not_specialize=["length", "num_chunks"],
    do_not_specialize_on_alignment=["A", "initial_state", "final_state", "checkpoints"],
)
def _forward(
    x, dt, z, B, C, A, D, dt_bias, initial_state, starts, y, final_state, checkpoints,
    length, num_chunks, groups, width, padded, blocks_per_group,
    x_row, x_time, dt_row, dt_time, z_row, z_time,
    N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Fill y (B, L, I), final_state and, unless None, checkpoints (B, num_chunks, paired)."""
    row, group, _block, channel, exists, tile = _place(
        blocks_per_group, groups, width, padded, N, N_PADDED, BLOCK
    )
    channels, state_size = groups * width, N * groups * padded
    n = tl.arange(0, N_PADDED)
    tile_exists = (n < N)[:, None] & exists[None, :]
    rate = tl.load(A + tile, mask=tile_exists, other=0.0) * _LOG2_E
    skip, bias = _load_vector(D, channel, exists), _load_vector(dt_bias, channel, exists)
    if initial_state is None:
        h = tl.zeros([N_PADDED, BLOCK], tl.float32)
    else:
        h = tl.load(initial_state + row * state_size + tile, mask=tile_exists, other=0.0)

    x += row * x_row
    dt += row * dt_row
    if z is not None:
        z += row * z_row
    y += row * length * channels
    B += (row * length * groups + group) * N
    C += (row * length * groups + group) * N
    if checkpoints is not None:
        checkpoints += row * num_chunks * state_size
    if starts is not None:
        starts += row * length

    first = 0
    while first < length:  # not range: Triton's interpreter cannot turn its numbers into Python's
        if checkpoints is not None:
            tl.store(checkpoints + tile, h, mask=tile_exists)
            checkpoints += state_size
        outputs = ()
        for step in tl.static_range(STEPS):
            inside = first + step < length  # beyond the end Δ = 0: the state stays
            x_t = tl.load(x + step * x_time + channel, mask=exists & inside, other=0.0).to(tl.float32)
            raw = (
                tl.load(dt + step * dt_time + channel, mask=exists & inside, other=0.0).to(tl.float32) + bias
            )
            delta, _ = _step_size(raw, SOFTPLUS)
            delta = tl.where(inside, delta, 0.0)
            B_t = tl.load(B + step * groups * N + n, mask=(n < N) & inside, other=0.0)
            C_t = tl.load(C + step * groups * N + n, mask=(n < N) & inside, other=0.0)
            if starts is not None:
                h = tl.where(tl.load(starts + step, mask=inside, other=0) != 0, 0.0, h)
            h = tl.exp2(delta[None, :] * rate) * h + (delta * x_t)[None, :] * B_t[:, None]
            y_t = tl.sum(h * C_t[:, None], axis=0) + skip * x_t
            if z is not None:
                z_t = tl.load(z + step * z_time + channel, mask=exists & inside, other=0.0).to(tl.float32)
                gate, _ = _sigmoid_and_small(z_t)
                y_t = y_t * (z_t * gate)
            outputs = outputs + (y_t,)
        # Stores come after all of the chunk's loads: the compiler moves no load ahead of an earlier store.
        for step in tl.static_range(STEPS):
            y_t = outputs[step].to(y.dtype.element_ty)
            tl.store(y + step * channels + channel, y_t, mask=exists & (first + step < length))
        x += STEPS * x_time
        dt += STEPS * dt_time
        if z is not None:
            z += STEPS * z_time
        y += STEPS * channels
        B += STEPS * groups * N
        C += STEPS * groups * N
        if starts is not None:
            starts += STEPS
        first += STEPS
    tl.store(final_state + row * state_size + tile, h, mask=tile_exists)


@triton.jit(do_not_specialize=["rows", "length", "num_chunks"])
def _backward(
    x, dt, z, B, C, A, D, dt_bias, starts, checkpoints, dy, dfinal,
    dx, ddt, dz, dB, dC, dA, dD, ddt_bias, dinitial,
    rows, length, num_chunks, groups, width, padded, blocks_per_group,
    x_row, x_time, dt_row, dt_time, z_row, z_time,
    N: tl.constexpr, N_PADDED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Fill the gradients.

    Shapes: dy, dx, ddt, dz (B, L, I), dz None without a gate; dB, dC (blocks, B, L, N) with the blocks of a group still
    to be summed; dA (B, paired), dD, ddt_bias (B, I) with the rows still to be summed; dfinal, dinitial (B, paired).
    """
    row, group, block, channel, exists, tile = _place(
        blocks_per_group, groups, width, padded, N, N_PADDED, BLOCK
    )
    channels, state_size = groups * width, N * groups * padded
    n = tl.arange(0, N_PADDED)
    tile_exists = (n < N)[:, None] & exists[None, :]
    rate = tl.load(A + tile, mask=tile_exists, other=0.0) * _LOG2_E
    skip, bias = _load_vector(D, channel, exists), _load_vector(dt_bias, channel, exists)
    carry = tl.load(
        dfinal + row * state_size + tile, mask=tile_exists, other=0.0
    )  # into h_t from later steps
    dA_sum = tl.zeros([N_PADDED, BLOCK], tl.float32)
    dD_sum = tl.zeros([BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)

    last = tl.cast(num_chunks - 1, tl.int64)
    begin = row * length + last * STEPS
    x += row * x_row + last * STEPS * x_time
    dt += row * dt_row + last * STEPS * dt_time
    if z is not None:
        z += row * z_row + last * STEPS * z_time
        dz += begin * channels
    dy += begin * channels
    dx += begin * channels
    ddt += begin * channels
    B += (begin * groups + group) * N
    C += (begin * groups + group) * N
    dB += (tl.cast(block, tl.int64) * rows * length + begin) * N
    dC += (tl.cast(block, tl.int64) * rows * length + begin) * N
    checkpoints += (row * num_chunks + last) * state_size
    if starts is not None:
        starts += begin

    first = (num_chunks - 1) * STEPS
    while first >= 0:
        h = tl.load(checkpoints + tile, mask=tile_exists, other=0.0)
        states, inputs, deltas, slopes = (h,), (), (), ()
        for step in tl.static_range(STEPS):
            inside = first + step < length
            x_t = tl.load(x + step * x_time + channel, mask=exists & inside, other=0.0).to(tl.float32)
            raw = (
                tl.load(dt + step * dt_time + channel, mask=exists & inside, other=0.0).to(tl.float32) + bias
            )
            delta, slope = _step_size(raw, SOFTPLUS)
            delta = tl.where(inside, delta, 0.0)
            B_t = tl.load(B + step * groups * N + n, mask=(n < N) & inside, other=0.0)
            if starts is not None:
                h = tl.where(tl.load(starts + step, mask=inside, other=0) != 0, 0.0, h)
            h = tl.exp2(delta[None, :] * rate) * h + (delta * x_t)[None, :] * B_t[:, None]
            states, inputs = states + (h,), inputs + (x_t,)
            deltas, slopes = deltas + (delta,), slopes + (slope,)
        for step in tl.static_range(STEPS - 1, -1, -1):
            inside = first + step < length
            x_t, delta, h = inputs[step], deltas[step], states[step + 1]
            B_t = tl.load(B + step * groups * N + n, mask=(n < N) & inside, other=0.0)
            C_t = tl.load(C + step * groups * N + n, mask=(n < N) & inside, other=0.0)
            g = tl.load(dy + step * channels + channel, mask=exists & inside, other=0.0).to(tl.float32)
            if z is not None:
                z_t = tl.load(z + step * z_time + channel, mask=exists & inside, other=0.0).to(tl.float32)
                gate, _ = _sigmoid_and_small(z_t)
                ungated = tl.sum(h * C_t[:, None], axis=0) + skip * x_t
                dz_t = g * ungated * (gate * (1.0 + z_t * (1.0 - gate)))
                tl.store(dz + step * channels + channel, dz_t.to(dz.dtype.element_ty), mask=exists & inside)
                g = g * (z_t * gate)
            adjoint = carry + g[None, :] * C_t[:, None]
            dB_t = tl.sum(adjoint * (delta * x_t)[None, :], axis=1)
            dC_t = tl.sum(h * g[None, :], axis=1)
            tl.store(dB + step * N + n, dB_t, mask=(n < N) & inside)
            tl.store(dC + step * N + n, dC_t, mask=(n < N) & inside)
            carry = adjoint * tl.exp2(delta[None, :] * rate)
            if starts is not None:
                carry = tl.where(tl.load(starts + step, mask=inside, other=0) != 0, 0.0, carry)
            drate = carry * states[step]  # of the product Δ_t A
            ddrive = tl.sum(adjoint * B_t[:, None], axis=0)  # of the product Δ_t x_t
            ddelta = tl.sum(drate * rate, axis=0) * _LN_2 + ddrive * x_t
            ddt_t = tl.where(inside, ddelta * slopes[step], 0.0)
            dx_t = ddrive * delta + skip * g
            tl.store(dx + step * channels + channel, dx_t.to(dx.dtype.element_ty), mask=exists & inside)
            tl.store(ddt + step * channels + channel, ddt_t.to(ddt.dtype.element_ty), mask=exists & inside)
            dA_sum += drate * delta[None, :]
            dD_sum += g * x_t
            dbias_sum += ddt_t
        x -= STEPS * x_time
        dt -= STEPS * dt_time
        if z is not None:
            z -= STEPS * z_time
            dz -= STEPS * channels
        dy -= STEPS * channels
        dx -= STEPS * channels
        ddt -= STEPS * channels
        B -= STEPS * groups * N
        C -= STEPS * groups * N
        dB -= STEPS * N
        dC -= STEPS * N
        checkpoints -= state_size
        if starts is not None:
            starts -= STEPS
        first -= STEPS
    tl.store(dinitial + row * state_size + tile, carry, mask=tile_exists)
    tl.store(dA + row * state_size + tile, dA_sum, mask=tile_exists)
    tl.store(dD + row * channels + channel, dD_sum, mask=exists)
    tl.store(ddt_bias + row * channels + channel, dbias_sum, mask=exists)


def _block(rows: int, channels: int, states: int, most_states: int, narrowest: int) -> int:
    """Return how many channels a program takes, so that it has at most ``most_states`` states to keep."""
    widest: int = max(2, min(_WIDEST, most_states // triton.next_power_of_2(states)))
    return widest if rows * channels >= _ENOUGH_WARPS * widest else max(2, min(widest, narrowest))


def _pair(state_IN: Tensor, groups: int) -> Tensor:
    """Turn (..., I, N) into paired fp32 (..., P/2, N, 2)."""
    *leading, channels, states = state_IN.shape
    width = channels // groups
    state = state_IN.float().reshape(*leading, groups, width, states)
    state = F.pad(state, (0, 0, 0, -width % _WIDEST))
    return state.reshape(*leading, -1, 2, states).transpose(-1, -2).contiguous()


def _unpair(state: Tensor, groups: int, width: int) -> Tensor:
    """Turn paired (..., P/2, N, 2) into (..., I, N)."""
    *leading, pairs, states, _ = state.shape
    state_IN = state.transpose(-1, -2).reshape(*leading, groups, 2 * pairs // groups, states)
    return state_IN[..., :width, :].reshape(*leading, groups * width, states)


def _channels_together(tensor: Tensor) -> Tensor:
    """Return the tensor with its channels next to each other in memory; rows and steps may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def selective_scan(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_I: Tensor | None,
    z_BLI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
    initial_state_BIN: Tensor | None,
    starts_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, I) in x's dtype and the final state (B, I, N) in fp32; arguments as the reference's."""
    groups, channels = B_BLGN.shape[2], x_BLI.shape[2]
    tensors: tuple[Any, ...] = (
        _channels_together(x_BLI),
        _channels_together(dt_BLI),
        None if z_BLI is None else _channels_together(z_BLI),
        B_BLGN.float().contiguous(),  # small, and read by every block of channels
        C_BLGN.float().contiguous(),
        _pair(A_IN, groups),
        None if D_I is None else D_I.contiguous(),
        None if dt_bias_I is None else dt_bias_I.contiguous(),
        None if initial_state_BIN is None else _pair(initial_state_BIN, groups),
    )
    starts_BL = None if starts_BL is None else starts_BL.to(torch.uint8).contiguous()
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y_BLI, final_state = _SelectiveScan.apply(dt_softplus, starts_BL, *tensors)
    else:
        y_BLI, final_state, _ = _run_forward(dt_softplus, False, starts_BL, *tensors)
    return y_BLI, _unpair(final_state, groups, channels // groups)


def selective_step(
    state_BIN: Tensor,
    x_BI: Tensor,
    dt_BI: Tensor,
    A_IN: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_I: Tensor | None,
    z_BI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) and the next state (B, I, N): a scan of one step."""
    y_BLI, next_state_BIN = selective_scan(
        x_BI.unsqueeze(1),
        dt_BI.unsqueeze(1),
        A_IN,
        B_BGN.unsqueeze(1),
        C_BGN.unsqueeze(1),
        D_I,
        None if z_BI is None else z_BI.unsqueeze(1),
        dt_bias_I,
        dt_softplus,
        state_BIN,
        None,
    )
    return y_BLI.squeeze(1), next_state_BIN


class _SelectiveScan(torch.autograd.Function):
    """The two kernels as one differentiable function; tensors as :func:`_run_forward` takes them."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, starts_BL: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        y_BLI, final_state, checkpoints = _run_forward(softplus, True, starts_BL, *tensors)
        ctx.softplus = softplus
        ctx.save_for_backward(starts_BL, checkpoints, *tensors)
        return y_BLI, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLI: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        starts_BL, checkpoints, *tensors = ctx.saved_tensors
        gradients = _run_backward(
            ctx.softplus, starts_BL, checkpoints, dy_BLI.contiguous(), dfinal.contiguous(), *tensors
        )
        return None, None, *gradients


def _run_forward(
    softplus: bool,
    keep_checkpoints: bool,
    starts_BL: Tensor | None,
    x: Tensor,
    dt: Tensor,
    z: Tensor | None,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state and, if they are kept, the states that enter each chunk; states are paired."""
    (rows, length, channels), (groups, states) = x.shape, B.shape[2:]
    block, num_chunks = _block(rows, channels, states, 512, narrowest=8), triton.cdiv(length, _STEPS)
    blocks_per_group = triton.cdiv(channels // groups, block)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = A.new_empty(rows, *A.shape)
    checkpoints = A.new_empty(rows, num_chunks, *A.shape) if keep_checkpoints else None
    with torch.cuda.device_of(x):
        _forward[(rows * groups * blocks_per_group,)](
            x, dt, z, B, C, A, D, dt_bias, initial_state, starts_BL, y, final_state, checkpoints,
            length, num_chunks, groups, channels // groups, 2 * A.shape[0] // groups, blocks_per_group,
            *x.stride()[:2], *dt.stride()[:2], *(0, 0) if z is None else z.stride()[:2],
            N=states, N_PADDED=triton.next_power_of_2(states), BLOCK=block, STEPS=_STEPS, SOFTPLUS=softplus,
            num_warps=1, maxnreg=128,
        )  # fmt: skip
    return y, final_state, checkpoints


def _run_backward(
    softplus: bool,
    starts_BL: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    z: Tensor | None,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x … initial_state in this order; None where there was no tensor."""
    (rows, length, channels), (groups, states) = x.shape, B.shape[2:]
    most_states = 512 if states <= 16 else 256
    block, num_chunks = _block(rows, channels, states, most_states, narrowest=16), triton.cdiv(length, _STEPS)
    blocks_per_group = triton.cdiv(channels // groups, block)
    dx, ddt, dz = (
        None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        for tensor in (x, dt, z)
    )
    dB, dC = A.new_empty(2, groups * blocks_per_group, rows, length, states)
    dA, dinitial = A.new_empty(2, rows, *A.shape)
    dD, ddt_bias = A.new_empty(2, rows, channels)
    with torch.cuda.device_of(x):
        _backward[(rows * groups * blocks_per_group,)](
            x, dt, z, B, C, A, D, dt_bias, starts_BL, checkpoints, dy, dfinal,
            dx, ddt, dz, dB, dC, dA, dD, ddt_bias, dinitial,
            rows, length, num_chunks, groups, channels // groups, 2 * A.shape[0] // groups, blocks_per_group,
            *x.stride()[:2], *dt.stride()[:2], *(0, 0) if z is None else z.stride()[:2],
            N=states, N_PADDED=triton.next_power_of_2(states), BLOCK=block, STEPS=_STEPS, SOFTPLUS=softplus,
            num_warps=1,
        )  # fmt: skip

    def summed_over_blocks(slab: Tensor) -> Tensor:
        return slab.view(groups, blocks_per_group, rows, length, states).sum(1).permute(1, 2, 0, 3)

    return (
        dx,
        ddt,
        dz,
        summed_over_blocks(dB),
        summed_over_blocks(dC),
        dA.sum(0),
        None if D is None else dD.sum(0).to(D.dtype),
        None if dt_bias is None else ddt_bias.sum(0).to(dt_bias.dtype),
        None if initial_state is None else dinitial,
    )
