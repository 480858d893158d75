"""Other people's kernels, where they are installed: the same inputs as ours, timed in turns with them."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., Tensor]


def peer(module: str, name: str) -> Any | None:
    """Return ``name`` of ``module``, or None where that is not installed or does not fit this torch."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError, RuntimeError):
        return None


def scan() -> Call | None:
    """mamba_ssm's CUDA scan on our (B, L, I) tensors; it wants them as (B, I, L), which is not timed."""
    kernel = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    if kernel is None:
        return None

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        return kernel(x, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    return run


def scan_arguments(inputs: list[Tensor]) -> list[Tensor]:
    """Turn our arguments of the scan into mamba_ssm's layout."""
    per_step = {0, 1, 3, 4, 6}
    return [
        (t.detach().transpose(1, 2).contiguous() if i in per_step else t.detach()).requires_grad_()
        for i, t in enumerate(inputs)
    ]


def convolution() -> Call | None:
    """causal_conv1d's CUDA kernel, on channels-last tensors as ours."""
    kernel = peer("causal_conv1d", "causal_conv1d_fn")
    if kernel is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernel(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return run


def mixer(d_model: int, device: torch.device) -> nn.Module | None:
    """mamba_ssm's Mamba layer with its fused path."""
    layer = peer("mamba_ssm", "Mamba")
    return None if layer is None else layer(d_model).to(device)


def experts() -> Any | None:
    """ScatterMoE's MLP module."""
    return peer("scattermoe.mlp", "MLP")
