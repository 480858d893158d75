"""The parts of a mixture that training may treat apart: a router, or the experts behind it; and leaving them alone.

Fine-tuning a sparse model often overfits through its experts, or unlearns its routing (ST-MoE, arXiv 2202.08906, §4.2).
The gradient still passes through what is frozen.
"""

from collections.abc import Sequence

from torch import nn

from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.routing import Router


def part_names(model: nn.Module, parts: Sequence[str]) -> set[str]:
    """Return the names of the parameters that belong to ``parts``: "router", "experts"."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if "router" in parts and isinstance(module, Router):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        if "experts" in parts and isinstance(module, MoE):
            names |= {f"{prefix}.w1_EFD", f"{prefix}.w2_EDF"}
    return names


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Let no gradient reach the parameters of ``parts``; the optimizer must be built afterwards."""
    for name in part_names(model, parts):
        model.get_parameter(name).requires_grad_(False)
