"""What the Triton backends need, found out without importing Triton.

CUDA builds of torch bring Triton along; CPU builds do not, and importing it takes time. So a module of kernels is
imported when its first kernel is about to run.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NEEDS_GPU = "it needs a CUDA device"
"""How the reason begins that a backend for GPUs gives against another device."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def needs_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a Triton kernel that computes in fp32 cannot serve a device and dtype, or None if it can."""
    if device.type != "cuda":
        return f"{NEEDS_GPU}, the inputs are on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in float32, the inputs are {dtype}"
    return _device_lacks(device)


@functools.cache
def _device_lacks(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, this torch is built for AMD's"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler for its launchers: install gcc or clang, or set CC"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python's headers for its launchers: install python3-dev"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a block can have."""
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:
        return 99 * 1024
    return (163 if capability[0] == 8 else 227) * 1024


def imported_when_called(module: str, function: str) -> Callable[..., Any]:
    """Return ``function`` of ``module``, which is imported at the first call."""

    @functools.cache
    def find() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found

    def call(*arguments: Any) -> Any:
        return find()(*arguments)

    return call
