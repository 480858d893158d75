# mypy: allow-untyped-calls
"""The Triton kernels of the three operations as one differentiable function, which makes one gradient of its input."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.causal_conv1d import _document_starts as convolution_starts
from switchmamba.ops.causal_conv1d import _final_state as convolution_state
from switchmamba.ops.causal_conv1d import triton as convolution
from switchmamba.ops.gated_rms_norm import triton as norm
from switchmamba.ops.ssd import _document_starts as scan_starts
from switchmamba.ops.ssd import triton as scan


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, L, I) and both states."""
    reach = conv_weight.shape[1] - 1
    begins = starts = None
    if document_ids is not None:
        begins = convolution_starts(document_ids, reach)
        starts = scan_starts("mamba2_inner", document_ids, projected.shape[:2]).to(torch.uint8)
    sizes = (norm_weight.shape[0], num_groups, d_state, A.shape[0])
    tensors = (
        projected.contiguous(),
        conv_weight.contiguous(),
        None if conv_bias is None else conv_bias.contiguous(),
        A.contiguous(),
        D.contiguous(),
        dt_bias.contiguous(),
        norm_weight.contiguous(),
        None if conv_state is None else conv_state.to(projected.dtype).contiguous(),
        None if ssm_state is None else ssm_state.float().contiguous(),
    )
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    int_begins = None if begins is None else begins.to(torch.int32)
    out, ssm_state = _Inner.apply(keep, sizes, norm_eps, int_begins, starts, *tensors)
    inner, heads = sizes[0], sizes[3]
    return out, convolution_state(projected[..., inner:-heads], reach, conv_state, begins), ssm_state


def _parts(
    projected: Tensor, convolved: Tensor, sizes: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cut z (T, I), [x, B, C] (B, L, J) and Δ (B, L, H) from the one, x, B and C by themselves from the other."""
    inner, groups, states, heads = sizes
    z, xBC, dt = projected.split([inner, convolved.shape[-1], heads], dim=-1)
    x, B, C = convolved.split([inner, groups * states, groups * states], dim=-1)
    return (
        z.flatten(0, 1),
        xBC,
        dt,
        x.unflatten(-1, (heads, -1)),
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
    )


class _Inner(torch.autograd.Function):
    """Convolution, scan and norm; no gradient leaves a kernel for anywhere but its place in the whole."""

    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        sizes: tuple[int, int, int, int],
        eps: float,
        begins: Tensor | None,
        starts: Tensor | None,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        norm_weight: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inner, groups, _, heads = sizes
        xBC = projected[..., inner:-heads]
        convolved = convolution._run_forward(xBC, conv_weight, conv_bias, conv_state, begins, True)
        z, _, dt, x, B, C = _parts(projected, convolved, sizes)
        y, final, kept = scan.run_forward(keep, True, starts, x, dt, A, B, C, D, dt_bias, ssm_state)
        out = norm.run_forward(y.view(-1, inner), z, norm_weight, groups, eps).view(
            *projected.shape[:2], inner
        )
        ctx.sizes, ctx.eps = sizes, eps
        if keep:
            ctx.save_for_backward(
                *kept, begins, projected, convolved, y, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state
            )  # fmt: skip
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        sizes, eps = ctx.sizes, ctx.eps
        inner, groups, *_ = sizes
        (
            *kept, begins, projected, convolved, y, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state
        ) = ctx.saved_tensors  # fmt: skip
        z, xBC, dt, x, B, C = _parts(projected, convolved, sizes)
        dprojected, dconvolved = torch.empty_like(projected), torch.empty_like(convolved)
        dz, dxBC, ddt, dx, dB, dC = _parts(dprojected, dconvolved, sizes)
        dy, dnorm_weight = norm.run_backward(
            y.view(-1, inner), z, norm_weight, groups, eps, dout.reshape(-1, inner).contiguous(), dz
        )
        dA, dD, ddt_bias, dssm_state = scan.run_backward(
            True, kept, x, dt, A, B, C, D, dt_bias, dy.view(y.shape), dfinal, dx, ddt, dB, dC
        )
        dconv_weight, dconv_bias, dconv_state = convolution._run_backward(
            xBC, conv_weight, conv_bias, conv_state, begins, True, dconvolved, dxBC
        )
        return (
            *(None,) * 5, dprojected, dconv_weight, dconv_bias, dA, dD, ddt_bias, dnorm_weight, dconv_state,
            dssm_state if ctx.needs_input_grad[-1] else None,
        )  # fmt: skip
