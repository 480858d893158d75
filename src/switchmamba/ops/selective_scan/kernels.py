"""Selective scan, forward and backward, as compiled loops (Mamba §3.2, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

Work is cut into items: one row of the batch and up to ``PIECE`` channels that share a group's B and C. How it is
cut, and the order of every sum, depends on the shapes alone, so any number of threads gives the same bits. Inside
an item time is the outer loop, and 16 channels at a time are the lanes of a vector, so that a step reads runs of
``PIECE`` neighbours; its state stays in the first-level cache.

The backward pass knows the state that entered each chunk of ``CHUNK`` steps (the forward pass stored it). It takes
the chunks last first: it recomputes the chunk's decays and states, then walks back through time with
g_t = ∂loss/∂(C_t h_t + D x_t) and λ_t = ∂loss/∂h_t = C_t g_t + exp(Δ_{t+1} A) λ_{t+1}:

    ∂B_t = Σ λ_t Δ_t x_t    ∂C_t = Σ h_t g_t    ∂(Δ_t A) = λ_t exp(Δ_t A) h_{t-1}    ∂(Δ_t x_t) = Σ_n λ_t B_t

∂B and ∂C sum over channels: within an item here, lanes last; over items by the caller.

Where memory is "rows", ``get`` and ``put`` address rows of 16 floats; ``load`` and ``store`` take up to 16
neighbours of a flat array. The rows of a step are 256 bytes of every 4·I, which no hardware prefetcher follows:
``prefetch`` asks for the next step's, which halves the time.
"""

import math
from typing import Any, NamedTuple

import numba

from switchmamba.ops.compiled import compiled
from switchmamba.ops.selective_scan.lanes import (
    LANES,
    exp2,
    fill,
    gather,
    get,
    lane_sum,
    load,
    log1p,
    prefetch,
    put,
    scatter,
    spread,
    store,
    where_greater,
)

PIECE = 64
"""Channels of a work item: more would save sums over items, fewer would feed more threads."""

CHUNK = 32
"""Steps between two stored states: what a chunk recomputes (256 KiB at N = 16) fits the second-level cache."""

_BLOCKS = PIECE // LANES
_LOG2_E = math.log2(math.e)
_SOFTPLUS_THRESHOLD = 20.0

_inlined = numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Inputs(NamedTuple):
    """What both passes read; what is absent (z, D, dt_bias, starts) has size 0.

    x, dt, z, B, C lie flat in memory; ``strides`` says for each of them, in this order, how far apart rows of the
    batch and steps are. A is (I, N); D, dt_bias (I,); starts (B·L,), True where another document begins.
    """

    x: Any
    dt: Any
    z: Any
    B: Any
    C: Any
    strides: Any
    A: Any
    D: Any
    dt_bias: Any
    starts: Any


def pieces(_rows: int, _length: int, channels: int, groups: int, _states: int) -> int:
    """Return how many work items share the channels of one group."""
    return -(-(channels // groups) // PIECE)


def num_items(rows: int, length: int, channels: int, groups: int, states: int) -> int:
    """Return how many work items there are."""
    return rows * groups * pieces(rows, length, channels, groups, states)


def checkpoint_rows(rows: int, length: int, channels: int, groups: int, states: int) -> int:
    """Return how many rows :func:`forward` stores for :func:`backward`."""
    return num_items(rows, length, channels, groups, states) * -(-length // CHUNK) * _BLOCKS * states


def forward_scratch_rows(states: int) -> int:
    """Return how many rows of memory a call of :func:`forward` works in."""
    return 2 * _BLOCKS * states


def backward_scratch_rows(states: int) -> int:
    """Return how many rows of memory a call of :func:`backward` works in."""
    rows: int = _layout.py_func(states, 1).decay
    return rows


@_inlined
def _place(item, channels, groups):  # type: ignore[no-untyped-def]
    """Return an item's row, group, piece within the group, first channel and the channel after its last."""
    width = channels // groups
    num_pieces = (width + PIECE - 1) // PIECE
    row, group, piece = item // (groups * num_pieces), item // num_pieces % groups, item % num_pieces
    first = group * width + piece * PIECE
    return row, group, piece, first, min(first + PIECE, (group + 1) * width)


@_inlined
def _sigmoid_and_exp(x):  # type: ignore[no-untyped-def]
    """Return sigmoid(x) and exp(-|x|), from which it comes without overflow."""
    small = exp2(where_greater(x, 0.0, x, -x) * -_LOG2_E)
    larger = 1.0 / (1.0 + small)
    return where_greater(x, 0.0, larger, small * larger), small


@_inlined
def _step_size(raw, softplus):  # type: ignore[no-untyped-def]
    """Return Δ and its slope: softplus of the raw value (as torch's, linear above 20), or the value itself."""
    if not softplus:
        return raw, fill(raw, 1.0)
    slope, small = _sigmoid_and_exp(raw)
    delta = where_greater(raw, 0.0, raw, 0.0) + log1p(small)
    return (
        where_greater(raw, _SOFTPLUS_THRESHOLD, raw, delta),
        where_greater(raw, _SOFTPLUS_THRESHOLD, 1.0, slope),
    )


@compiled
def forward(  # type: ignore[no-untyped-def]
    place,
    begin,
    end,
    x,
    dt,
    z,
    B,
    C,
    strides,
    A,
    D,
    dt_bias,
    starts,
    sizes,
    softplus,
    scratch,
    initial_state,
    y,
    final_state,
    checkpoints,
):
    """Scan the items ``begin`` … ``end - 1``: fill y, final_state and, unless empty, checkpoints.

    Args: place, which part of scratch is this call's; the fields of :class:`Inputs`; sizes (B, L, I, G, N); softplus;
    scratch and checkpoints in rows; and flat, initial_state (may be empty) and final_state (B, I, N), y (B, L, I).
    """
    _, length, channels, groups, N = sizes
    num_chunks = (length + CHUNK - 1) // CHUNK
    rates = place * 2 * _BLOCKS * N
    state = rates + _BLOCKS * N
    for item in range(begin, end):
        row, group, _, first, last = _place(item, channels, groups)
        x_row, dt_row, z_row = row * strides[0][0], row * strides[1][0], row * strides[2][0]
        B_row, C_row = row * strides[3][0] + group * N, row * strides[4][0] + group * N
        num_tiles = (last - first + LANES - 1) // LANES * N
        for channel in range(first, last, LANES):
            tile, count = (channel - first) // LANES * N, last - channel
            for n in range(N):
                put(scratch, rates + tile + n, gather(A, channel * N + n, N, count))
                h = fill(y, 0.0)
                if initial_state.size:
                    h = gather(initial_state, (row * channels + channel) * N + n, N, count)
                put(scratch, state + tile + n, h)
        for t in range(length):
            if checkpoints.size and t % CHUNK == 0:
                saved = (item * num_chunks + t // CHUNK) * _BLOCKS * N
                for i in range(num_tiles):
                    put(checkpoints, saved + i, get(scratch, state + i))
            if starts.size and starts[row * length + t]:
                for i in range(num_tiles):
                    put(scratch, state + i, fill(y, 0.0))
            x_t, dt_t, z_t = x_row + t * strides[0][1], dt_row + t * strides[1][1], z_row + t * strides[2][1]
            B_t, C_t = B_row + t * strides[3][1], C_row + t * strides[4][1]
            y_t = (row * length + t) * channels
            for channel in range(first, last, LANES):
                tile, count = (channel - first) // LANES * N, last - channel
                prefetch(x, x_t + strides[0][1] + channel)
                prefetch(dt, dt_t + strides[1][1] + channel)
                prefetch(z, z_t + strides[2][1] + channel)
                prefetch(y, y_t + channels + channel)
                x_i, raw = load(x, x_t + channel, count), load(dt, dt_t + channel, count)
                if dt_bias.size:
                    raw = raw + load(dt_bias, channel, count)
                delta, _ = _step_size(raw, softplus)
                rate, drive = delta * _LOG2_E, delta * x_i
                y_i = fill(y, 0.0)
                for n in range(N):
                    decay = exp2(rate * get(scratch, rates + tile + n))
                    h = decay * get(scratch, state + tile + n) + drive * spread(B, B_t + n)
                    put(scratch, state + tile + n, h)
                    y_i = y_i + h * spread(C, C_t + n)
                if D.size:
                    y_i = y_i + load(D, channel, count) * x_i
                if z.size:
                    z_i = load(z, z_t + channel, count)
                    y_i = y_i * (z_i * _sigmoid_and_exp(z_i)[0])
                store(y, y_t + channel, count, y_i)
        for channel in range(first, last, LANES):
            tile, count = (channel - first) // LANES * N, last - channel
            for n in range(N):
                h = get(scratch, state + tile + n)
                scatter(final_state, (row * channels + channel) * N + n, N, count, h)


class Layout(NamedTuple):
    """Where the parts of the backward pass's memory begin, in rows.

    For block b of 16 channels, step s of the chunk and state n: decay, and carried (= decay · previous state), at
    (s·BLOCKS + b)·N + n; delta and slope at s·BLOCKS + b; rates (A), state, adjoint (λ) and dA at b·N + n; dD and
    ddt_bias at b. dB and dC, N rows each, collect one step's sums over blocks; zeros are what they begin with.
    """

    decay: Any
    carried: Any
    delta: Any
    slope: Any
    rates: Any
    state: Any
    adjoint: Any
    dA: Any
    dD: Any
    ddt_bias: Any
    dB: Any
    dC: Any
    zeros: Any


@_inlined
def _layout(N, place):  # type: ignore[no-untyped-def]
    steps, tiles = CHUNK * _BLOCKS, _BLOCKS * N
    decay = place * ((2 * steps + 4 * _BLOCKS + 3) * N + 2 * steps + 2 * _BLOCKS)
    delta = decay + 2 * steps * N
    rates = delta + 2 * steps
    dD = rates + 4 * tiles
    dB = dD + 2 * _BLOCKS
    return Layout(
        decay=decay,
        carried=decay + steps * N,
        delta=delta,
        slope=delta + steps,
        rates=rates,
        state=rates + tiles,
        adjoint=rates + 2 * tiles,
        dA=rates + 3 * tiles,
        dD=dD,
        ddt_bias=dD + _BLOCKS,
        dB=dB,
        dC=dB + N,
        zeros=dB + 2 * N,
    )


@_inlined
def _recompute(inputs, sizes, softplus, checkpoints, item, chunk, scratch, at):  # type: ignore[no-untyped-def]
    """Walk forward through a chunk from the state that entered it, keeping what the walk back needs."""
    x, dt, _, B, _, strides, _, _, dt_bias, starts = inputs
    _, length, channels, groups, N = sizes
    row, group, _, first, last = _place(item, channels, groups)
    x_row, dt_row, B_row = row * strides[0][0], row * strides[1][0], row * strides[3][0] + group * N
    num_tiles = (last - first + LANES - 1) // LANES * N
    saved = (item * ((length + CHUNK - 1) // CHUNK) + chunk) * _BLOCKS * N
    for i in range(num_tiles):
        put(scratch, at.state + i, get(checkpoints, saved + i))
    for s in range(min(CHUNK, length - chunk * CHUNK)):
        t = chunk * CHUNK + s
        if starts.size and starts[row * length + t]:
            for i in range(num_tiles):
                put(scratch, at.state + i, fill(x, 0.0))
        x_t, dt_t, B_t = x_row + t * strides[0][1], dt_row + t * strides[1][1], B_row + t * strides[3][1]
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            tile, step = block * N, s * _BLOCKS + block
            prefetch(x, x_t + strides[0][1] + channel)
            prefetch(dt, dt_t + strides[1][1] + channel)
            x_i, raw = load(x, x_t + channel, count), load(dt, dt_t + channel, count)
            if dt_bias.size:
                raw = raw + load(dt_bias, channel, count)
            delta, slope = _step_size(raw, softplus)
            put(scratch, at.delta + step, delta)
            put(scratch, at.slope + step, slope)
            rate, drive = delta * _LOG2_E, delta * x_i
            for n in range(N):
                decay = exp2(rate * get(scratch, at.rates + tile + n))
                carried = decay * get(scratch, at.state + tile + n)
                put(scratch, at.decay + step * N + n, decay)
                put(scratch, at.carried + step * N + n, carried)
                put(scratch, at.state + tile + n, carried + drive * spread(B, B_t + n))


@_inlined
def _walk_back(inputs, sizes, item, chunk, scratch, at, dy, dx, ddt, dz, dB, dC):  # type: ignore[no-untyped-def]
    """Walk back through a chunk after :func:`_recompute`."""
    x, _, z, B, C, strides, _, D, _, starts = inputs
    rows, length, channels, groups, N = sizes
    row, group, piece, first, last = _place(item, channels, groups)
    x_row, z_row = row * strides[0][0], row * strides[2][0]
    B_row, C_row = row * strides[3][0] + group * N, row * strides[4][0] + group * N
    zero = fill(dy, 0.0)
    for s in range(min(CHUNK, length - chunk * CHUNK) - 1, -1, -1):
        t = chunk * CHUNK + s
        x_t, z_t = x_row + t * strides[0][1], z_row + t * strides[2][1]
        B_t, C_t = B_row + t * strides[3][1], C_row + t * strides[4][1]
        y_t = (row * length + t) * channels
        dB_sum, dC_sum = at.zeros, at.zeros
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            tile, step = block * N, s * _BLOCKS + block
            prefetch(z, z_t - strides[2][1] + channel)
            prefetch(dy, y_t - channels + channel)
            prefetch(dx, y_t - channels + channel)
            prefetch(ddt, y_t - channels + channel)
            prefetch(dz, y_t - channels + channel)
            x_i, dy_i, delta = (
                load(x, x_t + channel, count),
                load(dy, y_t + channel, count),
                get(scratch, at.delta + step),
            )
            drive = delta * x_i
            z_i, sigmoid, g = zero, zero, dy_i
            if z.size:
                z_i = load(z, z_t + channel, count)
                sigmoid, _ = _sigmoid_and_exp(z_i)
                g = dy_i * (z_i * sigmoid)
            ungated, ddrive, ddelta = zero, zero, zero
            for n in range(N):
                decay, carried = (
                    get(scratch, at.decay + step * N + n),
                    get(scratch, at.carried + step * N + n),
                )
                rate, dA = get(scratch, at.rates + tile + n), get(scratch, at.dA + tile + n)
                B_n, C_n = spread(B, B_t + n), spread(C, C_t + n)
                h = carried + drive * B_n
                ungated = ungated + h * C_n
                dh = get(scratch, at.adjoint + tile + n) + g * C_n
                ddrive = ddrive + dh * B_n
                dexponent = dh * carried
                ddelta = ddelta + dexponent * rate
                put(scratch, at.dA + tile + n, dA + dexponent * delta)
                put(scratch, at.dB + n, get(scratch, dB_sum + n) + dh * drive)
                put(scratch, at.dC + n, get(scratch, dC_sum + n) + g * h)
                put(scratch, at.adjoint + tile + n, dh * decay)
            dB_sum, dC_sum = at.dB, at.dC
            if starts.size and starts[row * length + t]:
                for n in range(N):
                    put(scratch, at.adjoint + tile + n, zero)
            dx_i, ddt_i = ddrive * delta, (ddelta + ddrive * x_i) * get(scratch, at.slope + step)
            put(scratch, at.ddt_bias + block, get(scratch, at.ddt_bias + block) + ddt_i)
            if D.size:
                D_i = load(D, channel, count)
                ungated = ungated + D_i * x_i
                dx_i = dx_i + D_i * g
                put(scratch, at.dD + block, get(scratch, at.dD + block) + g * x_i)
            if z.size:
                slope = sigmoid * (1.0 + z_i * (1.0 - sigmoid))
                store(dz, y_t + channel, count, dy_i * ungated * slope)
            store(dx, y_t + channel, count, dx_i)
            store(ddt, y_t + channel, count, ddt_i)
        out = (((piece * rows + row) * length + t) * groups + group) * N
        for n in range(N):
            dB[out + n] = lane_sum(get(scratch, at.dB + n))
            dC[out + n] = lane_sum(get(scratch, at.dC + n))


@compiled
def backward(  # type: ignore[no-untyped-def]
    place,
    begin,
    end,
    x,
    dt,
    z,
    B,
    C,
    strides,
    A,
    D,
    dt_bias,
    starts,
    sizes,
    softplus,
    scratch,
    checkpoints,
    dy,
    dfinal,
    dx,
    ddt,
    dz,
    dB,
    dC,
    dA,
    dD,
    ddt_bias,
    dinitial,
):
    """Fill the gradients of the items ``begin`` … ``end - 1``.

    Args: as :func:`forward`'s, and flat: dy, dx, ddt, dz (B, L, I); dfinal, dinitial (B, I, N); and in parts that
    the caller adds up, dB, dC (pieces, B, L, G, N), dA (B, I, N), dD, ddt_bias (B, I). dfinal may be empty, and the
    gradients of what is absent are.
    """
    inputs = Inputs(x, dt, z, B, C, strides, A, D, dt_bias, starts)
    _, length, channels, groups, N = sizes
    at = _layout(N, place)
    zero = fill(dy, 0.0)
    for n in range(N):
        put(scratch, at.zeros + n, zero)
    for item in range(begin, end):
        row, _, _, first, last = _place(item, channels, groups)
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            put(scratch, at.dD + block, zero)
            put(scratch, at.ddt_bias + block, zero)
            for n in range(N):
                tile, state = block * N + n, (row * channels + channel) * N + n
                put(scratch, at.rates + tile, gather(A, channel * N + n, N, count))
                put(scratch, at.dA + tile, zero)
                put(scratch, at.adjoint + tile, zero)
                if dfinal.size:
                    put(scratch, at.adjoint + tile, gather(dfinal, state, N, count))
        for chunk in range((length - 1) // CHUNK, -1, -1):
            _recompute(inputs, sizes, softplus, checkpoints, item, chunk, scratch, at)
            _walk_back(inputs, sizes, item, chunk, scratch, at, dy, dx, ddt, dz, dB, dC)
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            if dD.size:
                store(dD, row * channels + channel, count, get(scratch, at.dD + block))
            if ddt_bias.size:
                store(ddt_bias, row * channels + channel, count, get(scratch, at.ddt_bias + block))
            for n in range(N):
                tile, state = block * N + n, (row * channels + channel) * N + n
                scatter(dA, state, N, count, get(scratch, at.dA + tile))
                if dinitial.size:
                    scatter(dinitial, state, N, count, get(scratch, at.adjoint + tile))
