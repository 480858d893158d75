"""Selective scan, Mamba (arXiv 2312.00752) §3.2, eq. 2, and its single step:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

for each of I channels with a state of N numbers; Δ, B and C depend on the input. README.md says how the backends work.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_dimensions, require_floating, require_integer, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.nvrtc import needs_nvrtc
from switchmamba.ops.selective_scan import cpu, reference

_CUDA = "switchmamba.ops.selective_scan.cuda"
_TRITON = "switchmamba.ops.selective_scan.triton"

SELECTIVE_SCAN = Operation(
    "selective_scan",
    [
        Backend("cuda", imported_when_called(_CUDA, "selective_scan"), needs_nvrtc),
        Backend("triton", imported_when_called(_TRITON, "selective_scan"), needs_triton),
        Backend("cpu", cpu.selective_scan, cpu.unavailable),
        Backend("reference", reference.selective_scan, always),
    ],
)
SELECTIVE_STEP = Operation(
    "selective_step",
    [
        Backend("cuda", imported_when_called(_CUDA, "selective_step"), needs_nvrtc),
        Backend("triton", imported_when_called(_TRITON, "selective_step"), needs_triton),
        Backend("cpu", cpu.selective_step, cpu.unavailable),
        Backend("reference", reference.selective_step, always),
    ],
)


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan x with input-dependent steps: h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = (C_t h_t + D x_t) silu(z_t).

    Computes in fp32 (fp64 for fp64 ``x``) whatever the dtypes of the inputs. Differentiable (once) in every floating
    input and through the final state; no gradient crosses a document boundary. Time and memory grow linearly with L;
    nothing of size (B, L, I, N) is made, except by the reference's autograd. Any split of L into pieces that pass
    the state on gives the same bits as the whole.

    Args:
        x: (B, L, I), L ≥ 1.
        dt: (B, L, I), the step size Δ before ``dt_bias`` and softplus; without softplus it must not be negative.
        A: (I, N), negative: a state of channel i decays by exp(Δ A_in).
        B: (B, L, N), or (B, L, G, N) for G groups of I/G consecutive channels.
        C: of B's shape.
        D: (I,), the skip connection D·x; None: none.
        z: (B, L, I), the gate: y is multiplied by silu(z); None: no gate.
        dt_bias: (I,), added to ``dt``.
        dt_softplus: Δ = softplus(dt + dt_bias), linear above 20 as torch's.
        initial_state: (B, I, N), the state before x, part of each row's first document; None: zeros.
        document_ids: (B, L) integers, non-decreasing along a row; the state starts from zero where they change.
        return_final_state: also return the state after the last step.
        backend: ``"auto"``, ``"cuda"`` (NVIDIA; N ≤ 256), ``"triton"`` (a GPU), ``"cpu"`` (numba) or ``"reference"``.

    Returns:
        y (B, L, I) in the dtype of x; with ``return_final_state`` also h_L (B, I, N) in fp32 (fp64 for fp64 x).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = SELECTIVE_SCAN.name
    require_dimensions(name, "x", x, "(B, L, I)")
    B_BLGN, C_BLGN = _check(name, "B, L", x, dt, A, B, C, D, z, dt_bias, initial_state)
    starts_BL = None if document_ids is None else _document_starts(name, document_ids, x.shape[:2])
    run = SELECTIVE_SCAN.choose(_serving(backend, SELECTIVE_SCAN, x, A), x.device, x.dtype)
    y, final_state = run(x, dt, A, B_BLGN, C_BLGN, D, z, dt_bias, dt_softplus, initial_state, starts_BL)
    return (y, final_state) if return_final_state else y


def selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Take one step of :func:`selective_scan` from ``state``, which is not modified.

    Steps repeat the scan's bits on the same backend. Arguments are the scan's without L.

    Args:
        state: (B, I, N).
        x: (B, I).
        dt: (B, I).
        A: (I, N), negative.
        B: (B, N) or (B, G, N).
        C: of B's shape.
        D: (I,) or None.
        z: (B, I) or None.
        dt_bias: (I,) or None.
        dt_softplus: Δ = softplus(dt + dt_bias).
        backend: ``"auto"``, ``"cuda"`` (NVIDIA; N ≤ 256), ``"triton"`` (a GPU), ``"cpu"`` (numba) or ``"reference"``.

    Returns:
        y (B, I) in the dtype of x, and the next state (B, I, N) in fp32 (fp64 for fp64 x).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = SELECTIVE_STEP.name
    require_dimensions(name, "x", x, "(B, I)")
    B_BGN, C_BGN = _check(name, "B", x, dt, A, B, C, D, z, dt_bias, state)
    run = SELECTIVE_STEP.choose(_serving(backend, SELECTIVE_STEP, x, A), x.device, x.dtype)
    y, next_state = run(state, x, dt, A, B_BGN, C_BGN, D, z, dt_bias, dt_softplus)
    return y, next_state


def _serving(backend: str, operation: Operation, x: Tensor, A: Tensor) -> str:
    """Return the backend to ask for: the CUDA kernels have room for 256 states, Triton's for more."""
    if A.shape[1] <= 256 or x.device.type != "cuda":
        return backend
    if backend == "cuda":
        raise ConfigError(
            f"{operation.name}: N is {A.shape[1]}; backend='cuda' serves N up to 256, choose backend='triton'"
        )
    usable = operation.backends["triton"].unavailable(x.device, x.dtype) is None
    return ("triton" if usable else "reference") if backend == "auto" else backend


def _check(
    name: str,
    leading: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Refuse what does not fit x (B, L, I) or (B, I); return B and C with a dimension for groups."""
    *sizes, channels = x.shape
    require_dimensions(name, "A", A, "(I, N)")
    states = A.shape[1]
    if 0 in x.shape or states == 0:
        raise ConfigError(
            f"{name}: x has shape {tuple(x.shape)} and N is {states}; every size must be at least 1"
        )
    grouped = B.dim() > x.dim()
    groups = B.shape[-2] if grouped else 1
    if groups == 0 or channels % groups:
        raise ConfigError(f"{name}: B has G={groups} groups; choose G ≥ 1 that divides I={channels}")
    like_x, per_channel = (f"({leading}, I)", tuple(x.shape)), ("(I,)", (channels,))
    like_B = (f"({leading}, N)", (*sizes, states))
    if grouped:
        like_B = (f"({leading}, G, N)", (*sizes, groups, states))
    rules: tuple[tuple[str, Tensor | None, tuple[str, tuple[int, ...]]], ...] = (
        ("x", x, like_x),
        ("dt", dt, like_x),
        ("A", A, ("(I, N)", (channels, states))),
        ("B", B, like_B),
        ("C", C, like_B),
        ("D", D, per_channel),
        ("z", z, like_x),
        ("dt_bias", dt_bias, per_channel),
        ("state" if x.dim() == 2 else "initial_state", state, ("(B, I, N)", (x.shape[0], channels, states))),
    )
    for argument, tensor, (letters, shape) in rules:
        if tensor is None:
            continue
        if tensor.shape != shape:  # decoding comes here for every token: call nothing where nothing is wrong
            require_shape(name, argument, tensor, letters, shape)
        if not tensor.is_floating_point():
            require_floating(name, argument, tensor)
        if tensor.device != x.device:
            raise ConfigError(f"{name}: {argument} is on {tensor.device}; move it to x's device, {x.device}")
    return (B, C) if grouped else (B.unsqueeze(-2), C.unsqueeze(-2))


def _document_starts(name: str, document_ids: Tensor, shape: torch.Size) -> Tensor:
    """Return (B, L) bool: whether a document other than the row's first begins here."""
    require_integer(name, "document_ids", document_ids)
    require_shape(name, "document_ids", document_ids, "(B, L)", tuple(shape))
    starts_BL = torch.zeros_like(document_ids, dtype=torch.bool)
    starts_BL[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts_BL
