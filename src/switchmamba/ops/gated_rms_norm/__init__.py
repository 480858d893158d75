"""The norm that ends a Mamba-2 layer (arXiv 2405.21060, §7.1): the RMS norm (arXiv 1910.07467) of a gated input.

v = x · silu(z)          y = v / √(mean v² + eps) · weight          mean over each group of channels
"""

from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_floating, require_shape
from switchmamba.ops.gated_rms_norm import eager, reference
from switchmamba.ops.gpu import imported_when_called, needs_triton

GATED_RMS_NORM = Operation(
    "gated_rms_norm",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.gated_rms_norm.triton", "gated_rms_norm"),
            needs_triton,
        ),
        Backend("eager", eager.gated_rms_norm, always),
        Backend("reference", reference.gated_rms_norm, always),
    ],
)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, groups: int = 1, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """Return the RMS norm of x · silu(z), group by group of channels.

    Computes in fp32 (fp64 for fp64 ``x``). Differentiable (once) in x, z and weight; the backward pass needs the inputs
    only.

    Args:
        x: (…, I).
        z: of x's shape, the gate.
        weight: (I,), the scale of each channel.
        groups: G groups of I/G consecutive channels are normalised by themselves.
        eps: added to the mean square.
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"eager"`` (any device) or ``"reference"``.

    Returns:
        y (…, I) in the dtype of x.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = GATED_RMS_NORM.name
    if weight.dim() != 1:
        raise ConfigError(f"{name}: weight has shape {tuple(weight.shape)}; it must be (I,)")
    channels = weight.shape[0]
    if x.dim() == 0 or x.shape[-1] != channels or channels == 0:
        raise ConfigError(f"{name}: x has shape {tuple(x.shape)}; its last size must be weight's, {channels}")
    require_shape(name, "z", z, "x's shape", tuple(x.shape))
    for argument, tensor in (("x", x), ("z", z), ("weight", weight)):
        require_floating(name, argument, tensor)
        if tensor.device != x.device:
            raise ConfigError(f"{name}: {argument} is on {tensor.device}; move it to x's device, {x.device}")
    if groups < 1 or channels % groups:
        raise ConfigError(f"{name}: groups={groups}; choose G ≥ 1 that divides I={channels}")
    run = GATED_RMS_NORM.choose(backend, x.device, x.dtype)
    y: Tensor = run(x.reshape(-1, channels), z.reshape(-1, channels), weight, groups, eps)
    return y.view(x.shape)
