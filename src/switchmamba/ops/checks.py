"""Argument checks that the operations share; each failure is one line with value, rule and remedy."""

import torch
from torch import Tensor

from switchmamba.errors import ConfigError


def require_shape(operation: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """Raise :class:`ConfigError` unless ``tensor`` has ``shape``, which ``letters`` spell for the reader."""
    if tensor.shape != shape:
        raise ConfigError(
            f"{operation}: {name} has shape {tuple(tensor.shape)}; it must be {letters} = {shape}"
        )


def require_dimensions(operation: str, name: str, tensor: Tensor, letters: str) -> None:
    """Raise :class:`ConfigError` unless ``tensor`` has as many dimensions as ``letters``, such as ``"(B, L, I)"``."""
    if tensor.dim() != letters.count(",") + 1:
        raise ConfigError(f"{operation}: {name} has shape {tuple(tensor.shape)}; it must be {letters}")


def require_floating(operation: str, name: str, tensor: Tensor) -> None:
    """Raise :class:`ConfigError` unless ``tensor`` holds real floating-point numbers."""
    if not tensor.is_floating_point():
        raise ConfigError(f"{operation}: {name} has dtype {tensor.dtype}; it must be floating point")


def require_integer(operation: str, name: str, tensor: Tensor) -> None:
    """Raise :class:`ConfigError` unless ``tensor`` holds integers."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise ConfigError(
            f"{operation}: {name} has dtype {tensor.dtype}; it must be an integer type, such as int64"
        )


def product_dtype(operation: str, x: Tensor, **weights: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of ``x``: autocast's, which leaves fp64 alone, or the one all share."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    for name, weight in weights.items():
        if weight.dtype != x.dtype:
            raise ConfigError(
                f"{operation}: x is {x.dtype} and {name} {weight.dtype}; give them one dtype, or use torch.autocast"
            )
    return x.dtype
