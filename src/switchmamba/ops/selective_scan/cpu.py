"""Selective scan on the CPU: the compiled kernels behind torch's autograd.

Training keeps the inputs and one state per ``CHUNK`` steps; nothing of size (B, L, I, N) exists. Without gradients not even
those states are kept. The sums over rows and over pieces of channels are taken one after the other, so results do not depend
on how torch would split a reduction over threads.
"""

from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from switchmamba.ops.parallel import cut, run_parallel
from switchmamba.ops.selective_scan import kernels

_SLICES = 16
"""Into how many calls of a kernel the work is cut: enough to balance some threads, few enough to cost nothing."""

_SMALL = 1 << 18
"""State-steps (about 0.2 ms) below which a second thread costs more than it brings."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot serve a device and dtype."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float64, float32, bfloat16 and float16, not {dtype}"
    return None


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
    """Return y (B, L, I) and the final state (B, I, N); arguments as the reference's."""
    compute = torch.float64 if x_BLI.dtype == torch.float64 else torch.float32
    (rows, _, channels), states = x_BLI.shape, A_IN.shape[1]
    if dt_bias_I is None:
        dt_bias_I = torch.zeros(channels, dtype=compute)
    if initial_state_BIN is None:
        initial_state_BNI = torch.zeros(rows, states, channels, dtype=compute)
    else:
        initial_state_BNI = initial_state_BIN.transpose(1, 2)
    given = (x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN, A_IN.t(), D_I, dt_bias_I, initial_state_BNI)
    tensors = [None if tensor is None else tensor.to(compute) for tensor in given]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y_BLI, final_state_BNI = _SelectiveScan.apply(dt_softplus, starts_BL, *tensors)
    else:
        y_BLI, final_state_BNI, _ = _forward(tensors, dt_softplus, starts_BL, keep_checkpoints=False)
    return y_BLI.to(x_BLI.dtype), final_state_BNI.transpose(1, 2).contiguous()


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
    """Return y (B, I) and the next state (B, I, N): a scan of length 1, so decoding repeats the scan's bits."""
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
    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> Any:
        softplus, starts_BL, *tensors = arguments
        y_BLI, final_state_BNI, checkpoints = _forward(tensors, softplus, starts_BL, keep_checkpoints=True)
        ctx.save_for_backward(*tensors, starts_BL, checkpoints)
        ctx.softplus = softplus  # type: ignore[attr-defined]
        return y_BLI, final_state_BNI

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *tensors, starts_BL, checkpoints = ctx.saved_tensors
        return None, None, *_backward(tensors, ctx.softplus, starts_BL, checkpoints, *gradients)


def _forward(
    tensors: Any, softplus: bool, starts_BL: Tensor | None, *, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, L, I), the final state (B, N, I) and, if they are to be kept, the states that entered the chunks."""
    x_BLI, _, _, B_BLGN, _, _, _, _, initial_state_BNI = tensors
    sizes = (*x_BLI.shape, *B_BLGN.shape[2:])
    y_BLI = x_BLI.new_empty(x_BLI.shape)
    final_state_BNI = x_BLI.new_empty(initial_state_BNI.shape)
    checkpoints = x_BLI.new_empty(kernels.checkpoint_rows(*sizes) if keep_checkpoints else 0, kernels.LANES)
    run_parallel(
        kernels.forward,
        _work(sizes),
        _inputs(tensors, starts_BL),
        sizes,
        softplus,
        *(_array(tensor) for tensor in (initial_state_BNI, y_BLI, final_state_BNI, checkpoints)),
    )
    return y_BLI, final_state_BNI, checkpoints


def _backward(
    tensors: Any,
    softplus: bool,
    starts_BL: Tensor | None,
    checkpoints: Tensor,
    dy_BLI: Tensor,
    dfinal_BNI: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``tensors``, None for those that are absent."""
    x_BLI, _, z_BLI, B_BLGN, _, _, D_I, _, initial_state_BNI = tensors
    sizes = (*x_BLI.shape, *B_BLGN.shape[2:])
    dx_BLI, ddt_BLI = x_BLI.new_empty(x_BLI.shape), x_BLI.new_empty(x_BLI.shape)
    dz_BLI = x_BLI.new_empty(0 if z_BLI is None else x_BLI.shape)
    dB_PBLGN, dC_PBLGN = (x_BLI.new_empty(kernels.pieces(*sizes), *B_BLGN.shape) for _ in "BC")
    dD_BI, ddt_bias_BI = (x_BLI.new_empty(x_BLI.shape[0], x_BLI.shape[2]) for _ in "Db")
    dA_BNI, dinitial_BNI = (x_BLI.new_empty(initial_state_BNI.shape) for _ in "Ah")
    outputs = (dx_BLI, ddt_BLI, dz_BLI, dB_PBLGN, dC_PBLGN, dD_BI, ddt_bias_BI, dA_BNI, dinitial_BNI)
    run_parallel(
        kernels.backward,
        _work(sizes),
        _inputs(tensors, starts_BL),
        sizes,
        softplus,
        *(_array(tensor) for tensor in (checkpoints, dy_BLI, dfinal_BNI, *outputs)),
    )
    return (
        dx_BLI,
        ddt_BLI,
        None if z_BLI is None else dz_BLI,
        _sum_first(dB_PBLGN),
        _sum_first(dC_PBLGN),
        _sum_first(dA_BNI),
        None if D_I is None else _sum_first(dD_BI),
        _sum_first(ddt_bias_BI),
        dinitial_BNI,
    )


def _work(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    rows, length, channels, _, states = sizes
    slices = _SLICES if rows * length * channels * states >= _SMALL else 1
    return cut(kernels.num_items(*sizes), slices)


def _inputs(tensors: Any, starts_BL: Tensor | None) -> kernels.Inputs:
    """Lay the inputs out as the kernels read them; only what is not contiguous along its channels is copied."""
    *sequences, A_NI, D_I, dt_bias_I, _ = tensors
    absent = A_NI.new_empty(0)
    memories, strides = zip(*(_memory(absent if tensor is None else tensor) for tensor in sequences), strict=True)
    return kernels.Inputs(
        *memories,
        strides=np.array(strides),
        A=_array(A_NI),
        D=_array(absent if D_I is None else D_I),
        dt_bias=_array(dt_bias_I),
        starts=_array(torch.empty(0, dtype=torch.bool) if starts_BL is None else starts_BL),
    )


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return the numbers of a tensor as one row, without a copy if it is contiguous."""
    array: NDArray[Any] = tensor.detach().reshape(-1).numpy()
    return array


def _memory(tensor: Tensor) -> tuple[NDArray[Any], tuple[int, int]]:
    """Return the memory behind a tensor (B, L, …), and how far apart its rows and its steps are in it."""
    if tensor.numel() == 0:
        return _array(tensor), (0, 0)
    inner = tensor.stride()[2:]
    if inner[-1] != 1 or (len(inner) == 2 and tensor.shape[2] > 1 and inner[0] != tensor.shape[3]):
        tensor = tensor.contiguous()
    rows, length = tensor.shape[:2]
    row, step = tensor.stride()[:2]
    extent = (rows - 1) * row + (length - 1) * step + tensor[0, 0].numel()
    return tensor.detach().as_strided((extent,), (1,)).numpy(), (row, step)


def _sum_first(partial: Tensor) -> Tensor:
    """Sum over the first dimension, one after the other."""
    return reduce(torch.add, partial.unbind())
