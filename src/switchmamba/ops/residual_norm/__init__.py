"""One residual step's sum and the norm behind it: s = x + branch, y = norm(s).

LayerNorm (arXiv 1607.06450): (s - mean) / √(variance + eps) · weight + bias. RMSNorm (arXiv 1910.07467):
s / √(mean of s² + eps) · weight.
"""

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_floating, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.residual_norm.reference import residual_norm_reference

RESIDUAL_NORM = Operation(
    "residual_norm",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.residual_norm.triton", "residual_norm"),
            needs_triton,
        ),
        Backend("reference", residual_norm_reference, always),
    ],
)


def residual_norm(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centered: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return x + branch, and its norm over the last dimension.

    The statistics are fp32 (fp64 for fp64 x). Differentiable in all tensors; use the returned sum for what follows, and
    the gradients of both uses of it meet in one kernel.

    Args:
        x: (…, D), the residual stream.
        branch: of x's shape, in any dtype; None: the sum is x.
        weight: (D,).
        bias: (D,).
        eps: added to the variance, or to the mean square.
        centered: LayerNorm; False: RMSNorm.
        backend: ``"auto"``, ``"triton"`` (a GPU) or ``"reference"``.

    Returns:
        The sum in the dtype of x, and its norm in autocast's dtype where that is enabled (matrix products are what
        follows), otherwise in that of x; both (…, D).

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = RESIDUAL_NORM.name
    require_floating(name, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ConfigError(f"{name}: x has shape {tuple(x.shape)}; its last dimension must be at least 1")
    if branch is not None:
        require_shape(name, "branch", branch, "(…, D)", tuple(x.shape))
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_shape(name, argument, tensor, "(D,)", (x.shape[-1],))
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    run = RESIDUAL_NORM.choose(backend, x.device, x.dtype)
    total, normed = run(x, branch, weight, bias, eps, centered, dtype)
    return total, normed
