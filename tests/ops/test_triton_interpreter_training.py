"""The logic of the training step's Triton kernels on a CPU, by Triton's interpreter.

As in test_triton_interpreter.py a process of its own runs all cases, this file as a program, with uninitialised memory
full of NaN, and prints how far outputs and gradients are from the fp64 reference.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import distance
from tests.ops.test_triton_interpreter import compare, convolution_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "vocab_size": 3, "block": 4096},
    "several blocks and a part": {"tokens": 9, "vocab_size": 777, "block": 256},
    "exactly two blocks": {"tokens": 5, "vocab_size": 512, "block": 256},
    "one block with padding": {"tokens": 20, "vocab_size": 300, "block": 4096},
}
NORMS: dict[str, dict[str, Any]] = {
    "layer norm": {"shape": (3, 7, 40)},
    "rms norm": {"shape": (5, 33), "centered": False},
    "several rows a program": {"shape": (3, 11, 96)},
    "wide": {"shape": (3, 2500)},
    "without a branch": {"shape": (9, 40), "branch": False},
    "rms norm without a branch": {"shape": (9, 5), "branch": False, "centered": False},
    "bf16 after fp32": {"shape": (6, 40), "branch_dtype": torch.bfloat16, "dtype": torch.bfloat16},
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "several rounds": {"length": 45, "channels": 9, "rows": 2, "resets": True, "strided": True},
    "several tiles of steps": {"length": 150, "channels": 3, "resets": True},
    "two blocks of channels": {"length": 20, "channels": 140, "state": False},
    "an output that goes two ways": {"length": 70, "channels": 5, "resets": True, "twice": True},
}
CAPACITIES = ((1, 1, 1, 1), (63, 1, 42, 2), (300, 2, 5, 20), (50, 3, 300, 1), (700, 1, 42, 1000))
"""Tokens, choices, experts and what an expert keeps."""
ROUTERS: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "d_model": 8, "experts": 3},
    "42 experts": {"tokens": 63, "d_model": 40, "experts": 42},
    "100 experts": {"tokens": 100, "d_model": 140, "experts": 100},
    "x is not handed on": {"tokens": 33, "d_model": 8, "experts": 5, "handed_on": False},
}
REDUCTIONS = ("mean", "none")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, tuple[float, float]]]:
    """For each case: error of each output and gradient, and of the reference in the same dtype."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: CPU builds of torch do not bring it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_triton_interpreter_training"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "case",
    [f"head, {name}, {r}, {d}" for name in HEADS for r in REDUCTIONS for d in DTYPES]
    + [f"norm, {name}" for name in NORMS]
    + [f"router, {name}" for name in ROUTERS]
    + [f"router's gradient of x, {name}, bf16" for name in ROUTERS]
    + ["adamw, 5", "adamw, 4096", "adamw, 5000"]
    + [f"convolution, {name}" for name in CONVOLUTIONS],
)
def test_kernels_are_as_accurate_as_the_reference(errors, case):
    assert errors[case]
    dtype = next((DTYPES[name] for name in ("bf16", "fp16") if name in case), torch.float32)
    floor = torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)
    for name, (error, error_of_reference) in errors[case].items():
        assert error <= 2 * error_of_reference + floor, name


def test_adamw_does_nothing_once_it_is_stopped(errors):
    assert errors["adamw stopped"] == {"changed": [0.0, 0.0]}


def test_a_full_expert_drops_what_the_reference_drops(errors):
    assert errors["capacity"] == {str(i): [0.0, 0.0] for i in range(len(CAPACITIES))}


def test_an_ignored_token_may_be_nan_and_a_target_outside_the_vocabulary_is_loud(errors):
    assert errors["losses by hand"] == {"ignored": [0.0, 0.0], "outside": [1.0, 1.0], "huge": [0.0, 0.0]}


def head(tokens: int, vocab_size: int, block: int, reduction: str, dtype: torch.dtype) -> Any:
    kernels = importlib.import_module("switchmamba.ops.linear_cross_entropy.triton")
    reference = importlib.import_module("switchmamba.ops.linear_cross_entropy.reference")
    kernels._BLOCK = block
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 16).to(dtype), torch.randn(vocab_size, 16).div(4).to(dtype)
    target = torch.randint(0, vocab_size, (tokens,))
    if tokens > 1:
        target[::4] = -100

    def results(run: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        loss = run(*leaves, target, -100, reduction, 7, dtype)
        cotangent = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
        loss.backward(cotangent.to(loss.dtype))
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    truth = results(reference.linear_cross_entropy_reference, torch.float64)
    found = results(kernels.linear_cross_entropy, dtype)
    return _errors(found, results(reference.linear_cross_entropy_reference, dtype), truth)


def norm(
    shape: tuple[int, ...],
    centered: bool = True,
    branch: bool = True,
    branch_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Any:
    kernels = importlib.import_module("switchmamba.ops.residual_norm.triton")
    reference = importlib.import_module("switchmamba.ops.residual_norm.reference")
    kernels._PROGRAMS = 7
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape) * 3 + 1,
        torch.randn(shape).to(branch_dtype) if branch else None,
        torch.randn(shape[-1]),
        torch.randn(shape[-1]) if centered else None,
    ]

    def results(run: Any, exact: bool) -> list[Tensor]:
        leaves = [
            None if t is None else t.to(torch.float64 if exact else t.dtype, copy=True).requires_grad_()
            for t in inputs
        ]
        total, normed = run(*leaves, 1e-5, centered, torch.float64 if exact else dtype)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in (total, normed)]
        torch.autograd.backward((total * 1, normed), cotangents)
        return [
            total.detach(),
            normed.detach(),
            *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None),
        ]

    truth, found = results(reference.residual_norm_reference, True), results(kernels.residual_norm, False)
    return _errors(found, results(reference.residual_norm_reference, False), truth)


def router(tokens: int, d_model: int, experts: int, handed_on: bool = True) -> Any:
    kernels = importlib.import_module("switchmamba.ops.switch_router.triton")
    reference = importlib.import_module("switchmamba.ops.switch_router.reference")
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, d_model).bfloat16(), torch.randn(experts, d_model) / d_model**0.5

    def results(run: Any, exact: bool) -> list[Tensor]:
        leaves = [t.to(torch.float64 if exact else t.dtype, copy=True).requires_grad_() for t in (x, weight)]
        index, *sums, entropy, counts, same_x = run(*leaves)
        if handed_on:
            sums.append(same_x)
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(sums, [torch.randn(s.shape, generator=generator).to(s.dtype) for s in sums])
        return [index, entropy, counts, *(s.detach() for s in sums), *(leaf.grad for leaf in leaves)]

    truth = results(reference.switch_router_reference, True)
    found = results(kernels.switch_router, False)
    return _errors(found, results(reference.switch_router_reference, False), truth)


def capacity() -> dict[str, tuple[float, float]]:
    """Count for each of the cases the assignments that the kernels and the reference see differently."""
    kernels = importlib.import_module("switchmamba.ops.expert_capacity.triton")
    reference = importlib.import_module("switchmamba.ops.expert_capacity.reference")
    found = {}
    for i, (tokens, choices, experts, most) in enumerate(CAPACITIES):
        torch.manual_seed(i)
        index = torch.randint(0, experts + 1, (tokens, choices))
        expected = reference.expert_capacity_reference(index, experts, most)
        found[str(i)] = float((kernels.expert_capacity(index, experts, most) != expected).sum()), 0.0
    return found


def multiply_bf16_as_numbers() -> None:
    """Mend Triton's interpreter, whose products take bf16 for the integers that it stores it as."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *others: create_dot(
        self, widened(a), widened(b), *others
    )


def adamw() -> dict[str, Any]:
    from switchmamba.training.adamw_triton import update_

    settings = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    found: dict[str, Any] = {}
    for size in (5, 4096, 5000):
        torch.manual_seed(0)
        parameter = torch.randn(size)
        exact, same = parameter.double().requires_grad_(), parameter.clone().requires_grad_()
        optimizers = [torch.optim.AdamW([p], **settings) for p in (exact, same)]
        mean, square, step, divisor = (
            torch.zeros(size),
            torch.zeros(size),
            torch.zeros(()),
            torch.tensor(3.0),
        )
        for stopped in (0.0, 0.0, 0.0, 0.0, 1.0):
            gradient, before = torch.randn(size), parameter.clone()
            order = torch.tensor(settings["lr"]), settings["weight_decay"], settings["betas"], settings["eps"]
            update_(parameter, gradient, mean, square, step, divisor, torch.tensor(stopped), *order)
            if stopped:
                found["adamw stopped"] = {"changed": (float((parameter - before).abs().max()), 0.0)}
                continue
            step += 1
            exact.grad, same.grad = gradient.double() / 3, gradient / 3
            for optimizer in optimizers:
                optimizer.step()
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (exact, same), strict=True)]
        moments = [[state["exp_avg"], state["exp_avg_sq"]] for state in states]
        found[f"adamw, {size}"] = _errors(
            [parameter, mean, square], [same.detach(), *moments[1]], [exact.detach(), *moments[0]]
        )
    return found


def losses_by_hand() -> dict[str, tuple[float, float]]:
    from switchmamba.ops.linear_cross_entropy.triton import linear_cross_entropy

    def losses(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, -1, "none", 4, torch.float32)

    x, weight = torch.randn(3, 4), torch.randn(11, 4)
    x[1] = torch.nan
    ignored = losses(x, weight, torch.tensor([1, -1, 2]))
    outside = losses(x.nan_to_num(), weight, torch.tensor([1, 11, 2]))
    huge = losses(torch.tensor([[1e30], [-1e30]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    return {
        "ignored": (float(ignored.isnan().sum()), float(ignored[1])),
        "outside": (float(outside.isnan().sum()), float(outside[1].isnan())),
        "huge": (float(huge[0]), float(huge[1])),
    }


def _errors(found: list[Tensor], reference: list[Tensor], truth: list[Tensor]) -> dict[str, Any]:
    return {
        str(i): (distance(found[i], truth[i]), distance(reference[i], truth[i])) for i in range(len(truth))
    }


def main() -> None:
    from switchmamba.ops.causal_conv1d import CAUSAL_CONV1D

    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    found: dict[str, Any] = {"losses by hand": losses_by_hand()}
    for name, case in HEADS.items():
        for reduction in REDUCTIONS:
            for label, dtype in DTYPES.items():
                found[f"head, {name}, {reduction}, {label}"] = head(**case, reduction=reduction, dtype=dtype)
    for name, case in NORMS.items():
        found[f"norm, {name}"] = norm(**case)
    multiply_bf16_as_numbers()
    for name, sizes in ROUTERS.items():
        errors_of_all = router(**sizes)
        # dx alone is bf16, and the interpreter truncates where a GPU rounds.
        of_x = sorted(errors_of_all)[-2]
        found[f"router's gradient of x, {name}, bf16"] = {of_x: errors_of_all.pop(of_x)}
        found[f"router, {name}"] = errors_of_all
    found |= adamw() | {"capacity": capacity()}
    convolution = [CAUSAL_CONV1D.backends[name].run for name in ("triton", "reference")]
    for name, case in CONVOLUTIONS.items():
        torch.manual_seed(0)
        found[f"convolution, {name}"] = compare(*convolution, convolution_inputs(**case), **case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
