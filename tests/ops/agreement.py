"""Hold a backend against the truth, which is the reference in fp64.

A backend may err twice as much as the reference does in the same dtype, and a floor of a few roundings.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]


def results(
    operation: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype, backend: str
) -> Results:
    """Outputs, and the gradients of every floating input under random (fixed) gradients of the outputs, as fp64."""
    arguments = {
        name: value.detach().to(dtype).requires_grad_() if _floating(value) else value
        for name, value in inputs.items()
    }
    outputs = operation(**arguments, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, cotangents)
    found = {f"output {number}": output for number, output in enumerate(outputs)}
    found |= {f"gradient of {name}": value.grad for name, value in arguments.items() if _floating(value)}
    return {name: value.detach().double() for name, value in found.items()}


def assert_as_accurate_as_the_reference(
    operation: Callable[..., Any], inputs: Mapping[str, Any], backend: str, dtype: torch.dtype = torch.float32
) -> None:
    """Compare all outputs and gradients of ``backend`` in ``dtype`` with the fp64 reference on the same numbers."""
    rounded = {name: value.to(dtype) if _floating(value) else value for name, value in inputs.items()}
    truth = results(operation, rounded, torch.float64, "reference")
    reference = results(operation, rounded, dtype, "reference")
    found = results(operation, rounded, dtype, backend)
    floor = 8 * torch.finfo(dtype).eps
    for name, true_value in truth.items():
        allowed = 2 * distance(reference[name], true_value) + floor
        assert distance(found[name], true_value) <= allowed, name


def distance(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    assert found.shape == truth.shape
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
