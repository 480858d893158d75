"""Which assignments an expert of limited capacity keeps (Switch Transformer, arXiv 2101.03961, §2.2).

index'_tk = index_tk if fewer than ``capacity`` assignments to the same expert come before (t, k), otherwise E.
"""

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import require_dimensions, require_integer
from switchmamba.ops.expert_capacity.reference import expert_capacity_reference
from switchmamba.ops.gpu import imported_when_called, needs_triton


def _unavailable(device: torch.device, _dtype: torch.dtype) -> str | None:
    return needs_triton(device, torch.float32)  # it computes in integers


EXPERT_CAPACITY = Operation(
    "expert_capacity",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.expert_capacity.triton", "expert_capacity"),
            _unavailable,
        ),
        Backend("reference", expert_capacity_reference, always),
    ],
)


def expert_capacity(expert_index: Tensor, num_experts: int, capacity: int, backend: str = "auto") -> Tensor:
    """Drop the assignments that are over their expert's capacity.

    First choices come before second ones, then earlier tokens before later ones: no token is dropped for a later one.
    The cost is that of a sort on a CPU, and of reading the index twice on a GPU.

    Args:
        expert_index: (T, K) int64 in [0, E]; E stands for none and stays as it is.
        num_experts: E.
        capacity: how many assignments an expert keeps, at least 1.
        backend: ``"auto"``, ``"triton"`` (a GPU) or ``"reference"``.

    Returns:
        The index (T, K) int64, with E in place of what is dropped.

    Raises:
        ConfigError: the index is of the wrong shape or dtype, the capacity below 1, or the backend cannot run here.
    """
    name = EXPERT_CAPACITY.name
    require_dimensions(name, "expert_index", expert_index, "(T, K)")
    require_integer(name, "expert_index", expert_index)
    if capacity < 1:
        raise ConfigError(f"{name}: capacity={capacity}; it must be at least 1")
    run = EXPERT_CAPACITY.choose(backend, expert_index.device, expert_index.dtype)
    kept: Tensor = run(expert_index, num_experts, capacity)
    return kept
