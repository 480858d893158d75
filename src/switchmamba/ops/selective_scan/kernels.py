"""Selective scan, forward and backward, as compiled loops (Mamba §3.2, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

Work is cut into items: one row of the batch and up to ``PIECE`` channels that share a group's B and C. How it is cut, and
the order of every sum, depends on the shapes alone, so any number of threads gives the same bits. Inside an item, blocks of
16 channels are the lanes of a vector; a state's N lanes-wide rows stay in the first-level cache. Time runs in chunks of
``CHUNK`` steps: a chunk goes over all blocks of the item before the next one begins, so rows of x, dt, z are read in runs of
``PIECE`` channels.

The backward pass knows the state that entered each chunk (the forward pass stored it). Chunk by chunk, last first, it
recomputes decay and state, then walks back through time with g_t = ∂loss/∂(C_t h_t + D x_t) and
λ_t = ∂loss/∂h_t = C_t g_t + exp(Δ_{t+1} A) λ_{t+1}:

    ∂B_t = Σ λ_t Δ_t x_t    ∂C_t = Σ h_t g_t    ∂(Δ_t A) = λ_t exp(Δ_t A) h_{t-1}    ∂(Δ_t x_t) = Σ_n λ_t B_t

∂B and ∂C sum over channels: lanes are summed last, once per item and step, and the items' sums are added by the caller.

``put`` and ``get`` address rows of 16 floats, ``load`` and ``store`` up to 16 neighbouring channels of a flat array.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from switchmamba.ops.compiled import compiled
from switchmamba.ops.selective_scan.lanes import (
    LANES,
    address,
    exp2,
    fill,
    get,
    lane_sum,
    load,
    log1p,
    put,
    spread,
    store,
    where_greater,
)

PIECE = 64
"""Channels of a work item."""

CHUNK = 32
"""Steps between two stored states."""

_BLOCKS = PIECE // LANES
_CACHE_LINE = 64
_LOG2_E = math.log2(math.e)
_SOFTPLUS_THRESHOLD = 20.0

_inlined = numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Inputs(NamedTuple):
    """What both passes read.

    x, dt, z, B, C are flat; ``strides`` (5, 2) has for each of them, in this order, how far apart rows of the batch and
    steps are. An absent z, D or starts has size 0. A (N, I); D, dt_bias (I,); starts (B·L,), True where a document begins.
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
    """Return how many rows of 16 floats :func:`forward` stores for :func:`backward`."""
    return num_items(rows, length, channels, groups, states) * -(-length // CHUNK) * _BLOCKS * states


@_inlined
def _place(item, channels, groups):  # type: ignore[no-untyped-def]
    """Return an item's row, group, piece within the group, first channel and the channel after its last."""
    width = channels // groups
    num_pieces = (width + PIECE - 1) // PIECE
    row, group, piece = item // (groups * num_pieces), item // num_pieces % groups, item % num_pieces
    first = group * width + piece * PIECE
    return row, group, piece, first, min(first + PIECE, (group + 1) * width)


@_inlined
def _rows_of_lanes(count, like):  # type: ignore[no-untyped-def]
    """Return memory for ``count`` rows of 16 floats of the dtype of ``like``, aligned to cache lines."""
    memory = np.empty(count * LANES + _CACHE_LINE // like.itemsize, like.dtype)
    return memory[-address(memory) % _CACHE_LINE // like.itemsize :]


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
    begin, end, inputs, sizes, softplus, initial_state, y, final_state, checkpoints
):
    """Scan the items ``begin`` … ``end - 1``: fill y, final_state and, unless empty, checkpoints.

    ``sizes`` is (B, L, I, G, N). The arrays are flat: initial_state, final_state (B, N, I), y (B, L, I).
    """
    x, dt, z, B, C, strides, A, D, dt_bias, starts = inputs
    _, length, channels, groups, N = sizes
    num_chunks = (length + CHUNK - 1) // CHUNK
    scratch = _rows_of_lanes(2 * _BLOCKS * N, y)
    rates, state = scratch, scratch[_BLOCKS * N * LANES :]
    for item in range(begin, end):
        row, group, _, first, last = _place(item, channels, groups)
        x_row, dt_row, z_row = row * strides[0, 0], row * strides[1, 0], row * strides[2, 0]
        B_row, C_row = row * strides[3, 0] + group * N, row * strides[4, 0] + group * N
        for channel in range(first, last, LANES):
            tile, count = (channel - first) // LANES * N, last - channel
            for n in range(N):
                put(rates, tile + n, load(A, n * channels + channel, count))
                put(state, tile + n, load(initial_state, (row * N + n) * channels + channel, count))
        for chunk in range(num_chunks):
            for channel in range(first, last, LANES):
                tile, count = (channel - first) // LANES * N, last - channel
                if checkpoints.size:
                    saved = (item * num_chunks + chunk) * _BLOCKS * N + tile
                    for n in range(N):
                        put(checkpoints, saved + n, get(state, tile + n))
                bias = load(dt_bias, channel, count)
                for t in range(chunk * CHUNK, min(length, (chunk + 1) * CHUNK)):
                    if starts.size and starts[row * length + t]:
                        for n in range(N):
                            put(state, tile + n, fill(y, 0.0))
                    x_t = load(x, x_row + t * strides[0, 1] + channel, count)
                    raw = load(dt, dt_row + t * strides[1, 1] + channel, count) + bias
                    delta, _ = _step_size(raw, softplus)
                    rate, drive = delta * _LOG2_E, delta * x_t
                    B_t, C_t = B_row + t * strides[3, 1], C_row + t * strides[4, 1]
                    y_t = fill(y, 0.0)
                    for n in range(N):
                        decay = exp2(rate * get(rates, tile + n))
                        h = decay * get(state, tile + n) + drive * spread(B, B_t + n)
                        put(state, tile + n, h)
                        y_t = y_t + h * spread(C, C_t + n)
                    if D.size:
                        y_t = y_t + load(D, channel, count) * x_t
                    if z.size:
                        z_t = load(z, z_row + t * strides[2, 1] + channel, count)
                        y_t = y_t * (z_t * _sigmoid_and_exp(z_t)[0])
                    store(y, (row * length + t) * channels + channel, count, y_t)
        for channel in range(first, last, LANES):
            tile, count = (channel - first) // LANES * N, last - channel
            for n in range(N):
                store(final_state, (row * N + n) * channels + channel, count, get(state, tile + n))


@compiled
def backward(  # type: ignore[no-untyped-def]
    begin, end, inputs, sizes, softplus, checkpoints, dy, dfinal, dx, ddt, dz, dB, dC, dD, ddt_bias, dA, dinitial
):
    """Fill the gradients of the items ``begin`` … ``end - 1``.

    The arrays are flat: dy, dx, ddt, dz (B, L, I), dz empty without a gate; dfinal, dinitial (B, N, I); with parts that the
    caller adds up, dB, dC (pieces, B, L, G, N), dA (B, N, I), dD and ddt_bias (B, I).
    """
    x, dt, z, B, C, strides, A, D, dt_bias, starts = inputs
    rows, length, channels, groups, N = sizes
    num_chunks = (length + CHUNK - 1) // CHUNK
    scratch = _rows_of_lanes((3 * _BLOCKS + 4 * CHUNK + 2) * N + 2 * _BLOCKS + 2 * CHUNK, dy)
    rates, scratch = scratch, scratch[_BLOCKS * N * LANES :]
    adjoint, scratch = scratch, scratch[_BLOCKS * N * LANES :]
    dA_sum, scratch = scratch, scratch[_BLOCKS * N * LANES :]
    decay, scratch = scratch, scratch[CHUNK * N * LANES :]
    dB_sum, scratch = scratch, scratch[CHUNK * N * LANES :]
    dC_sum, scratch = scratch, scratch[CHUNK * N * LANES :]
    # The state before step s of the chunk in rows s·N …, after it in rows (s + 1)·N …; the last N rows stay zero: the state
    # before a document's first step.
    history, scratch = scratch, scratch[(CHUNK + 2) * N * LANES :]
    nothing = (CHUNK + 1) * N
    delta, scratch = scratch, scratch[CHUNK * LANES :]
    slope, scratch = scratch, scratch[CHUNK * LANES :]
    dD_sum, ddt_bias_sum = scratch, scratch[_BLOCKS * LANES :]
    zero = fill(dy, 0.0)
    for n in range(N):
        put(history, nothing + n, zero)
    for item in range(begin, end):
        row, group, piece, first, last = _place(item, channels, groups)
        x_row, dt_row, z_row = row * strides[0, 0], row * strides[1, 0], row * strides[2, 0]
        B_row, C_row = row * strides[3, 0] + group * N, row * strides[4, 0] + group * N
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            put(dD_sum, block, zero)
            put(ddt_bias_sum, block, zero)
            for n in range(N):
                put(rates, block * N + n, load(A, n * channels + channel, count))
                put(adjoint, block * N + n, load(dfinal, (row * N + n) * channels + channel, count))
                put(dA_sum, block * N + n, zero)
        for chunk in range(num_chunks - 1, -1, -1):
            start, steps = chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
            for i in range(steps * N):
                put(dB_sum, i, zero)
                put(dC_sum, i, zero)
            for channel in range(first, last, LANES):
                block, count = (channel - first) // LANES, last - channel
                tile = block * N
                for n in range(N):
                    put(history, n, get(checkpoints, (item * num_chunks + chunk) * _BLOCKS * N + tile + n))
                bias = load(dt_bias, channel, count)
                for s in range(steps):
                    t = start + s
                    before = nothing if starts.size and starts[row * length + t] else s * N
                    x_t = load(x, x_row + t * strides[0, 1] + channel, count)
                    raw = load(dt, dt_row + t * strides[1, 1] + channel, count) + bias
                    delta_t, slope_t = _step_size(raw, softplus)
                    put(delta, s, delta_t)
                    put(slope, s, slope_t)
                    rate, drive = delta_t * _LOG2_E, delta_t * x_t
                    B_t = B_row + t * strides[3, 1]
                    for n in range(N):
                        a = exp2(rate * get(rates, tile + n))
                        put(decay, s * N + n, a)
                        put(history, (s + 1) * N + n, a * get(history, before + n) + drive * spread(B, B_t + n))
                for s in range(steps - 1, -1, -1):
                    t = start + s
                    is_start = starts.size and starts[row * length + t]
                    before = nothing if is_start else s * N
                    here = (row * length + t) * channels + channel
                    x_t, delta_t = load(x, x_row + t * strides[0, 1] + channel, count), get(delta, s)
                    drive = delta_t * x_t
                    dy_t = load(dy, here, count)
                    z_t, sigmoid, g = zero, zero, dy_t
                    if z.size:
                        z_t = load(z, z_row + t * strides[2, 1] + channel, count)
                        sigmoid, _ = _sigmoid_and_exp(z_t)
                        g = dy_t * (z_t * sigmoid)
                    B_t, C_t = B_row + t * strides[3, 1], C_row + t * strides[4, 1]
                    ungated, ddrive, ddelta = zero, zero, zero
                    for n in range(N):
                        i = s * N + n
                        C_n, h = spread(C, C_t + n), get(history, i + N)
                        ungated = ungated + h * C_n
                        put(dC_sum, i, get(dC_sum, i) + h * g)
                        dh = get(adjoint, tile + n) + g * C_n
                        put(dB_sum, i, get(dB_sum, i) + dh * drive)
                        ddrive = ddrive + dh * spread(B, B_t + n)
                        carried = dh * get(decay, i)
                        put(adjoint, tile + n, carried)
                        dexponent = carried * get(history, before + n)
                        ddelta = ddelta + dexponent * get(rates, tile + n)
                        put(dA_sum, tile + n, get(dA_sum, tile + n) + dexponent * delta_t)
                    if is_start:
                        for n in range(N):
                            put(adjoint, tile + n, zero)
                    dx_t = ddrive * delta_t
                    if D.size:
                        D_i = load(D, channel, count)
                        ungated = ungated + D_i * x_t
                        dx_t = dx_t + D_i * g
                        put(dD_sum, block, get(dD_sum, block) + g * x_t)
                    if z.size:
                        store(dz, here, count, dy_t * ungated * (sigmoid * (1.0 + z_t * (1.0 - sigmoid))))
                    ddt_t = (ddelta + ddrive * x_t) * get(slope, s)
                    put(ddt_bias_sum, block, get(ddt_bias_sum, block) + ddt_t)
                    store(dx, here, count, dx_t)
                    store(ddt, here, count, ddt_t)
            for s in range(steps):
                out = (((piece * rows + row) * length + start + s) * groups + group) * N
                for n in range(N):
                    dB[out + n] = lane_sum(get(dB_sum, s * N + n))
                    dC[out + n] = lane_sum(get(dC_sum, s * N + n))
        for channel in range(first, last, LANES):
            block, count = (channel - first) // LANES, last - channel
            store(dD, row * channels + channel, count, get(dD_sum, block))
            store(ddt_bias, row * channels + channel, count, get(ddt_bias_sum, block))
            for n in range(N):
                at = (row * N + n) * channels + channel
                store(dA, at, count, get(dA_sum, block * N + n))
                store(dinitial, at, count, get(adjoint, block * N + n))
