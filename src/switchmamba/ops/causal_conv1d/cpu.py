"""Causal depthwise convolution on the CPU: compiled loops over time with the channels innermost.

Work is cut into rows of the batch and runs of channels; each piece owns what it writes, so there are no atomics and
the bits do not depend on the number of threads. SiLU is torch's; the backward pass computes its input again from x.
Sums over time are taken in blocks, which keeps the error of long fp32 sums small.

The kernels see flat arrays and unsigned offsets: numba then drops its test for negative indices, which keeps a loop
from becoming vector instructions. Flat, too, because slices of arrays cost more than a row of arithmetic.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from switchmamba.ops.compiled import compiled
from switchmamba.ops.parallel import cut, run_parallel

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
    before = 0 if initial_state_BWI is None else initial_state_BWI.shape[1]
    if initial_state_BWI is not None:
        x_BLI = torch.cat([initial_state_BWI, x_BLI], dim=1)
    starts_BL = torch.zeros(batch, before + length, dtype=torch.int64)
    if document_starts_BL is not None:
        starts_BL[:, before:] = (document_starts_BL + before).clamp(min=0)
    if bias_I is None:
        bias_I = x_BLI.new_zeros(channels)
    y_BLI: Tensor = _CausalConv1d.apply(  # type: ignore[no-untyped-call]
        x_BLI, weight_IW, bias_I, starts_BL, activation == "silu"
    )
    return y_BLI[:, before:]


class _CausalConv1d(torch.autograd.Function):
    """y (B, L, I) from x (B, L, I), weight (I, W), bias (I,) and each position's document start (B, L)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, starts)
        ctx.silu = silu
        y = _convolve(x, weight, bias, starts)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, starts = ctx.saved_tensors
        batch, length, channels = x.shape
        if ctx.silu:
            dy = torch.ops.aten.silu_backward(dy, _convolve(x, weight, bias, starts))
        dx = torch.zeros(x.shape, dtype=x.dtype)
        blocks, width = -(-length // BLOCK), weight.shape[1]
        dweights = x.new_zeros(batch, blocks, width, channels)
        arguments = (
            *_flat_input(x),
            _flat(weight.t()),
            starts.numpy(),
            _flat(dy),
            _flat(dx),
            _flat(dweights),
        )
        run_parallel(_backward, _pieces(x), *arguments)
        dbias = dy.sum(dim=(0, 1)) if ctx.needs_input_grad[2] else None
        return dx, dweights.sum(dim=(0, 1)).t(), dbias, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    arguments = (*_flat_input(x), _flat(weight.t()), starts.numpy(), _flat(bias), _flat(y))
    run_parallel(_forward, _pieces(x), *arguments)
    return y


def _pieces(x: Tensor) -> list[tuple[int, ...]]:
    """Return (first row, last row, first channel, last channel) of each piece of work; small work is one piece."""
    batch, _, channels = x.shape
    if x.numel() <= 1 << 15:
        return [(0, batch, 0, channels)]
    pieces = max(-(-channels // CHANNELS), min(-(-channels // 128), -(-8 // batch)))
    return [(row, row + 1, *run) for row in range(batch) for run in cut(channels, pieces, 16)]


def _flat_input(x: Tensor) -> tuple[NDArray[Any], int, int]:
    """Return the flat memory of x and its strides over rows and time: x is often half of a projection's output."""
    if x.stride(2) != 1:
        x = x.contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.detach().as_strided((extent if x.numel() else 0,), (1,)).numpy()
    return memory, x.stride(0), x.stride(1)


def _flat(tensor: Tensor) -> NDArray[Any]:
    memory: NDArray[Any] = tensor.detach().contiguous().view(-1).numpy()
    return memory


@numba.njit(fastmath={"contract"})  # type: ignore[untyped-decorator]
def _multiply_add(out, out_at, a, a_at, b, b_at, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        out[out_at + i] += a[a_at + i] * b[b_at + i]


@compiled
def _forward(  # type: ignore[no-untyped-def]
    first, last, low, high, x, row_stride, stride, weight, starts, bias, y
):
    n, low, channels, length = u(high - low), u(low), u(bias.size), starts.shape[1]
    reach = weight.size // bias.size - 1
    for row in range(first, last):
        for t in range(length):
            y_at = u(row * length + t) * channels + low
            for i in range(n):
                y[y_at + i] = bias[low + i]
            for lag in range(min(reach, t - starts[row, t]) + 1):
                x_at = u(row * row_stride + (t - lag) * stride) + low
                _multiply_add(y, y_at, weight, u(reach - lag) * channels + low, x, x_at, n)


@compiled
def _backward(  # type: ignore[no-untyped-def]
    first, last, low, high, x, row_stride, stride, weight, starts, dy, dx, dweights
):
    batch, length = starts.shape
    channels_ = dx.size // (batch * length)
    reach, blocks = weight.size // channels_ - 1, (length + BLOCK - 1) // BLOCK
    n, low, channels = u(high - low), u(low), u(channels_)
    for row in range(first, last):
        for t in range(length):
            dy_at = u(row * length + t) * channels + low
            dweight_at = u(row * blocks + t // BLOCK) * u(weight.size) + low
            for lag in range(min(reach, t - starts[row, t]) + 1):
                x_at = u(row * row_stride + (t - lag) * stride) + low
                tap_at = u(reach - lag) * channels
                _multiply_add(dweights, dweight_at + tap_at, dy, dy_at, x, x_at, n)
                _multiply_add(dx, dy_at - u(lag) * channels, dy, dy_at, weight, tap_at + low, n)
