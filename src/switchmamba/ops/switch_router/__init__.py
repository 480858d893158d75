"""The Switch router (Fedus et al. 2021, arXiv 2101.03961, eq. 1 and 2) and what its losses and metrics need.

p = softmax(W x), index = argmax p (ties go to the lower one), weight = p_index: all in fp32, whatever x is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_dimensions, require_floating, require_shape
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.switch_router.reference import switch_router_reference


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot serve x on a device and in a dtype."""
    reason = needs_triton(device, dtype)
    if reason is None and dtype != torch.bfloat16:
        reason = f"its exact products take bfloat16 inputs, x is {dtype}; autocast to bfloat16 enables it"
    return reason


SWITCH_ROUTER = Operation(
    "switch_router",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.switch_router.triton", "switch_router"),
            unavailable,
        ),
        Backend("reference", switch_router_reference, always),
    ],
)


class Switched(NamedTuple):
    """What :func:`switch_router` returns; T tokens, E experts.

    Attributes:
        index_T1: (T, 1) int64 in [0, E).
        weight_T1: (T, 1) probability of the chosen expert.
        probability_sum_E: (E,) Σ over tokens of p.
        squared_logsumexp_sum: () Σ over tokens of logsumexp(logits)².
        entropy_sum: () Σ over tokens of the entropy of p, nats; without a gradient.
        tokens_per_expert_E: (E,) int64.
        x_TD: x, for the experts: the gradient that it gets from them is added where the router's own is computed.
    """

    index_T1: Tensor
    weight_T1: Tensor
    probability_sum_E: Tensor
    squared_logsumexp_sum: Tensor
    entropy_sum: Tensor
    tokens_per_expert_E: Tensor
    x_TD: Tensor


def switch_router(x: Tensor, weight: Tensor, backend: str = "auto") -> Switched:
    """Choose an expert for each token.

    The logits are exact to fp32. Differentiable in x and weight through the weights, the sum of probabilities and the
    squared logsumexp; in x also through x_TD.

    Args:
        x: (T, D), T ≥ 1.
        weight: (E, D), fp32 (or fp64 with fp64 x).
        backend: ``"auto"``, ``"triton"`` (bf16 x on a GPU) or ``"reference"``.

    Raises:
        ConfigError: shapes or dtypes do not fit, or the backend cannot run here.
    """
    name = SWITCH_ROUTER.name
    require_dimensions(name, "x", x, "(T, D)")
    require_floating(name, "x", x)
    require_dimensions(name, "weight", weight, "(E, D)")
    require_shape(name, "weight", weight, "(E, D)", (weight.shape[0], x.shape[1]))
    run = SWITCH_ROUTER.choose(backend, x.device, x.dtype)
    return Switched(*run(x, weight))
