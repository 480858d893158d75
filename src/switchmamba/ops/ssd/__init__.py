"""State space duality, the scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060), and its single step:

    h_t = exp(Δ_t A_h) h_{t-1} + Δ_t x_t ⊗ B_t          y_t = h_t C_t + D_h x_t

for each of H heads with P channels and a state of P × N numbers. One decay per head and step lets matrix products do
the work, chunk by chunk. README.md says how the backends work.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_dimensions, require_floating, require_integer, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.ssd import eager, reference

_TRITON = "switchmamba.ops.ssd.triton"

SSD_SCAN = Operation(
    "ssd_scan",
    [
        Backend("triton", imported_when_called(_TRITON, "ssd_scan"), needs_triton),
        Backend("eager", eager.ssd_scan, always),
        Backend("reference", reference.ssd_scan, always),
    ],
)
SSD_STEP = Operation(
    "ssd_step",
    [
        Backend("triton", imported_when_called(_TRITON, "ssd_step"), needs_triton),
        Backend("eager", eager.ssd_step, always),
        Backend("reference", reference.ssd_step, always),
    ],
)


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    *,
    return_final_state: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan x with one decay per head and step: h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t ⊗ B_t, y_t = h_t C_t + D x_t.

    Step sizes, decays, states and sums are fp32 (fp64 for fp64 ``x``), and so are the operands of matrix products, but
    that the Triton backend rounds them to bf16 or fp16 if x is that. Differentiable (once) in every floating input and
    through the final state; no gradient crosses a document boundary. Time and memory grow linearly with L; nothing of
    size (B, L, H, P, N) is made, except by the reference's autograd. Pieces of L that pass the state on give the
    results of the whole up to rounding. Matrix products compute a chunk, so a NaN or infinity in x, B or C may reach
    every output of its chunk, earlier ones too; the reference keeps it to later ones.

    Args:
        x: (B, L, H, P), L ≥ 1.
        dt: (B, L, H), the step size Δ before ``dt_bias`` and softplus; without softplus it must not be negative.
        A: (H,), negative: the state of head h decays by exp(Δ A_h).
        B: (B, L, G, N), for G groups of H/G consecutive heads.
        C: of B's shape.
        D: (H,), the skip connection D·x; None: none.
        dt_bias: (H,), added to ``dt``.
        dt_softplus: Δ = softplus(dt + dt_bias), linear above 20 as torch's.
        initial_state: (B, H, P, N), the state before x, part of each row's first document; None: zeros.
        document_ids: (B, L) integers, non-decreasing along a row; the state starts from zero where they change.
        return_final_state: also return the state after the last step.
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"eager"`` (any device) or ``"reference"``.

    Returns:
        y (B, L, H, P) in the dtype of x; with ``return_final_state`` also h_L (B, H, P, N) in fp32 (fp64 for fp64 x).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = SSD_SCAN.name
    require_dimensions(name, "x", x, "(B, L, H, P)")
    _check(name, "B, L", x, dt, A, B, C, D, dt_bias, initial_state)
    starts_BL = None if document_ids is None else _document_starts(name, document_ids, x.shape[:2])
    run = SSD_SCAN.choose(backend, x.device, x.dtype)
    y, final_state = run(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_state, starts_BL)
    return (y, final_state) if return_final_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Take one step of :func:`ssd_scan` from ``state``, which is not modified; all in fp32 (fp64 for fp64 x).

    Arguments are the scan's without L.

    Args:
        state: (B, H, P, N).
        x: (B, H, P).
        dt: (B, H).
        A: (H,), negative.
        B: (B, G, N).
        C: of B's shape.
        D: (H,) or None.
        dt_bias: (H,) or None.
        dt_softplus: Δ = softplus(dt + dt_bias).
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"eager"`` (any device) or ``"reference"``.

    Returns:
        y (B, H, P) in the dtype of x, and the next state (B, H, P, N) in fp32 (fp64 for fp64 x).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = SSD_STEP.name
    require_dimensions(name, "x", x, "(B, H, P)")
    _check(name, "B", x, dt, A, B, C, D, dt_bias, state)
    run = SSD_STEP.choose(backend, x.device, x.dtype)
    y, next_state = run(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    return y, next_state


def _check(
    name: str,
    leading: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
) -> None:
    """Refuse what does not fit x (B, L, H, P) or (B, H, P)."""
    *sizes, heads, head_dim = x.shape
    require_dimensions(name, "B", B, f"({leading}, G, N)")
    groups, states = B.shape[-2:]
    if 0 in x.shape or states == 0:
        raise ConfigError(
            f"{name}: x has shape {tuple(x.shape)} and N is {states}; every size must be at least 1"
        )
    if groups == 0 or heads % groups:
        raise ConfigError(f"{name}: B has G={groups} groups; choose G ≥ 1 that divides H={heads}")
    per_head, like_B = ("(H,)", (heads,)), (f"({leading}, G, N)", (*sizes, groups, states))
    state_shape = (x.shape[0], heads, head_dim, states)
    rules: tuple[tuple[str, Tensor | None, tuple[str, tuple[int, ...]]], ...] = (
        ("x", x, (f"({leading}, H, P)", tuple(x.shape))),
        ("dt", dt, (f"({leading}, H)", (*sizes, heads))),
        ("A", A, per_head),
        ("B", B, like_B),
        ("C", C, like_B),
        ("D", D, per_head),
        ("dt_bias", dt_bias, per_head),
        ("state" if x.dim() == 3 else "initial_state", state, ("(B, H, P, N)", state_shape)),
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


def _document_starts(name: str, document_ids: Tensor, shape: torch.Size) -> Tensor:
    """Return (B, L) bool: whether a document other than the row's first begins here."""
    require_integer(name, "document_ids", document_ids)
    require_shape(name, "document_ids", document_ids, "(B, L)", tuple(shape))
    starts_BL = torch.zeros_like(document_ids, dtype=torch.bool)
    starts_BL[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts_BL
