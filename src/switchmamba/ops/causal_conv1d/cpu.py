"""Causal depthwise convolution on the CPU: compiled loops over time with the channels innermost.

Work is cut into rows of the batch and runs of channels; each piece owns what it writes, so there are no
atomics and the bits do not depend on the number of threads. The backward pass computes the pre-activation
again from the inputs. Sums over time are taken in blocks, which keeps the error of long fp32 sums small.

The kernels see flat arrays and unsigned offsets: numba then drops its test for negative indices, which keeps
a loop from becoming vector instructions. Flat, too, because slices of arrays cost more than a row of
arithmetic.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.compiled import compiled
from switchmamba.ops.parallel import cut, run_parallel
from switchmamba.ops.vector_math import sigmoid

BLOCK = 256
"""Time steps whose share of the weight's gradient is summed before the blocks are."""

CHANNELS = 512
"""Channels of one piece of work: the rows of a window then stay in the first-level cache."""

u = np.uint64


def causal_conv1d_cpu(
    x_BLI: Tensor,
    weight_IW: Tensor,
    bias_I: Tensor | None,
    activation: str | None,
    initial_state_BWI: Tensor | None,
    document_starts_BL: Tensor | None,
) -> Tensor:
    """Return y (B, L, I); all floating inputs share one dtype, fp32 or fp64."""
    batch, length, channels = x_BLI.shape
    reach = weight_IW.shape[1] - 1
    if initial_state_BWI is None:
        initial_state_BWI = x_BLI.new_empty(batch, 0, channels)
    if document_starts_BL is None:
        document_starts_BL = torch.full((batch, length), -reach)
    if bias_I is None:
        bias_I = x_BLI.new_zeros(channels)
    y: Tensor = _CausalConv1d.apply(  # type: ignore[no-untyped-call]
        x_BLI, weight_IW, bias_I, initial_state_BWI, document_starts_BL, activation == "silu"
    )
    return y


class _CausalConv1d(torch.autograd.Function):
    """y (B, L, I) from x, weight (I, W), bias, state (B, W-1 or 0, I) and document starts (B, L)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, state, starts)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype)
        run_parallel(_forward, _pieces(x), *_inputs(x, weight, bias, state, starts), silu, _flat(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state, starts = ctx.saved_tensors
        batch, length, channels = x.shape
        blocks, width = -(-length // BLOCK), weight.shape[1]
        dx = torch.zeros(x.shape, dtype=x.dtype)
        dstate = torch.zeros(state.shape, dtype=x.dtype)
        dfilters = x.new_zeros(batch, blocks, width + 1, channels)  # the taps' gradients, then the bias's
        scratch = x.new_empty(batch, channels)
        outputs = [_flat(tensor) for tensor in (dy, dx, dstate, dfilters, scratch)]
        run_parallel(_backward, _pieces(x), *_inputs(x, weight, bias, state, starts), ctx.silu, *outputs)
        dfilter = dfilters.sum(dim=(0, 1))
        return dx, dfilter[:width].t(), dfilter[width], dstate, None, None


def _pieces(x: Tensor) -> list[tuple[int, ...]]:
    """Return (first row, last row, first channel, last channel) of each piece of work; small work is one piece."""
    batch, _, channels = x.shape
    if x.numel() <= 1 << 15:
        return [(0, batch, 0, channels)]
    pieces = max(-(-channels // CHANNELS), min(-(-channels // 128), -(-8 // batch)))
    return [(row, row + 1, *channels_) for row in range(batch) for channels_ in cut(channels, pieces, 16)]


def _inputs(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, starts: Tensor) -> tuple[Any, ...]:
    """Return the kernels' first arguments; x may be a slice of a wider tensor, whose strides the kernels follow."""
    if x.stride(2) != 1:
        x = x.contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    x_flat = x.detach().as_strided((extent if x.numel() else 0,), (1,)).numpy()
    starts_BL = starts.contiguous().numpy()
    return x_flat, x.stride(0), x.stride(1), _flat(weight.t()), _flat(bias), _flat(state), starts_BL


def _flat(tensor: Tensor) -> NDArray[Any]:
    flat: NDArray[Any] = tensor.detach().contiguous().view(-1).numpy()
    return flat


@numba.njit(fastmath={"contract"})  # type: ignore[untyped-decorator]
def _multiply_add(out, out_at, a, a_at, b, b_at, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        out[out_at + i] += a[a_at + i] * b[b_at + i]


@numba.njit(fastmath={"contract"})  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    row, t, low, n, x, row_stride, stride, weight, bias, state, start, out, out_at
):
    """out = bias + Σ_lag weight[W-1-lag] · x[t-lag] over the lags that stay in the document; n channels from low."""
    channels = u(bias.size)
    reach = weight.size // bias.size - 1
    for i in range(n):
        out[out_at + i] = bias[low + i]
    for lag in range(min(reach, t - start) + 1):
        weight_at = u(reach - lag) * channels + low
        if t >= lag:
            x_at = u(row * row_stride + (t - lag) * stride) + low
            _multiply_add(out, out_at, weight, weight_at, x, x_at, n)
        elif state.size:
            state_at = u(row * reach + reach + t - lag) * channels + low
            _multiply_add(out, out_at, weight, weight_at, state, state_at, n)


@compiled
def _forward(  # type: ignore[no-untyped-def]
    first, last, low, high, x, row_stride, stride, weight, bias, state, starts, silu, y
):
    n, low = u(high - low), u(low)
    length = starts.shape[1]
    for row in range(first, last):
        for t in range(length):
            y_at = u(row * length + t) * u(bias.size) + low
            _convolve(row, t, low, n, x, row_stride, stride, weight, bias, state, starts[row, t], y, y_at)
            if silu:
                for i in range(n):
                    y[y_at + i] *= sigmoid(y[y_at + i])


@compiled
def _backward(  # type: ignore[no-untyped-def]
    first,
    last,
    low,
    high,
    x,
    row_stride,
    stride,
    weight,
    bias,
    state,
    starts,
    silu,
    dy,
    dx,
    dstate,
    dfilters,
    g,
):
    n, low = u(high - low), u(low)
    channels = u(bias.size)
    reach = weight.size // bias.size - 1
    length = starts.shape[1]
    blocks = (length + BLOCK - 1) // BLOCK
    for row in range(first, last):
        g_at = u(row) * channels + low
        for t in range(length):
            start = starts[row, t]
            dy_at = u(row * length + t) * channels + low
            filter_at = u((row * blocks + t // BLOCK) * (reach + 2)) * channels + low
            if silu:  # g = dy · silu'(pre-activation)
                _convolve(row, t, low, n, x, row_stride, stride, weight, bias, state, start, g, g_at)
                for i in range(n):
                    s = sigmoid(g[g_at + i])
                    g[g_at + i] = dy[dy_at + i] * s * (1 + g[g_at + i] * (1 - s))
            else:
                for i in range(n):
                    g[g_at + i] = dy[dy_at + i]
            for lag in range(min(reach, t - start) + 1):
                tap_at = u(reach - lag) * channels
                if t >= lag:
                    x_at = u(row * row_stride + (t - lag) * stride) + low
                    _multiply_add(dfilters, filter_at + tap_at, g, g_at, x, x_at, n)
                    _multiply_add(dx, dy_at - u(lag) * channels, g, g_at, weight, tap_at + low, n)
                elif state.size:
                    state_at = u(row * reach + reach + t - lag) * channels + low
                    _multiply_add(dfilters, filter_at + tap_at, g, g_at, state, state_at, n)
                    _multiply_add(dstate, state_at, g, g_at, weight, tap_at + low, n)
            bias_at = filter_at + u(reach + 1) * channels
            for i in range(n):
                dfilters[bias_at + i] += g[g_at + i]
