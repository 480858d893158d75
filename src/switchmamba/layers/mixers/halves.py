"""Projections of a mixer whose way back is shorter than autograd's.

    y = W u                      du = Wᵀ dy               dW = dy uᵀ
    x, z = (W_x u, W_z u)        du = W_xᵀ dx + W_zᵀ dz   dW = [dx uᵀ; dz uᵀ]

Under autocast the gradient of a weight leaves its product in the weight's own dtype, where autograd would first round
it to autocast's and then cast it. Of an output that is used in two halves each is multiplied where it lies, where
autograd would first copy both into one tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchmamba.layers.wrapping import is_plain


def widened(tensor: Tensor, extra: int) -> Tensor:
    """Return a tensor with ``extra`` rows of zeros behind its own."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, extra)) if extra else tensor


def project(projection: nn.Module, u_BLD: Tensor, extra: int = 0) -> Tensor:
    """Return ``projection(u)``, of which the last ``extra`` channels are padding and zero.

    The shorter way back is taken on a GPU, if the projection is a plain ``nn.Linear`` that no hook watches; so must it
    be where there is padding.
    """
    if extra:
        assert isinstance(projection, nn.Linear)
        return product(u_BLD, F.pad(projection.weight, (0, extra)))
    if not _is_plain(projection, u_BLD):
        projected: Tensor = projection(u_BLD)
        return projected
    assert isinstance(projection, nn.Linear)
    return product(u_BLD, projection.weight)


def project_halves(projection: nn.Module, u_BLD: Tensor, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return both halves (B, L, I) of ``projection(u)``, views of one tensor; the way back as of :func:`project`.

    With ``extra`` each half has as many channels of zeros more.
    """
    if extra:
        assert isinstance(projection, nn.Linear)
        return split_product(u_BLD, torch.cat([widened(half, extra) for half in projection.weight.chunk(2)]))
    if not _is_plain(projection, u_BLD):
        x_BLI, z_BLI = projection(u_BLD).chunk(2, dim=-1)
        return x_BLI, z_BLI
    assert isinstance(projection, nn.Linear)
    return split_product(u_BLD, projection.weight)


def product(u: Tensor, weight: Tensor) -> Tensor:
    """Return u Wᵀ (…, N) for u (…, D) and a weight (N, D), in autocast's dtype where that is enabled."""
    y: Tensor = _Product.apply(u, weight, _dtype(u))  # type: ignore[no-untyped-call]
    return y


def split_product(u_BLD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of u Wᵀ for a weight (2·I, D), in autocast's dtype where that is enabled."""
    x_BLI, z_BLI = _SplitProduct.apply(u_BLD, weight, _dtype(u_BLD))  # type: ignore[no-untyped-call]
    return x_BLI, z_BLI


def _is_plain(projection: nn.Module, u_BLD: Tensor) -> bool:
    return u_BLD.device.type != "cpu" and is_plain(projection) and torch.is_grad_enabled()


def _dtype(u: Tensor) -> torch.dtype:
    device_type = u.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else u.dtype


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.u_dtype, ctx.weight_dtype = u.dtype, weight.dtype
        u, weight = u.to(dtype), weight.to(dtype)
        ctx.save_for_backward(u, weight)
        return F.linear(u, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        dy_TN, u_TD = dy.reshape(-1, dy.shape[-1]), u.reshape(-1, u.shape[-1])
        du = dweight = None
        if ctx.needs_input_grad[0]:
            du = torch.mm(dy_TN, weight).view(u.shape).to(ctx.u_dtype)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight, dtype=ctx.weight_dtype)
            _product_into(dweight, dy_TN.t(), u_TD)
        return du, dweight, None


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.u_dtype, ctx.weight_dtype = u.dtype, weight.dtype
        u, weight = u.to(dtype), weight.to(dtype)
        ctx.save_for_backward(u, weight)
        x, z = F.linear(u, weight).chunk(2, dim=-1)
        return x, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        inner = dx.shape[-1]
        dx_TI, dz_TI, u_TD = dx.reshape(-1, inner), dz.reshape(-1, inner), u.reshape(-1, u.shape[-1])
        du = dweight = None
        if ctx.needs_input_grad[0]:
            du = torch.mm(dx_TI, weight[:inner]).addmm_(dz_TI, weight[inner:])
            du = du.view(u.shape).to(ctx.u_dtype)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight, dtype=ctx.weight_dtype)
            _product_into(dweight[:inner], dx_TI.t(), u_TD)
            _product_into(dweight[inner:], dz_TI.t(), u_TD)
        return du, dweight, None


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Fill ``out`` with a b; it may be wider than they are."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))
