"""Modules inside wrappers, such as those of adapters (peft): what a layer is, and that no wrapper is passed by.

A wrapper is a module that is called like the one in it, its ``base_layer``, and adds something to what comes out. A
weight that is taken out of a wrapped module lacks that, without any sign (peft issues 2274 and 2556). So what a layer
*is* may be asked inside (:func:`unwrapped`), but computing goes through the module that stands there; whoever hands a
weight to a kernel first makes sure that it is all there is (:func:`is_plain`), or refuses (:func:`convolution`).
"""

from torch import Tensor, nn

from switchmamba.errors import ConfigError


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers; itself if there is none."""
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return module


def is_plain(projection: nn.Module) -> bool:
    """Tell whether a projection is its weight and nothing else: no adapter wraps it, no hook watches it."""
    return type(projection) is nn.Linear and projection.bias is None and not is_watched(projection)


def is_plain_norm(norm: nn.Module | None) -> bool:
    """Tell whether a kernel may take a norm's weight: nothing wraps it; None, no norm, is plain."""
    return norm is None or type(norm) in (nn.LayerNorm, nn.RMSNorm, nn.Identity)


def is_watched(module: nn.Module) -> bool:
    """Tell whether a hook would be called if the module was; accelerate's take the place of ``forward``."""
    forward_hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def convolution(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight (channels, taps) and bias of a depthwise convolution, for the kernel that takes its place.

    Raises ConfigError where something wraps it: the kernel would leave that out.
    """
    if type(module) is not nn.Conv1d or module.bias is None:
        raise ConfigError(
            f"conv1d is wrapped by {type(module).__name__}, but its weight goes straight into a kernel, which would "
            "leave the adapter out; take conv1d out of the adapter's targets (models.lora.lora_targets has them)"
        )
    return module.weight.squeeze(1), module.bias
