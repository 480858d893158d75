"""Causal depthwise convolution over time, with state and document boundaries (the ``conv1d`` of Mamba §3.4).

y_t = act(bias + Σ_j weight_j · x_{t-(W-1)+j}), j = 0 … W-1: the last tap sees the present, the first the oldest input.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always, only_cpu
from switchmamba.ops.causal_conv1d.cpu import causal_conv1d_cpu
from switchmamba.ops.causal_conv1d.reference import causal_conv1d_reference, causal_conv1d_step_reference
from switchmamba.ops.checks import require_dimensions, require_floating, require_integer, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton

_TRITON = "switchmamba.ops.causal_conv1d.triton"
_COMPUTING_DTYPES = (torch.float32, torch.float64)


def _in_computing_dtype(run: Callable[..., Any]) -> Callable[..., Any]:
    """Give a backend all its floating tensors in the dtype that it computes in: fp64 if one of them is, else fp32."""

    def call(*arguments: Any) -> Any:
        dtypes = {a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point()}
        if len(dtypes) == 1 and not dtypes.isdisjoint(_COMPUTING_DTYPES):
            return run(*arguments)
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        return run(
            *(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
        )

    return call


def _twice_if_asked(run: Callable[..., Any]) -> Callable[..., Any]:
    """Give a backend the last argument ``twice``; autograd adds the gradients of both."""

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        initial_state: Tensor | None,
        document_starts: Tensor | None,
        twice: bool = False,
    ) -> Any:
        y = run(x, weight, bias, activation, initial_state, document_starts)
        return (y, y) if twice else y

    return call


CAUSAL_CONV1D = Operation(
    "causal_conv1d",
    [
        Backend("triton", imported_when_called(_TRITON, "causal_conv1d"), needs_triton),
        Backend("cpu", _twice_if_asked(_in_computing_dtype(causal_conv1d_cpu)), only_cpu),
        Backend("reference", _twice_if_asked(_in_computing_dtype(causal_conv1d_reference)), always),
    ],
)
CAUSAL_CONV1D_STEP = Operation(
    "causal_conv1d_step",
    [
        Backend("triton", imported_when_called(_TRITON, "causal_conv1d_step"), needs_triton),
        Backend("reference", _in_computing_dtype(causal_conv1d_step_reference), always),
    ],
)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel of ``x`` with its own causal filter.

    Computes in fp32 (fp64 for fp64 ``x``). Differentiable in all floating inputs and through the final state;
    no gradient crosses a document boundary. The backward pass needs the inputs only.

    Args:
        x: (B, L, I), L ≥ 1.
        weight: (I, W), oldest tap first.
        bias: (I,).
        activation: None or ``"silu"``.
        initial_state: (B, W-1, I), the inputs before x, oldest first, part of each row's first document;
            None: zeros.
        document_ids: (B, L) integers, non-decreasing along a row; windows stop where they change.
        return_final_state: also return the state after the last input.
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"cpu"`` (numba) or ``"reference"``.

    Returns:
        y (B, L, I) in the dtype of x; with ``return_final_state`` also the state (B, W-1, I) in the dtype of
        x: the last W-1 inputs, oldest first, zeros in place of those from an earlier document.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    (y,), state = _convolve(
        x, weight, bias, activation, initial_state, document_ids, return_final_state, backend
    )
    return y if state is None else (y, state)


def causal_conv1d_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y twice and the final state, for a y that goes two ways; arguments as :func:`causal_conv1d`'s.

    Both are the same memory. Their two gradients meet in the backward kernel, where autograd would first add them.
    """
    (y, again), state = _convolve(
        x, weight, bias, activation, initial_state, document_ids, True, backend, twice=True
    )
    assert state is not None
    return y, again, state


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    return_final_state: bool,
    backend: str,
    twice: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return y, or it twice, and the final state."""
    name = CAUSAL_CONV1D.name
    require_dimensions(name, "x", x, "(B, L, I)")
    batch, length, channels = x.shape
    if length == 0:
        raise ConfigError(f"{name}: x has shape {tuple(x.shape)}; pass at least one time step")
    _check(name, channels, x, weight, bias, activation)
    reach = weight.shape[1] - 1
    if initial_state is not None:
        require_shape(name, "initial_state", initial_state, "(B, W-1, I)", (batch, reach, channels))
    if document_ids is not None:
        require_integer(name, "document_ids", document_ids)
        require_shape(name, "document_ids", document_ids, "(B, L)", (batch, length))
    run = CAUSAL_CONV1D.choose(backend, x.device, x.dtype)
    starts_BL = None if document_ids is None else _document_starts(document_ids, reach)
    y = run(x, weight, bias, activation, initial_state, starts_BL, twice)
    state = _final_state(x, reach, initial_state, starts_BL) if return_final_state else None
    return tuple(output.to(x.dtype) for output in (y if twice else (y,))), state


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve one more input per row: the step that :func:`causal_conv1d` repeats.

    Args:
        state: (B, W-1, I), the inputs before x, oldest first; it is not modified.
        x: (B, I).
        weight: (I, W), oldest tap first.
        bias: (I,).
        activation: None or ``"silu"``.
        backend: ``"auto"``, ``"triton"`` (a GPU) or ``"reference"``.

    Returns:
        y (B, I) and the new state (B, W-1, I), both in the dtype of x.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = CAUSAL_CONV1D_STEP.name
    require_dimensions(name, "x", x, "(B, I)")
    batch, channels = x.shape
    _check(name, channels, x, weight, bias, activation)
    if state.shape != (batch, weight.shape[1] - 1, channels):
        require_shape(name, "state", state, "(B, W-1, I)", (batch, weight.shape[1] - 1, channels))
    run = CAUSAL_CONV1D_STEP.choose(backend, x.device, x.dtype)
    y, new_state = run(state, x, weight, bias, activation)
    return y.to(x.dtype), new_state.to(x.dtype)


def _check(
    name: str, channels: int, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    require_floating(name, "x", x)
    require_dimensions(name, "weight", weight, "(I, W)")
    if weight.shape[0] != channels or weight.shape[1] == 0:  # decoding comes here for every token
        require_shape(name, "weight", weight, "(I, W)", (channels, max(1, weight.shape[1])))
    if bias is not None and bias.shape != (channels,):
        require_shape(name, "bias", bias, "(I,)", (channels,))
    if activation not in (None, "silu"):
        raise ConfigError(f"{name}: activation={activation!r} does not exist; choose None or 'silu'")


def _document_starts(document_ids_BL: Tensor, reach: int) -> Tensor:
    """Return (B, L) int64: the position where each position's document begins, -reach for a row's first document.

    The W-1 inputs before a row are part of its first document.
    """
    position_L = torch.arange(1, document_ids_BL.shape[1], device=document_ids_BL.device)
    changed_BL = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    start_BL = F.pad(torch.where(changed_BL, position_L, -reach), (1, 0), value=-reach)
    return start_BL.cummax(dim=1).values


def _final_state(x_BLI: Tensor, reach: int, initial_state: Tensor | None, starts_BL: Tensor | None) -> Tensor:
    batch, length, channels = x_BLI.shape
    state_BWI = x_BLI[:, max(0, length - reach) :]
    if length < reach:
        before_BWI = (
            x_BLI.new_zeros(batch, reach, channels) if initial_state is None else initial_state.to(x_BLI)
        )
        state_BWI = torch.cat([before_BWI[:, length:], state_BWI], dim=1)
    if starts_BL is not None:
        position_W = torch.arange(length - reach, length, device=x_BLI.device)
        same_document_BW = position_W >= starts_BL[:, -1:]
        state_BWI = torch.where(same_document_BW[..., None], state_BWI, 0)
    return state_BWI.clone(memory_format=torch.contiguous_format)  # else the state would keep all of x alive
