# mypy: allow-untyped-calls
"""The three operations one after the other, each by the backend that is asked for."""

from torch import Tensor

from switchmamba.ops.causal_conv1d import causal_conv1d
from switchmamba.ops.gated_rms_norm import gated_rms_norm
from switchmamba.ops.ssd import ssd_scan


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    d_state: int,
    num_groups: int,
    norm_eps: float,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    document_ids: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, L, I) and both states."""
    inner, heads, shared = norm_weight.shape[0], A.shape[0], num_groups * d_state
    z, xBC, dt = projected.split([inner, inner + 2 * shared, heads], dim=-1)
    xBC, conv_state = causal_conv1d(
        xBC,
        conv_weight,
        conv_bias,
        "silu",
        conv_state,
        document_ids,
        return_final_state=True,
        backend=backend,
    )
    x, B, C = xBC.split([inner, shared, shared], dim=-1)
    y, ssm_state = ssd_scan(
        x.unflatten(-1, (heads, -1)),
        dt,
        A,
        B.unflatten(-1, (num_groups, -1)),
        C.unflatten(-1, (num_groups, -1)),
        D,
        dt_bias,
        dt_softplus=True,
        initial_state=ssm_state,
        document_ids=document_ids,
        return_final_state=True,
        backend=backend,
    )
    out = gated_rms_norm(y.flatten(-2), z, norm_weight, num_groups, norm_eps, backend)
    return out, conv_state, ssm_state
