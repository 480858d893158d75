"""Selective scan on the CPU: the compiled kernels behind torch's autograd.

Training keeps the inputs and one state per ``CHUNK`` steps; nothing of size (B, L, I, N) exists. Without gradients
not even those states are kept. The sums over rows and over pieces of channels are taken one after the other, in one
thread, so results do not depend on how torch would split a reduction over threads.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.parallel import cut, run_parallel
from switchmamba.ops.selective_scan import kernels
from switchmamba.ops.selective_scan.lanes import LANES

_NOTHING: dict[torch.dtype, NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
}
_NO_STARTS = np.empty(0, np.bool_)

_SMALL = 1 << 18
"""State-steps (about 0.2 ms) below which a second thread costs more than it brings."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot serve a device and dtype."""
    if device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {device.type}"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float64, float32, bfloat16 and float16, not {dtype}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT forbids compiling; unset it"
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
    tensors = _in_computing_dtype(
        x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN, A_IN, D_I, dt_bias_I, initial_state_BIN
    )
    if _wants_gradients(tensors):
        y_BLI, final_state_BIN = _SelectiveScan.apply(dt_softplus, starts_BL, *tensors)  # type: ignore[no-untyped-call]
    else:
        y_BLI, final_state_BIN, _ = _forward(tensors, dt_softplus, starts_BL, keep_checkpoints=False)
    return y_BLI.to(x_BLI.dtype), final_state_BIN


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
    tensors = _in_computing_dtype(x_BI, dt_BI, z_BI, B_BGN, C_BGN, A_IN, D_I, dt_bias_I, state_BIN)
    if _wants_gradients(tensors):
        sequences = (None if t is None else t.unsqueeze(1) for t in tensors[:5])
        y_BLI, next_state_BIN = _SelectiveScan.apply(dt_softplus, None, *sequences, *tensors[5:])  # type: ignore[no-untyped-call]
        return y_BLI.squeeze(1).to(x_BI.dtype), next_state_BIN
    # What follows is _forward without all that one step can do without: decoding is paid by the call.
    like = tensors[0]
    assert like is not None
    (rows, channels), (groups, states) = x_BI.shape, B_BGN.shape[1:]
    sizes = (rows, 1, channels, groups, states)
    work = _work(sizes)
    scratch = like.new_empty(len(work), kernels.forward_scratch_rows(states), LANES)
    y_BI, next_state_BIN = like.new_empty(rows, channels), like.new_empty(rows, channels, states)
    x, dt, z, B, C, A, D, dt_bias, state = (_array(tensor, like) for tensor in tensors)
    strides = ((channels, 0),) * 3 + ((groups * states, 0),) * 2
    outputs = (_array(tensor, like) for tensor in (y_BI, next_state_BIN, None))
    run_parallel(
        kernels.forward,
        work,
        *(
            x,
            dt,
            z,
            B,
            C,
            strides,
            A,
            D,
            dt_bias,
            _NO_STARTS,
            sizes,
            dt_softplus,
            _array(scratch, like),
            state,
        ),
        *outputs,
    )
    return y_BI.to(x_BI.dtype), next_state_BIN


def _in_computing_dtype(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [t if t is None or t.dtype == compute else t.to(compute) for t in (x, *others)]


def _wants_gradients(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        softplus, starts_BL, *tensors = arguments
        y_BLI, final_state_BIN, checkpoints = _forward(tensors, softplus, starts_BL, keep_checkpoints=True)
        ctx.save_for_backward(*tensors, starts_BL, checkpoints)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        return y_BLI, final_state_BIN

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BLI: Tensor | None, dfinal_BIN: Tensor | None) -> Any:
        *tensors, starts_BL, checkpoints = ctx.saved_tensors
        if dy_BLI is None:
            dy_BLI = torch.zeros_like(tensors[0])
        return None, None, *_backward(tensors, ctx.softplus, starts_BL, checkpoints, dy_BLI, dfinal_BIN)


def _forward(
    tensors: Any, softplus: bool, starts_BL: Tensor | None, *, keep_checkpoints: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y (B, L, I), the final state (B, I, N) and, if they are to be kept, the states that entered the chunks."""
    x_BLI, _, _, B_BLGN, _, A_IN, *_, initial_state_BIN = tensors
    sizes = (*x_BLI.shape, *B_BLGN.shape[2:])
    y_BLI = x_BLI.new_empty(x_BLI.shape)
    final_state_BIN = x_BLI.new_empty(x_BLI.shape[0], *A_IN.shape)
    checkpoints = x_BLI.new_empty(kernels.checkpoint_rows(*sizes), LANES) if keep_checkpoints else None
    work = _work(sizes)
    scratch = x_BLI.new_empty(len(work), kernels.forward_scratch_rows(sizes[-1]), LANES)
    run_parallel(
        kernels.forward,
        work,
        *_inputs(tensors, starts_BL),
        sizes,
        softplus,
        *(_array(t, x_BLI) for t in (scratch, initial_state_BIN, y_BLI, final_state_BIN, checkpoints)),
    )
    return y_BLI, final_state_BIN, checkpoints


def _backward(
    tensors: Any,
    softplus: bool,
    starts_BL: Tensor | None,
    checkpoints: Tensor,
    dy_BLI: Tensor,
    dfinal_BIN: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``tensors``, None for those that are absent."""
    x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN, A_IN, D_I, dt_bias_I, initial_state_BIN = tensors
    sizes = (*x_BLI.shape, *B_BLGN.shape[2:])
    rows, pieces = x_BLI.shape[0], kernels.pieces(*sizes)

    def gradient(tensor: Tensor | None, *parts: int) -> Tensor | None:
        return None if tensor is None else x_BLI.new_empty(*parts, *tensor.shape)

    whole = [gradient(tensor) for tensor in (x_BLI, dt_BLI, z_BLI)]
    by_piece = [gradient(tensor, pieces) for tensor in (B_BLGN, C_BLGN)]
    by_row = [gradient(tensor, rows) for tensor in (A_IN, D_I, dt_bias_I)]
    initial = gradient(initial_state_BIN)
    work = _work(sizes)
    scratch = x_BLI.new_empty(len(work), kernels.backward_scratch_rows(sizes[-1]), LANES)
    run_parallel(
        kernels.backward,
        work,
        *_inputs(tensors, starts_BL),
        sizes,
        softplus,
        *(_array(t, x_BLI) for t in (scratch, checkpoints, dy_BLI, dfinal_BIN)),
        *(_array(t, x_BLI) for t in (*whole, *by_piece, *by_row, initial)),
    )
    return *whole, *map(_sum_first, by_piece), *map(_sum_first, by_row), initial


def _work(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return (number, first work item, item after the last) of each call of a kernel.

    More calls than threads balance the threads; one thread, or little work, needs one call.
    """
    rows, length, channels, _, states = sizes
    threads = torch.get_num_threads() if rows * length * channels * states >= _SMALL else 1
    slices = cut(kernels.num_items(*sizes), 1 if threads == 1 else 4 * threads)
    return [(number, *items) for number, items in enumerate(slices)]


def _inputs(tensors: Any, starts_BL: Tensor | None) -> tuple[Any, ...]:
    """Return the fields of ``kernels.Inputs``; only what is not contiguous along its channels is copied."""
    x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN, A_IN, D_I, dt_bias_I, _ = tensors
    memories, strides = [], []
    for tensor in (x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN):
        memory, stride = _memory(tensor, x_BLI)
        memories.append(memory)
        strides.append(stride)
    vectors = (_array(tensor, x_BLI) for tensor in (A_IN, D_I, dt_bias_I))
    starts = _NO_STARTS if starts_BL is None else starts_BL.numpy().ravel()
    return (*memories, tuple(strides), *vectors, starts)


def _memory(tensor: Tensor | None, like: Tensor) -> tuple[NDArray[Any], tuple[int, int]]:
    """Return the memory behind a tensor (B, L, I) or (B, L, G, N), and how far apart rows and steps are in it."""
    if tensor is None:
        return _NOTHING[like.dtype], (0, 0)
    row, step, *inner = tensor.stride()
    if tensor.is_contiguous():
        return _array(tensor, like), (row, step)
    if inner[-1] != 1 or (len(inner) == 2 and tensor.shape[2] > 1 and inner[0] != tensor.shape[3]):
        return _memory(tensor.contiguous(), like)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _array(tensor.as_strided((extent,), (1,)), like), (row, step)


def _array(tensor: Tensor | None, like: Tensor) -> NDArray[Any]:
    """Return the numbers of a tensor in one row, without a copy if it is contiguous; nothing for None."""
    if tensor is None:
        return _NOTHING[like.dtype]
    array: NDArray[Any] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array.ravel()


def _sum_first(parts: Tensor | None) -> Tensor | None:
    """Sum over the first dimension, one after the other; numpy's one thread leaves no OpenMP thread spinning."""
    return None if parts is None else torch.from_numpy(np.add.reduce(parts.numpy(), axis=0))
