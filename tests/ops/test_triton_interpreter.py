"""The logic of the Triton kernels on a CPU, by Triton's interpreter.

The interpreter must be chosen before Triton is imported. So a process of its own runs all cases, this file as a
program, and prints how far outputs and gradients are from the fp64 reference; the tests judge that. It fills
uninitialised memory with NaN. On a GPU, benchmarks/gpu_check.py does the same with the compiled kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import distance

SCANS: dict[str, dict[str, Any]] = {
    "one step": {"length": 1, "channels": 3, "rows": 2},
    "two chunks and a part": {"length": 17, "channels": 10},
    "two blocks of channels": {"length": 9, "channels": 34, "states": 3},
    "documents, groups, strides": {"length": 17, "channels": 6, "groups": 2, "resets": True, "strided": True},
    "nothing optional": {"length": 9, "channels": 5, "states": 1, "optional": False},
    "extreme decay": {"length": 9, "channels": 4, "decay": 1e4},
    "bf16": {"length": 9, "channels": 8, "dtype": torch.bfloat16},
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "shorter than the filter": {"length": 2, "channels": 70, "rows": 2, "resets": True},
    "two tiles": {"length": 19, "channels": 5, "resets": True, "strided": True},
    "documents without a state": {"length": 18, "channels": 5, "resets": True, "state": False},
    "one tap": {"length": 5, "channels": 3, "width": 1},
    "nothing optional": {"length": 17, "channels": 3, "width": 2, "state": False, "optional": False},
    "bf16": {"length": 6, "channels": 5, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[float, float]]]:
    """For each case: error of each output and gradient, and of the reference in the same dtype."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: CPU builds of torch do not bring it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_triton_interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case", [f"scan, {name}" for name in SCANS] + [f"convolution, {name}" for name in CONVOLUTIONS]
)
def test_kernels_are_as_accurate_as_the_reference(errors, case):
    assert errors[case]
    floor = 8 * torch.finfo(torch.bfloat16 if case.endswith("bf16") else torch.float32).eps
    for name, (error, error_of_reference) in errors[case].items():
        assert error <= 2 * error_of_reference + floor, name


def scan_inputs(
    length: int,
    channels: int,
    rows: int = 1,
    states: int = 4,
    groups: int = 1,
    decay: float = 1.0,
    resets: bool = False,
    optional: bool = True,
    **_how_to_run: Any,
) -> list[Any]:
    per_step, per_group = (rows, length, channels), (rows, length, groups, states)
    starts_BL = torch.rand(rows, length) < 0.25
    starts_BL[:, 0] = False
    return [
        torch.randn(per_step),
        torch.randn(per_step).abs(),
        -decay * torch.rand(channels, states),
        torch.randn(per_group),
        torch.randn(per_group),
        torch.randn(channels) if optional else None,
        torch.randn(per_step) if optional else None,
        torch.randn(channels) if optional else None,
        optional,
        torch.randn(rows, channels, states) if optional else None,
        starts_BL if resets else None,
    ]


def convolution_inputs(
    length: int,
    channels: int,
    rows: int = 1,
    width: int = 4,
    resets: bool = False,
    state: bool = True,
    optional: bool = True,
    twice: bool = False,
    **_how_to_run: Any,
) -> list[Any]:
    from switchmamba.ops.causal_conv1d import _document_starts

    document_ids_BL = (torch.rand(rows, length) < 0.25).long().cumsum(1)
    return [
        torch.randn(rows, length, channels),
        torch.randn(channels, width),
        torch.randn(channels) if optional else None,
        "silu" if optional else None,
        torch.randn(rows, width - 1, channels) if state else None,
        _document_starts(document_ids_BL, width - 1) if resets else None,
        twice,
    ]


def results(run: Callable[..., Any], inputs: list[Any], dtype: torch.dtype, strided: bool) -> list[Tensor]:
    """Outputs, and gradients of the floating inputs, under fixed gradients of the outputs."""
    leaves = [v.to(dtype, copy=True).requires_grad_() if _floating(v) else v for v in inputs]
    arguments = [torch.cat([v, v], dim=-1)[..., : v.shape[-1]] if _floating(v) else v for v in leaves]
    outputs = run(*(arguments if strided else leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
    torch.autograd.backward(outputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *(v.grad for v in leaves if _floating(v) and v.numel())]


def compare(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: list[Any],
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    **_shape: Any,
) -> dict[str, tuple[float, float]]:
    rounded = [v.to(dtype) if _floating(v) else v for v in inputs]
    truth = results(reference, rounded, torch.float64, False)
    found, same_dtype = results(kernel, rounded, dtype, strided), results(reference, rounded, dtype, False)
    return {
        str(i): (distance(found[i], truth[i]), distance(same_dtype[i], truth[i])) for i in range(len(truth))
    }


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def main() -> None:
    from switchmamba.ops.causal_conv1d import CAUSAL_CONV1D
    from switchmamba.ops.selective_scan import SELECTIVE_SCAN

    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    scan, convolution = (
        (operation.backends["triton"].run, operation.backends["reference"].run)
        for operation in (SELECTIVE_SCAN, CAUSAL_CONV1D)
    )
    found = {}
    for name, case in SCANS.items():
        torch.manual_seed(0)
        found[f"scan, {name}"] = compare(*scan, scan_inputs(**case), **case)
    for name, case in CONVOLUTIONS.items():
        torch.manual_seed(0)
        found[f"convolution, {name}"] = compare(*convolution, convolution_inputs(**case), **case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
