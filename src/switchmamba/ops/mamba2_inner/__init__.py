"""What a Mamba-2 layer does between its two projections (arXiv 2405.21060, figure 6):

    z, x, B, C, Δ = projected                       I + (I + 2·G·N) + H channels
    x, B, C = silu(causal_conv1d([x, B, C]))
    y       = ssd_scan(x, softplus(Δ + dt_bias), A, B, C, D)
    out     = gated_rms_norm(y, z)

Taken together, the backward pass can write the gradients of z, x, B, C and Δ where they belong in that of
``projected``; apart, torch's ``split`` would copy them all once more, and those of x, B and C twice.
"""

from functools import partial

from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_dimensions, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.mamba2_inner import composed

MAMBA2_INNER = Operation(
    "mamba2_inner",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.mamba2_inner.triton", "mamba2_inner"),
            needs_triton,
        ),
        Backend("composed", composed.mamba2_inner, always),
        Backend("reference", partial(composed.mamba2_inner, backend="reference"), always),
    ],
)


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    d_state: int,
    num_groups: int = 1,
    norm_eps: float = 1e-5,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input of a Mamba-2 layer's output projection, and its two states after the last step.

    Precision, gradients and documents are those of :func:`~switchmamba.ops.causal_conv1d`,
    :func:`~switchmamba.ops.ssd_scan` and :func:`~switchmamba.ops.gated_rms_norm`. Differentiable (once) in every
    floating input and through the final states.

    Args:
        projected: (B, L, 2·I + 2·G·N + H), L ≥ 1: z, x, B, C, Δ side by side.
        conv_weight: (I + 2·G·N, W), oldest tap first.
        conv_bias: (I + 2·G·N,) or None.
        A: (H,), negative.
        D: (H,), the skip connection.
        dt_bias: (H,), added to Δ before softplus.
        norm_weight: (I,).
        d_state: N.
        num_groups: G groups of heads share B and C; the norm is over each group's channels.
        norm_eps: added to the mean square.
        conv_state: (B, W-1, I + 2·G·N), the inputs of the convolution before ``projected``; None: zeros.
        ssm_state: (B, H, P, N) with P = I/H; None: zeros.
        document_ids: (B, L) integers, non-decreasing along a row; nothing crosses where they change.
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"composed"`` of the three operations, or ``"reference"``.

    Returns:
        out (B, L, I) in the dtype of ``projected``; the convolution's state in the same; h_L (B, H, P, N) in fp32 (fp64
        for fp64 ``projected``).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = MAMBA2_INNER.name
    require_dimensions(name, "projected", projected, "(B, L, 2·I + 2·G·N + H)")
    inner, heads = norm_weight.numel(), A.numel()
    shared = 2 * num_groups * d_state
    rows, length, _ = projected.shape
    require_shape(
        name, "projected", projected, "(B, L, 2·I + 2·G·N + H)", (rows, length, 2 * inner + shared + heads)
    )
    require_shape(name, "conv_weight", conv_weight, "(I + 2·G·N, W)", (inner + shared, conv_weight.shape[-1]))
    if num_groups < 1 or heads % num_groups or inner % heads:
        raise ConfigError(
            f"{name}: I={inner}, H={heads}, G={num_groups}; H must divide I, and G must divide H"
        )
    run = MAMBA2_INNER.choose(backend, projected.device, projected.dtype)
    out, next_conv_state, next_ssm_state = run(
        projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, d_state, num_groups, norm_eps,
        conv_state, ssm_state, document_ids,
    )  # fmt: skip
    return out, next_conv_state, next_ssm_state
