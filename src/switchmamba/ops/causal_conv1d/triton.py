# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton compiles a sum of tuples, but no starred element)
"""Causal depthwise convolution on a GPU: Triton kernels behind torch's autograd.

    s_t = bias + Σ_lag weight_{W-1-lag} · x_{t-lag}        y_t = act(s_t)

A program is one warp: it computes some steps and channels of one row, in fp32, with the steps unrolled so that an input
is loaded once. The W-1 steps before a row are its initial state. The backward pass needs the inputs only and computes s
again; it looks W-1 steps ahead for the outputs that saw its inputs. Every program writes its share of the gradients of
weight and bias to a slab, and the slabs are summed afterwards: no atomics, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEPS, _CHANNELS = 16, 64


@triton.jit
def _place(tiles, channel_blocks, CHANNELS: tl.constexpr):
    """Return the program's row, tile of steps, and channels."""
    program = tl.program_id(0)
    row_tile = program // channel_blocks
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return (row_tile // tiles).to(tl.int64), row_tile % tiles, channel


@triton.jit
def _load_inputs(
    x, state, first, length, channels, channel, x_time, BEFORE: tl.constexpr, STEPS: tl.constexpr, REACH: tl.constexpr
):  # fmt: skip
    """Return the inputs of the steps first - BEFORE … first + STEPS - 1 in fp32; 0 outside the row and its state.

    ``x`` points at step ``first`` of the row, ``state`` at the row's state.
    """
    inputs = ()
    for i in tl.static_range(BEFORE + STEPS):
        step = first + (i - BEFORE)
        inside = (step >= 0) & (step < length) & (channel < channels)
        x_t = tl.load(x + (i - BEFORE) * x_time + channel, mask=inside, other=0.0).to(tl.float32)
        if state is not None:
            remembered = (step >= -REACH) & (step < 0) & (channel < channels)
            place = state + (step + REACH) * channels + channel
            x_t += tl.load(place, mask=remembered, other=0.0).to(tl.float32)
        inputs = inputs + (x_t,)
    return inputs


@triton.jit
def _load_filter(weight, bias, channels, channel, REACH: tl.constexpr):
    """Return the taps in fp32, the present's first, and the bias."""
    taps = ()
    for lag in tl.static_range(REACH + 1):
        place = weight + channel * (REACH + 1) + (REACH - lag)
        taps = taps + (tl.load(place, mask=channel < channels, other=0.0).to(tl.float32),)
    if bias is None:
        offset = tl.zeros(channel.shape, tl.float32)
    else:
        offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def _seen(inputs, now: tl.constexpr, lag: tl.constexpr, step, begin, RESETS: tl.constexpr):
    """Return the input ``lag`` steps before ``inputs[now]``, a ``step`` of the document that begins at ``begin``."""
    seen = inputs[now - lag]
    if RESETS:
        seen = tl.where(step - lag >= begin, seen, 0.0)
    return seen


@triton.jit
def _convolve(
    inputs, taps, offset, now: tl.constexpr, step, begin, REACH: tl.constexpr, RESETS: tl.constexpr
):  # fmt: skip
    """Return s at ``inputs[now]``."""
    s = offset
    for lag in tl.static_range(REACH + 1):
        s += taps[lag] * _seen(inputs, now, lag, step, begin, RESETS)
    return s


@triton.jit(do_not_specialize=["length", "tiles"])
def _forward(
    x, weight, bias, state, starts, y, length, channels, tiles, channel_blocks, x_row, x_time,
    REACH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill y (B, L, I)."""
    row, tile, channel = _place(tiles, channel_blocks, CHANNELS)
    first = tile * STEPS
    x += row * x_row + first.to(tl.int64) * x_time
    y += (row * length + first) * channels
    if state is not None:
        state += row * REACH * channels
    if starts is not None:
        starts += row * length + first
    taps, offset = _load_filter(weight, bias, channels, channel, REACH)
    inputs = _load_inputs(x, state, first, length, channels, channel, x_time, REACH, STEPS, REACH)
    for i in tl.static_range(STEPS):
        inside = first + i < length
        begin = first
        if starts is not None:
            begin = tl.load(starts + i, mask=inside, other=0)
        s = _convolve(inputs, taps, offset, REACH + i, first + i, begin, REACH, starts is not None)
        if SILU:
            s = s * tl.sigmoid(s)
        tl.store(y + i * channels + channel, s.to(y.dtype.element_ty), mask=inside & (channel < channels))


@triton.jit(do_not_specialize=["length", "tiles"])
def _backward(
    x, weight, bias, state, starts, dy, dx, dweight, dbias, dstate,
    length, channels, tiles, channel_blocks, x_row, x_time,
    REACH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill dx (B, L, I), dstate (B, W-1, I) and the slabs dweight (B · tiles, W, I), dbias (B · tiles, I).

    With an initial state the first tile begins W-1 steps before the row.
    """
    row, tile, channel = _place(tiles, channel_blocks, CHANNELS)
    first = tile * STEPS
    if state is not None:
        first -= REACH
        state += row * REACH * channels
        dstate += row * REACH * channels
    x += row * x_row + first.to(tl.int64) * x_time
    dy += (row * length + first) * channels
    dx += (row * length + first) * channels
    dweight += (row * tiles + tile) * (REACH + 1) * channels
    dbias += (row * tiles + tile) * channels
    if starts is not None:
        starts += row * length + first
    exists = channel < channels
    taps, offset = _load_filter(weight, bias, channels, channel, REACH)
    inputs = _load_inputs(x, state, first, length, channels, channel, x_time, REACH, STEPS + REACH, REACH)

    # g_t = ∂loss/∂s_t, and what the weights get from the tile's own steps.
    gradients, begins, dtaps = (), (), ()
    for _lag in tl.static_range(REACH + 1):
        dtaps = dtaps + (tl.zeros([CHANNELS], tl.float32),)
    doffset = tl.zeros([CHANNELS], tl.float32)
    for i in tl.static_range(STEPS + REACH):
        step = first + i
        inside = (step >= 0) & (step < length)
        g = tl.load(dy + i * channels + channel, mask=exists & inside, other=0.0).to(tl.float32)
        begin = first
        if starts is not None:
            begin = tl.load(starts + i, mask=inside, other=0)
        if SILU:
            s = _convolve(inputs, taps, offset, REACH + i, step, begin, REACH, starts is not None)
            gate = tl.sigmoid(s)
            g = g * (gate * (1.0 + s * (1.0 - gate)))
        gradients, begins = gradients + (g,), begins + (begin,)
        if i < STEPS:
            doffset += g
            sums = ()
            for lag in tl.static_range(REACH + 1):
                seen = _seen(inputs, REACH + i, lag, step, begin, starts is not None)
                sums = sums + (dtaps[lag] + g * seen,)
            dtaps = sums
    tl.store(dbias + channel, doffset, mask=exists)
    for lag in tl.static_range(REACH + 1):
        tl.store(dweight + (REACH - lag) * channels + channel, dtaps[lag], mask=exists)

    for i in tl.static_range(STEPS):
        step = first + i
        dx_t = tl.zeros([CHANNELS], tl.float32)
        for lag in tl.static_range(REACH + 1):
            g = gradients[i + lag]
            if starts is not None:
                g = tl.where(step >= begins[i + lag], g, 0.0)
            dx_t += taps[lag] * g
        inside = (step >= 0) & (step < length)
        tl.store(dx + i * channels + channel, dx_t.to(dx.dtype.element_ty), mask=exists & inside)
        if state is not None:
            remembered = (step >= -REACH) & (step < 0)
            place = dstate + (step + REACH) * channels + channel
            tl.store(place, dx_t.to(dstate.dtype.element_ty), mask=exists & remembered)


def causal_conv1d(
    x_BLI: Tensor,
    weight_IW: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    initial_state_BWI: Tensor | None,
    document_starts_BL: Tensor | None,
) -> Tensor:
    """Return y (B, L, I) in the dtype of x; arguments as the reference's, in any dtype up to fp32."""
    y: Tensor = _CausalConv1d.apply(
        x_BLI if x_BLI.stride(-1) == 1 else x_BLI.contiguous(),
        weight_IW.contiguous(),
        None if bias_I is None else bias_I.contiguous(),
        None if initial_state_BWI is None else initial_state_BWI.contiguous(),
        None if document_starts_BL is None else document_starts_BL.to(torch.int32).contiguous(),
        activation == "silu",
    )
    return y


def causal_conv1d_step(
    state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) and the state after it: a convolution of one step."""
    x_BLI = x_BI.unsqueeze(1)
    y_BLI = causal_conv1d(x_BLI, weight_IW, bias_I, activation, state_BWI, None)
    return y_BLI.squeeze(1), torch.cat([state_BWI, x_BLI], dim=1)[:, 1:]


class _CausalConv1d(torch.autograd.Function):
    """y (B, L, I) from x, weight (I, W), bias, state (B, W-1, I) and document starts (B, L)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        starts: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, starts)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, length, channels = x.shape
        tiles, channel_blocks = triton.cdiv(length, _STEPS), triton.cdiv(channels, _CHANNELS)
        with torch.cuda.device_of(x):
            _forward[(rows * tiles * channel_blocks,)](
                x, weight, bias, state, starts, y, length, channels, tiles, channel_blocks, *x.stride()[:2],
                REACH=weight.shape[1] - 1, SILU=silu, STEPS=_STEPS, CHANNELS=_CHANNELS, num_warps=1,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, starts = ctx.saved_tensors
        rows, length, channels = x.shape
        width = weight.shape[1]
        before = 0 if state is None else width - 1
        tiles, channel_blocks = triton.cdiv(length + before, _STEPS), triton.cdiv(channels, _CHANNELS)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dstate = None if state is None else torch.empty_like(state)
        dweight = x.new_empty(rows * tiles, width, channels, dtype=torch.float32)
        dbias = x.new_empty(rows * tiles, channels, dtype=torch.float32)
        with torch.cuda.device_of(x):
            _backward[(rows * tiles * channel_blocks,)](
                x, weight, bias, state, starts, dy.contiguous(), dx, dweight, dbias, dstate,
                length, channels, tiles, channel_blocks, *x.stride()[:2],
                REACH=width - 1, SILU=ctx.silu, STEPS=_STEPS, CHANNELS=_CHANNELS, num_warps=1,
            )  # fmt: skip
        return (
            dx,
            dweight.sum(0).t().to(weight.dtype),
            None if bias is None else dbias.sum(0).to(bias.dtype),
            dstate,
            None,
            None,
        )
