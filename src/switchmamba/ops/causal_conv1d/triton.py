# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 (Triton compiles a sum of tuples, but no starred element)
"""Causal depthwise convolution on a GPU: Triton kernels behind torch's autograd.

    s_t = bias + Σ_lag weight_{W-1-lag} · x_{t-lag}        y_t = act(s_t)

A program is one warp. It owns some steps and neighbouring channels of a row and walks along time, with the last W-1
inputs in registers and the next ones on their way. The backward pass keeps the last W-1 gradients as well; it needs the
inputs only and computes s again, and it looks W-1 steps ahead for the outputs that saw its inputs. The W-1 steps before
a row are its initial state. Every program writes its share of the gradients of weight and bias to a slab, and the slabs
are summed afterwards: no atomics, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.slabs import sum_slabs

_STEPS, _CHANNELS = 64, 128
"""Steps that a program owns if there are enough programs, and its channels; a program is one warp."""
_UNROLLED = 4
"""Steps whose loads are on their way at the same time."""
_PROGRAMS = 4096
"""Programs that fill a GPU."""


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
def _load_step(x, step, end, channel, exists, x_time):
    """Return a row's inputs of a step in [0, end), as they are, else zeros."""
    inside = (step >= 0) & (step < end) & exists
    return tl.load(x + step.to(tl.int64) * x_time + channel, mask=inside, other=0.0)


@triton.jit
def _load_state(state, step, channels, channel, REACH: tl.constexpr):
    """Return the state's inputs of a step before the row, in fp32, else zeros."""
    remembered = (step >= -REACH) & (step < 0) & (channel < channels)
    return tl.load(state + (step + REACH) * channels + channel, mask=remembered, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(s):
    """Return 1 / (1 + exp(-s)); a reciprocal square root is one instruction, a division several."""
    root = tl.rsqrt(1.0 + tl.exp(-s))
    return root * root


@triton.jit
def _load_input(x, state, step, length, channels, channel, x_time, REACH: tl.constexpr):
    """Return the input of a step, or of the state before the row, in fp32; ``x`` and ``state`` are the row's."""
    x_t = _load_step(x, step, length, channel, channel < channels, x_time).to(tl.float32)
    if state is not None:
        x_t += _load_state(state, step, channels, channel, REACH)
    return x_t


@triton.jit(do_not_specialize=["length", "tiles", "own"])
def _forward(
    x, weight, bias, state, starts, y, length, channels, tiles, own, channel_blocks, x_row, x_time,
    REACH: tl.constexpr, SILU: tl.constexpr, UNROLLED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill y (B, L, I); a tile owns ``own`` steps."""
    program = tl.program_id(0)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    row_tile = program // channel_blocks
    row = (row_tile // tiles).to(tl.int64)
    first = (row_tile % tiles) * own
    end = tl.minimum(first + own, length)
    x += row * x_row
    y += row * length * channels
    if state is not None:
        state += row * REACH * channels
    if starts is not None:
        starts += row * length
    exists = channel < channels
    taps, offset = _load_filter(weight, bias, channels, channel, REACH)
    inputs = ()
    for i in tl.static_range(REACH):
        inputs = inputs + (_load_input(x, state, first - 1 - i, length, channels, channel, x_time, REACH),)

    # The next steps' inputs are on their way while these are used.
    coming = ()
    for i in tl.static_range(UNROLLED):
        coming = coming + (_load_step(x, first + i, end, channel, exists, x_time),)
    start = first
    while start < end:
        loaded, coming = coming, ()
        for i in tl.static_range(UNROLLED):
            coming = coming + (_load_step(x, start + UNROLLED + i, end, channel, exists, x_time),)
        for i in tl.static_range(UNROLLED):
            step = start + i
            begin = first
            if starts is not None:
                begin = tl.load(starts + step, mask=step < end, other=0)
            window = (loaded[i].to(tl.float32),) + inputs
            s = offset
            for lag in tl.static_range(REACH + 1):
                x_then = window[lag]
                if starts is not None:
                    x_then = tl.where(step - lag >= begin, x_then, 0.0)
                s += taps[lag] * x_then
            if SILU:
                s = s * _sigmoid(s)
            place = y + step.to(tl.int64) * channels + channel
            tl.store(place, s.to(y.dtype.element_ty), mask=(step < end) & exists)
            inputs = window[:REACH]
        start += UNROLLED


@triton.jit(do_not_specialize=["length", "tiles", "own"])
def _backward(
    x, weight, bias, state, starts, dy, dy_again, dx, dfilter, dstate,
    length, channels, tiles, own, channel_blocks, x_row, x_time, dx_row, dx_time,
    REACH: tl.constexpr, SILU: tl.constexpr, UNROLLED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Fill dx (B, L, I), dstate (B, W-1, I) and the slabs dfilter (B · tiles, W + 1, I): taps, then the bias.

    A tile owns ``own`` steps and runs over W-1 more. With an initial state the first tile
    begins W-1 steps before the row. At step t dx is complete for step t - (W-1).
    """
    program = tl.program_id(0)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    row_tile = program // channel_blocks
    row = (row_tile // tiles).to(tl.int64)
    first = (row_tile % tiles) * own
    x += row * x_row
    dx += row * dx_row
    dy += row * length * channels
    if dy_again is not None:
        dy_again += row * length * channels
    dfilter += row_tile.to(tl.int64) * (REACH + 2) * channels
    if state is not None:
        first -= REACH
        state += row * REACH * channels
        dstate += row * REACH * channels
    if starts is not None:
        starts += row * length
    end = tl.minimum(first + own, length) + REACH
    exists = channel < channels
    taps, offset = _load_filter(weight, bias, channels, channel, REACH)

    # Windows, the newest first: inputs, gradients g_t = ∂loss/∂s_t, and where the document of each g begins.
    zeros = tl.zeros([CHANNELS], tl.float32)
    inputs, gradients, begins, dtaps = (), (), (), ()
    for i in tl.static_range(REACH):
        inputs = inputs + (_load_input(x, state, first - 1 - i, length, channels, channel, x_time, REACH),)
        gradients = gradients + (zeros,)
        begins = begins + (first,)
    for _lag in tl.static_range(REACH + 1):
        dtaps = dtaps + (zeros,)
    doffset = zeros

    # The next steps' inputs and gradients are on their way while these are used.
    coming, dy_coming, again_coming = (), (), ()
    for i in tl.static_range(UNROLLED):
        coming = coming + (_load_step(x, first + i, length, channel, exists, x_time),)
        dy_coming = dy_coming + (_load_step(dy, first + i, length, channel, exists, channels),)
        if dy_again is not None:
            again_coming = again_coming + (
                _load_step(dy_again, first + i, length, channel, exists, channels),
            )
    start = first
    while start < end:
        loaded, dy_loaded, again_loaded = coming, dy_coming, again_coming
        coming, dy_coming, again_coming = (), (), ()
        for i in tl.static_range(UNROLLED):
            step = start + UNROLLED + i
            coming = coming + (_load_step(x, step, length, channel, exists, x_time),)
            dy_coming = dy_coming + (_load_step(dy, step, length, channel, exists, channels),)
            if dy_again is not None:
                again_coming = again_coming + (_load_step(dy_again, step, length, channel, exists, channels),)
        for i in tl.static_range(UNROLLED):
            step = start + i
            g, begin = dy_loaded[i].to(tl.float32), first
            if dy_again is not None:
                g += again_loaded[i].to(tl.float32)
            if starts is not None:
                begin = tl.load(starts + step, mask=(step >= 0) & (step < length), other=0)
            x_t = loaded[i].to(tl.float32)
            if state is not None:
                x_t += _load_state(state, step, channels, channel, REACH)
            seen = ()
            s = offset
            window = (x_t,) + inputs
            for lag in tl.static_range(REACH + 1):
                x_then = window[lag]
                if starts is not None:
                    x_then = tl.where(step - lag >= begin, x_then, 0.0)
                seen = seen + (x_then,)
                s += taps[lag] * x_then
            if SILU:
                gate = _sigmoid(s)
                g = g * (gate * (1.0 + s * (1.0 - gate)))
            mine = tl.where(step < first + own, g, 0.0)
            doffset += mine
            sums = ()
            for lag in tl.static_range(REACH + 1):
                sums = sums + (dtaps[lag] + mine * seen[lag],)
            dtaps = sums

            done = step - REACH
            later, their_begins = (g,) + gradients, (begin,) + begins
            dx_t = zeros
            for back in tl.static_range(REACH + 1):
                g_later = later[back]  # of step - back = done + (REACH - back)
                if starts is not None:
                    g_later = tl.where(done >= their_begins[back], g_later, 0.0)
                dx_t += taps[REACH - back] * g_later
            owned = (done >= first) & (done < first + own) & exists
            place = dx + done.to(tl.int64) * dx_time + channel
            tl.store(place, dx_t.to(dx.dtype.element_ty), mask=owned & (done >= 0) & (done < length))
            if state is not None:
                place = dstate + (done + REACH) * channels + channel
                tl.store(place, dx_t.to(dstate.dtype.element_ty), mask=owned & (done < 0))
            inputs, gradients, begins = window[:REACH], later[:REACH], their_begins[:REACH]
        start += UNROLLED

    tl.store(dfilter + (REACH + 1) * channels + channel, doffset, mask=exists)
    for lag in tl.static_range(REACH + 1):
        tl.store(dfilter + (REACH - lag) * channels + channel, dtaps[lag], mask=exists)


def causal_conv1d(
    x_BLI: Tensor,
    weight_IW: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    initial_state_BWI: Tensor | None,
    document_starts_BL: Tensor | None,
    twice: bool = False,
) -> Any:
    """Return y (B, L, I) in the dtype of x, or it ``twice``; arguments as the reference's, in any dtype up to fp32."""
    return _CausalConv1d.apply(
        x_BLI if x_BLI.stride(-1) == 1 else x_BLI.contiguous(),
        weight_IW.contiguous(),
        None if bias_I is None else bias_I.contiguous(),
        None if initial_state_BWI is None else initial_state_BWI.contiguous(),
        None if document_starts_BL is None else document_starts_BL.to(torch.int32).contiguous(),
        activation == "silu",
        twice,
    )


def causal_conv1d_step(
    state_BWI: Tensor, x_BI: Tensor, weight_IW: Tensor, bias_I: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) and the state after it: a convolution of one step."""
    x_BLI = x_BI.unsqueeze(1)
    y_BLI = causal_conv1d(x_BLI, weight_IW, bias_I, activation, state_BWI, None)
    return y_BLI.squeeze(1), torch.cat([state_BWI, x_BLI], dim=1)[:, 1:]


class _CausalConv1d(torch.autograd.Function):
    """y (B, L, I) from x, weight (I, W), bias, state (B, W-1, I) and document starts (B, L).

    ``twice``: as two outputs of the same memory, whose gradients meet in the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        starts: Tensor | None,
        silu: bool,
        twice: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, state, starts)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        y = _run_forward(x, weight, bias, state, starts, silu)
        return (y, y.view_as(y)) if twice else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dy_again: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, starts = ctx.saved_tensors
        if dy is None:
            dy, dy_again = dy_again, None
        if dy is None:
            return (None,) * 7
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        gradients = _run_backward(x, weight, bias, state, starts, ctx.silu, dy, dx, dy_again)
        return dx, *gradients, None, None, None


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, starts: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, length, channels = x.shape
    channel_blocks = triton.cdiv(channels, _CHANNELS)
    tiles, own = _tiles(length, rows * channel_blocks)
    with torch.cuda.device_of(x):
        _forward[(rows * tiles * channel_blocks,)](
            x, weight, bias, state, starts, y, length, channels, tiles, own, channel_blocks, *x.stride()[:2],
            REACH=weight.shape[1] - 1, SILU=silu, UNROLLED=_UNROLLED, CHANNELS=_CHANNELS, num_warps=1,
        )  # fmt: skip
    return y


def _run_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    silu: bool,
    dy: Tensor,
    dx: Tensor,
    dy_again: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fill dx, whose channels are contiguous, and return the gradients of weight, bias and state.

    The gradient of y is dy, or dy + dy_again.
    """
    (rows, length, channels), width = x.shape, weight.shape[1]
    reach, channel_blocks = width - 1, triton.cdiv(channels, _CHANNELS)
    tiles, own = _tiles(length if state is None else length + reach, rows * channel_blocks)
    dstate = None if state is None else torch.empty_like(state)
    dfilter = x.new_empty(rows * tiles, (width + 1) * channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[(rows * tiles * channel_blocks,)](
            x, weight, bias, state, starts, dy.contiguous(), None if dy_again is None else dy_again.contiguous(),
            dx, dfilter, dstate,
            length, channels, tiles, own, channel_blocks,
            *x.stride()[:2], *dx.stride()[:2],
            REACH=reach, SILU=silu, UNROLLED=_UNROLLED, CHANNELS=_CHANNELS, num_warps=1, maxnreg=168,
        )  # fmt: skip
    dweight, dbias = sum_slabs(dfilter, width, channels).split([width * channels, channels])
    return (
        dweight.view(channels, width).to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        dstate,
    )


def _tiles(steps: int, programs: int) -> tuple[int, int]:
    """Return how many tiles a row of ``steps`` is cut into, and the steps of a tile; ``programs`` is without tiles."""
    tiles = max(triton.cdiv(steps, _STEPS), _PROGRAMS // programs)
    own = max(triton.cdiv(steps, tiles), 16)
    return triton.cdiv(steps, own), own
