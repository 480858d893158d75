"""A linear map whose weight is stored in eight bits, for inference.

W_oi ≈ scale_o · q_oi  with integers |q| ≤ 127          y_o = scale_o · Σ_i q_oi x_i

One scale for each row of the weight (symmetric, absolute maximum): an entry is off by at most half a scale. x is not
rounded.
"""

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_floating, require_shape
from switchmamba.ops.gpu import imported_when_called
from switchmamba.ops.int8_linear import eager, reference

LARGEST = 127


def _only_float32_on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it serves the CPU, the inputs are on {device.type}"
    return None if dtype == torch.float32 else f"it computes in fp32, x is {dtype}"


INT8_LINEAR = Operation(
    "int8_linear",
    [
        Backend(
            "cpu",
            imported_when_called("switchmamba.ops.int8_linear.cpu", "int8_linear_cpu"),
            _only_float32_on_cpu,
        ),
        Backend("eager", eager.int8_linear, always),
        Backend("reference", reference.int8_linear, always),
    ],
)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, backend: str = "auto") -> Tensor:
    """Return y (…, O) in the dtype of x, or in autocast's.

    Differentiable in x, as adapters beside it need; weight and scale are constants.

    Args:
        x: (…, I).
        weight: (O, I) int8.
        scale: (O,) floating.
        backend: ``"auto"``, ``"cpu"`` (fp32; for a few rows the weight is read as it is), ``"eager"`` (any device: the
            weight is widened to x's dtype for the product) or ``"reference"``.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = INT8_LINEAR.name
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ConfigError(
            f"{name}: weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be int8 (O, I)"
        )
    require_floating(name, "x", x)
    require_floating(name, "scale", scale)
    require_shape(name, "scale", scale, "(O,)", (weight.shape[0],))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ConfigError(
            f"{name}: x has shape {tuple(x.shape)}; its last size must be weight's, {weight.shape[1]}"
        )
    if torch.is_grad_enabled() and x.requires_grad and backend == "auto":
        backend = "eager"
    y: Tensor = INT8_LINEAR.choose(backend, x.device, x.dtype)(x, weight, scale)
    return y


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (…, O, I) in eight bits and the scales (…, O) fp32 of its rows; a row of zeros stays one.

    Raises ConfigError for a weight that is not finite.
    """
    largest = weight.detach().abs().amax(-1).float()
    if not bool(largest.isfinite().all()):
        raise ConfigError("a weight is not finite: it cannot be quantised")
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    quantized = (weight.detach().float() / scale[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return quantized.to(torch.int8), scale
