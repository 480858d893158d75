# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""AdamW's update of one tensor on a GPU (arXiv 1711.05101), every number read and written once.

    m = β1·m + (1 − β1)·g        v = β2·v + (1 − β2)·g²        g: the gradient after clipping
    p = (1 − lr·decay)·p − lr/(1 − β1^t) · m / (√(v/(1 − β2^t)) + eps)

Two things that torch's fused kernel does not do in one pass: the gradient is scaled on the way in and not written back,
and nothing at all happens once the device has seen something that is not finite.
"""

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _adamw(
    parameter, gradient, mean, square, step, divisor, stopped, rate, size, decay, eps, BETA1: tl.constexpr,
    BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update ``size`` numbers; ``step`` holds the updates before this one, ``divisor`` what the gradient is over.

    1 − β^t is fp64: for β near 1 and small t fp32 would lose half its digits.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    # The long loads first: what the few numbers below take is then hidden behind them.
    p = tl.load(parameter + place, mask=inside, other=0.0)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    t = tl.load(step).to(tl.float64) + 1
    scale, lr = 1 / tl.load(divisor), tl.load(rate)
    end = tl.where(tl.load(stopped) == 0, size, 0)
    correction1 = (1 - tl.exp2(t * LOG2_BETA1)).to(tl.float32)
    correction2 = (1 - tl.exp2(t * LOG2_BETA2)).to(tl.float32)
    g *= scale
    m += (1 - BETA1) * (g - m)
    v += (1 - BETA2) * (g * g - v)
    p *= 1 - lr * decay
    p -= (lr / correction1) * m / (tl.sqrt(v / correction2) + eps)
    tl.store(parameter + place, p, mask=place < end)
    tl.store(mean + place, m, mask=place < end)
    tl.store(square + place, v, mask=place < end)


def update_(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    divisor: Tensor,
    stopped: Tensor,
    rate: Tensor,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update parameter, mean and square (fp32, dense, alike) in place; the rest are one number each, on the device."""
    size = parameter.numel()
    with torch.cuda.device_of(parameter):
        _adamw[(triton.cdiv(size, _BLOCK),)](
            parameter, gradient, mean, square, step, divisor, stopped, rate, size, decay, eps,
            BETA1=betas[0], BETA2=betas[1], LOG2_BETA1=_log2(betas[0]), LOG2_BETA2=_log2(betas[1]), BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip


def _log2(beta: float) -> float:
    return log2(beta) if beta > 0 else -1e6
