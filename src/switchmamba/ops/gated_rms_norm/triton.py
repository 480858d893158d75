# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Gated RMS norm on a GPU: one Triton kernel forward and one backward; each reads its inputs once and writes as often.

A program holds one group of channels of a row in registers, in fp32. The backward pass computes v = x · silu(z) and its
scale again; a program walks through a fixed run of rows and sums its share of the weight's gradient, and the shares are
summed afterwards: no atomics, so results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BACKWARD_PROGRAMS, _BACKWARD_STAGES = 1024, 3
"""Runs of rows that a GPU works on at a time, and how many rows each loads ahead."""


@triton.jit
def _gated(x, z, at, exists):
    """Return x, z, sigmoid(z) and v = x · silu(z) in fp32, 0 where nothing exists."""
    x_t = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    z_t = tl.load(z + at, mask=exists, other=0.0).to(tl.float32)
    gate = tl.sigmoid(z_t)
    return x_t, z_t, gate, x_t * z_t * gate


@triton.jit
def _forward(
    x, z, weight, y, groups, x_row, z_row, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Fill y (T, I)."""
    row, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    i = tl.arange(0, BLOCK)
    channel, exists = group * WIDTH + i, i < WIDTH
    _, _, _, v = _gated(x + row * x_row, z + (row * z_row), channel, exists)
    scale = tl.rsqrt(tl.sum(v * v, axis=0) / WIDTH + eps)
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    tl.store(y + row * groups * WIDTH + channel, (v * scale * w).to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows", "run"])
def _backward(
    x, z, weight, dy, dx, dz, dweight, rows, run, groups, x_row, z_row, dy_row, dz_row, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill dx, dz (T, I) and dweight (runs, I) with the runs still to be summed."""
    number, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    i = tl.arange(0, BLOCK)
    channel, exists = group * WIDTH + i, i < WIDTH
    w = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    first = number * run
    for row in tl.range(first, tl.minimum(first + run, rows), num_stages=STAGES):
        x_t, z_t, gate, v = _gated(x + row * x_row, z + row * z_row, channel, exists)
        g = tl.load(dy + row * dy_row + channel, mask=exists, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(v * v, axis=0) / WIDTH + eps)
        normal = v * scale
        dw += g * normal
        g *= w
        dv = scale * (g - normal * (tl.sum(g * normal, axis=0) / WIDTH))
        place = row * groups * WIDTH + channel
        tl.store(dx + place, (dv * z_t * gate).to(dx.dtype.element_ty), mask=exists)
        slope = gate * (1.0 + z_t * (1.0 - gate))
        tl.store(dz + row * dz_row + channel, (dv * x_t * slope).to(dz.dtype.element_ty), mask=exists)
    tl.store(dweight + number * groups * WIDTH + channel, dw, mask=exists)


def gated_rms_norm(x_TI: Tensor, z_TI: Tensor, weight_I: Tensor, groups: int, eps: float) -> Tensor:
    """Return y (T, I) in x's dtype; computed in fp32."""
    y: Tensor = _GatedRMSNorm.apply(
        _channels_together(x_TI), _channels_together(z_TI), weight_I.contiguous(), groups, eps
    )
    return y


def _channels_together(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _sizes(channels: int, groups: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels // groups)
    return {"WIDTH": channels // groups, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return run_forward(x, z, weight, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight = ctx.saved_tensors
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dx, dweight = run_backward(x, z, weight, ctx.groups, ctx.eps, _channels_together(dy), dz)
        return dx, dz, dweight, None, None


def run_forward(x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return y (T, I); channels of x and z must be contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        with torch.cuda.device_of(x):
            _forward[(x.shape[0] * groups,)](
                x, z, weight, y, groups, x.stride(0), z.stride(0), eps, **_sizes(x.shape[1], groups)
            )
    return y


def run_backward(
    x: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float, dy: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill dz, whose channels are contiguous, and return the gradients of x and the weight."""
    rows, channels = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    run = max(1, triton.cdiv(rows * groups, _BACKWARD_PROGRAMS))
    runs = triton.cdiv(rows, run)
    dweight = torch.empty(runs, channels, dtype=torch.float32, device=x.device)
    if rows > 0:
        with torch.cuda.device_of(x):
            _backward[(runs * groups,)](
                x, z, weight, dy, dx, dz, dweight, rows, run, groups,
                x.stride(0), z.stride(0), dy.stride(0), dz.stride(0), eps,
                **_sizes(channels, groups), STAGES=_BACKWARD_STAGES,
            )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)
