"""Weights that accelerate keeps on the CPU or the disk and loads when they are needed.

accelerate loads a module's own weights when that module is called. A layer may read a child's weight without calling
the child (the convolution's, for a kernel that has the activation in it), so here the unit is the residual step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from switchmamba.checkpoint import aligned
from switchmamba.models.blocks import ResidualStep


def load_whole_steps(model: nn.Module) -> None:
    """Let every residual step that accelerate offloads load all its weights at once."""
    if getattr(model, "hf_device_map", None) is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    for step in model.modules():
        if not isinstance(step, ResidualStep):
            continue
        hooks: dict[str, Any] = {name: getattr(m, "_hf_hook", None) for name, m in step.named_modules()}
        offloading = {name: hook for name, hook in hooks.items() if getattr(hook, "offload", False)}
        if not offloading:
            continue
        hook = next(iter(offloading.values()))
        weights = _StepWeights({name: hook.weights_map for name, hook in offloading.items()})
        remove_hook_from_module(step, recurse=True)
        whole = AlignDevicesHook(
            hook.execution_device,
            offload=True,
            weights_map=weights,
            place_submodules=True,
            skip_keys=hook.skip_keys,
        )
        add_hook_to_module(step, whole)


class _StepWeights(Mapping[str, Tensor]):
    """The weights of a step by name (``mamba.in_proj.weight``), from the maps of its modules."""

    def __init__(self, maps: Mapping[str, Mapping[str, Any]]) -> None:
        self._maps = maps

    def __getitem__(self, name: str) -> Tensor:
        module, _, tensor = name.rpartition(".")
        return aligned(self._maps[module][tensor])

    def __iter__(self) -> Iterator[str]:
        return iter(())  # accelerate only looks names up

    def __len__(self) -> int:
        return 0
