"""Feed-forward experts behind a router's choices (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, §2).

y_t = Σ_k weight_tk · w2_e act(w1_e x_t) with e = index_tk. The router belongs to the caller.
"""

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import (
    product_dtype,
    require_dimensions,
    require_floating,
    require_integer,
    require_shape,
)
from switchmamba.ops.expert_feed_forward.activations import ACTIVATIONS
from switchmamba.ops.expert_feed_forward.eager import expert_feed_forward_eager
from switchmamba.ops.expert_feed_forward.reference import expert_feed_forward_reference
from switchmamba.ops.gpu import imported_when_called, needs_triton


def _needs_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the Triton backend cannot serve a device and a dtype of the products, or None if it can."""
    lacks = needs_triton(device, dtype)
    if lacks is not None:
        return lacks
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies in bfloat16 or float16, not {dtype}; autocast enables it"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"its tiles are made for compute capability 9, the device has {major}.{minor}"
    return None


def waits_for_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the backend of "auto" has to read on the host how many tokens each expert has; None if it has not."""
    return _needs_hopper(device, dtype)


EXPERT_FEED_FORWARD = Operation(
    "expert_feed_forward",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.expert_feed_forward.triton", "expert_feed_forward_triton"),
            _needs_hopper,
        ),
        Backend("eager", expert_feed_forward_eager, always),
        Backend("reference", expert_feed_forward_reference, always),
    ],
)


def expert_feed_forward(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """Apply to each token the experts chosen for it, and add their outputs by weight.

    An assignment with index E is dropped: it costs nothing and contributes exactly 0. The same inputs give the same
    bits every time. Differentiable in x, expert_weight, w1 and w2; an expert without tokens gets a zero gradient.
    The matrix products run in the dtype of x, or in autocast's where that is enabled; the sum over choices in that of
    ``expert_weight`` or x, whichever is wider.

    Args:
        x: (T, D).
        expert_index: (T, K) int64 in [0, E]; on the CPU the range is checked.
        expert_weight: (T, K), most often fp32.
        w1: (E, F, D); for ``"swiglu"`` (E, 2F, D), the gate's rows first.
        w2: (E, O, F); O is D in a feed-forward, and may be another width.
        activation: ``"relu"``, ``"gelu"`` (by erf), ``"silu"`` or ``"swiglu"``: silu(gate) · up.
        backend: ``"auto"``, ``"triton"`` (bf16 and fp16 on a Hopper GPU), ``"eager"`` (any device) or ``"reference"``.

    Returns:
        y (T, O) in the dtype of x.

    Raises:
        ConfigError: shapes, dtypes or indices do not fit, or the backend cannot run here.
    """
    name = EXPERT_FEED_FORWARD.name
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{name}: activation={activation!r} does not exist; choose {', '.join(ACTIVATIONS)}"
        )
    require_dimensions(name, "x", x, "(T, D)")
    require_dimensions(name, "w2", w2, "(E, O, F)")
    require_dimensions(name, "expert_index", expert_index, "(T, K)")
    require_floating(name, "x", x)
    require_integer(name, "expert_index", expert_index)
    (tokens, d_in), (num_experts, _, d_expert) = x.shape, w2.shape
    choices = expert_index.shape[1]
    require_shape(name, "expert_index", expert_index, "(T, K)", (tokens, max(1, choices)))
    require_shape(name, "expert_weight", expert_weight, "(T, K)", (tokens, choices))
    if activation == "swiglu":
        require_shape(name, "w1", w1, "(E, 2F, D)", (num_experts, 2 * d_expert, d_in))
    else:
        require_shape(name, "w1", w1, "(E, F, D)", (num_experts, d_expert, d_in))
    dtype = product_dtype(name, x, w1=w1, w2=w2)
    if expert_index.device.type == "cpu" and tokens:
        low, high = (int(extreme) for extreme in torch.aminmax(expert_index))
        if low < 0 or high > num_experts:
            raise ConfigError(
                f"{name}: expert_index spans {low} … {high}; it must lie in 0 … {num_experts}, "
                f"and {num_experts} drops an assignment"
            )
    run = EXPERT_FEED_FORWARD.choose(backend, x.device, dtype)
    y: Tensor = run(x, expert_index, expert_weight, w1, w2, activation, dtype)
    return y
