"""A projection whose output is used in two halves.

    x, z = (W_x u, W_z u)        du = W_xᵀ dx + W_zᵀ dz        dW = [dx uᵀ; dz uᵀ]

torch's autograd would first copy dx and dz into one tensor; here each half is multiplied where it lies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def project_halves(projection: nn.Module, u_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves (B, L, I) of ``projection(u)``, views of one tensor.

    The shorter way back is taken on a GPU, if the projection is a plain ``nn.Linear`` that no hook watches.
    """
    plain = type(projection) is nn.Linear and not (projection._forward_hooks or projection._forward_pre_hooks)
    if u_BLD.device.type == "cpu" or not plain or not torch.is_grad_enabled():
        x_BLI, z_BLI = projection(u_BLD).chunk(2, dim=-1)
        return x_BLI, z_BLI
    assert isinstance(projection, nn.Linear) and projection.bias is None
    return split_product(u_BLD, projection.weight)


def split_product(u_BLD: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of u Wᵀ for a weight (2·I, D), in autocast's dtype where that is enabled."""
    device_type = u_BLD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        u_BLD, weight = u_BLD.to(dtype), weight.to(dtype)
    x_BLI, z_BLI = _SplitProduct.apply(u_BLD, weight)  # type: ignore[no-untyped-call]
    return x_BLI, z_BLI


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, weight)
        x, z = F.linear(u, weight).chunk(2, dim=-1)
        return x, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, weight = ctx.saved_tensors
        inner = dx.shape[-1]
        dx_TI, dz_TI, u_TD = dx.reshape(-1, inner), dz.reshape(-1, inner), u.reshape(-1, u.shape[-1])
        du = dweight = None
        if ctx.needs_input_grad[0]:
            du = torch.mm(dx_TI, weight[:inner]).addmm_(dz_TI, weight[inner:]).view(u.shape)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight)
            torch.mm(dx_TI.t(), u_TD, out=dweight[:inner])
            torch.mm(dz_TI.t(), u_TD, out=dweight[inner:])
        return du, dweight
