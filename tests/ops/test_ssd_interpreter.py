"""The logic of state space duality's and the gated norm's Triton kernels on a CPU, by Triton's interpreter.

As in test_triton_interpreter.py, whose comparison it uses: a process of its own runs all cases.
"""

import importlib
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
from tests.ops.test_triton_interpreter import compare

SCANS: dict[str, dict[str, Any]] = {
    "one step": {"length": 1, "heads": 2},
    "a chunk and a part": {"length": 70, "heads": 2, "head_dim": 5, "states": 7},
    "documents, groups, strides": {"length": 130, "heads": 4, "groups": 2, "resets": True, "strided": True},
    "nothing optional": {"length": 66, "heads": 1, "optional": False},
    "extreme decay": {"length": 70, "heads": 3, "decay": 1e4},
    "spans and splits": {"length": 600, "heads": 2, "resets": True},
    "pieces of a head": {"length": 66, "heads": 2, "head_dim": 40, "states": 130, "resets": True},
    "fp16": {"length": 100, "heads": 2, "dtype": torch.float16},
}
STEPS: dict[str, dict[str, Any]] = {
    "step": {"length": 1, "heads": 4, "groups": 2, "rows": 2},
    "step, fp16": {"length": 1, "heads": 2, "dtype": torch.float16},
}
NORMS: dict[str, dict[str, Any]] = {
    "norm": {"rows": 5, "channels": 12},
    "norm, groups, runs of rows": {"rows": 5, "channels": 21, "groups": 3},
    "norm, strides": {"rows": 4, "channels": 8, "strided": True},
}
INNERS: dict[str, dict[str, Any]] = {
    "inner, from nothing": {"length": 3},
    "inner, states, documents, groups": {"length": 70, "groups": 2, "heads": 4, "states": True},
    "inner, shorter than the filter": {"length": 2, "states": True},
}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[float, float]]]:
    """For each case: error of each output and gradient, and of the reference in the same dtype."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: CPU builds of torch do not bring it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_ssd_interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*SCANS, *STEPS, *NORMS, *INNERS])
def test_kernels_are_as_accurate_as_the_reference(errors, case):
    assert errors[case]
    floor = 8 * torch.finfo(torch.float16 if case.endswith("fp16") else torch.float32).eps
    for name, (error, error_of_reference) in errors[case].items():
        assert error <= 2 * error_of_reference + floor, name


def scan_inputs(
    length: int,
    heads: int,
    head_dim: int = 4,
    states: int = 5,
    rows: int = 1,
    groups: int = 1,
    decay: float = 1.0,
    resets: bool = False,
    optional: bool = True,
    **_how_to_run: Any,
) -> list[Any]:
    starts_BL = torch.rand(rows, length) < 0.02
    starts_BL[:, 0] = False
    return [
        torch.randn(rows, length, heads, head_dim),
        torch.randn(rows, length, heads).abs() / 4,
        -decay * torch.rand(heads),
        torch.randn(rows, length, groups, states),
        torch.randn(rows, length, groups, states),
        torch.randn(heads) if optional else None,
        torch.randn(heads) if optional else None,
        optional,
        torch.randn(rows, heads, head_dim, states) if optional else None,
        starts_BL if resets else None,
    ]


def step_inputs(**case: Any) -> list[Any]:
    x, dt, A, B, C, D, dt_bias, softplus, state, _ = scan_inputs(**case)
    return [state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, dt_bias, softplus]


def compare_without_gradients(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: list[Any],
    dtype: torch.dtype = torch.float32,
    **_shape: Any,
) -> dict[str, tuple[float, float]]:
    """Compare the outputs of the kernel that decoding takes; a step with gradients is a scan of one step."""
    rounded = [v.to(dtype) if isinstance(v, Tensor) else v for v in inputs]
    with torch.no_grad():
        truth = reference(*(v.double() if isinstance(v, Tensor) else v for v in rounded))
        found, same_dtype = kernel(*rounded), reference(*rounded)
    return {
        f"decoded {i}": (distance(found[i], truth[i]), distance(same_dtype[i], truth[i])) for i in range(2)
    }


def norm_inputs(rows: int, channels: int, groups: int = 1, **_how_to_run: Any) -> list[Any]:
    return [torch.randn(rows, channels), torch.randn(rows, channels), torch.randn(channels), groups, 1e-5]


def inner_inputs(
    length: int, groups: int = 1, heads: int = 2, states: bool = False, **_how_to_run: Any
) -> list[Any]:
    rows, head_dim, d_state = 2, 4, 3
    inner, convolved = heads * head_dim, heads * head_dim + 2 * groups * d_state
    return [
        torch.randn(rows, length, inner + convolved + heads),
        torch.randn(convolved, 4),
        torch.randn(convolved),
        -torch.rand(heads),
        torch.randn(heads),
        torch.randn(heads),
        torch.randn(inner),
        d_state,
        groups,
        1e-5,
        torch.randn(rows, 3, convolved) if states else None,
        torch.randn(rows, heads, head_dim, d_state) if states else None,
        (torch.rand(rows, length) < 0.05).long().cumsum(1) if states else None,
    ]


def let_the_interpreter_count() -> None:
    """Give loops their bounds: NumPy 2.4 takes no array of one element for a number, as Triton 3.6 expects."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count


def main() -> None:
    from switchmamba.ops.gated_rms_norm import GATED_RMS_NORM
    from switchmamba.ops.mamba2_inner import MAMBA2_INNER
    from switchmamba.ops.ssd import SSD_SCAN, SSD_STEP

    let_the_interpreter_count()
    importlib.import_module("switchmamba.ops.gated_rms_norm.triton")._BACKWARD_PROGRAMS = 4
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    chosen = sys.argv[1:] or [*SCANS, *STEPS, *NORMS, *INNERS]
    scan, step, norm = (
        (operation.backends["triton"].run, operation.backends["reference"].run)
        for operation in (SSD_SCAN, SSD_STEP, GATED_RMS_NORM)
    )
    inner = (MAMBA2_INNER.backends["triton"].run, MAMBA2_INNER.backends["reference"].run)
    found = {}
    for name in chosen:
        torch.manual_seed(0)
        if name in SCANS:
            found[name] = compare(*scan, scan_inputs(**SCANS[name]), **SCANS[name])
        elif name in INNERS:
            found[name] = compare(*inner, inner_inputs(**INNERS[name]), **INNERS[name])
        elif name in NORMS:
            found[name] = compare(*norm, norm_inputs(**NORMS[name]), **NORMS[name])
        else:
            inputs = step_inputs(**STEPS[name])
            found[name] = compare(*step, inputs, **STEPS[name])
            found[name] |= compare_without_gradients(*step, inputs, **STEPS[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
