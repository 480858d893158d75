"""The logic of the experts' Triton kernels on a CPU, by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so this file runs itself as a program that prints what it
found, and the tests judge that. Memory that nothing wrote holds NaN. Products run in fp16, because the interpreter
multiplies bf16 wrongly. On a GPU, benchmarks/gpu_check.py does the same with the compiled kernels, in bf16 too.
"""

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

CASES: dict[str, dict[str, Any]] = {
    "relu, two choices, dropped": {"choices": 2},
    "relu, several tiles": {"tokens": 300, "d_model": 136, "d_expert": 264, "experts": 3},
    "gelu, three choices, odd widths": {"choices": 3, "d_model": 6, "d_expert": 10, "activation": "gelu"},
    "silu": {"activation": "silu", "d_expert": 136},
    "swiglu, several tiles": {"tokens": 200, "d_expert": 72, "experts": 2, "activation": "swiglu"},
    "swiglu, odd widths": {"d_model": 6, "d_expert": 10, "activation": "swiglu", "choices": 2},
    "wider output, dropped": {"d_out": 40},
    "wider output by several copies, dropped": {"d_model": 8, "d_out": 272, "tokens": 20},
    "narrower output, several tiles": {
        "d_model": 264,
        "d_expert": 136,
        "d_out": 24,
        "tokens": 150,
        "experts": 2,
    },
    "wider output, two choices, swiglu, odd widths": {
        "d_model": 6,
        "d_expert": 10,
        "d_out": 13,
        "choices": 2,
        "activation": "swiglu",
    },
    "narrower output, odd widths, strides": {"d_model": 13, "d_expert": 9, "d_out": 3, "strided": True},
    "inner MoE's hidden width, in and out": {"d_model": 32, "d_expert": 352, "d_out": 64},
    "all to one": {"route": 3},
    "all dropped": {"route": 7},
    "one token": {"tokens": 1, "activation": "silu"},
    "one expert": {"experts": 1},
    "more experts than tokens": {"experts": 20, "tokens": 10},
    "strides": {"strided": True},
    "strides, two choices": {"strided": True, "choices": 2, "activation": "swiglu"},
    "fp32 inputs, as under autocast": {"autocast": True, "choices": 2},
    "fp32 inputs, top 1": {"autocast": True},
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: CPU builds of torch do not bring it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_experts_triton_interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_as_accurate_as_the_reference(found, case):
    floor = 8 * torch.finfo(torch.float16).eps
    for name, (error, error_of_reference) in found["errors"][case].items():
        assert error <= 2 * error_of_reference + floor, name


def test_gradients_have_the_dtypes_of_their_inputs(found):
    assert found["dtypes"] == ["torch.float32"] * 5


def test_the_sort_is_stable_and_segments_are_whole_tiles(found):
    assert found["plan"] == dict.fromkeys(found["plan"], True) != {}


def test_a_dropped_assignment_contributes_exactly_zero_whatever_it_holds(found):
    assert found["dropped"] == {"kept are finite": True, "dropped are zero": True}


def test_only_what_is_trained_gets_a_gradient(found):
    assert found["trained alone equals trained together"] == dict.fromkeys(("x", "weight", "w1", "w2"), True)


def test_how_inputs_lie_and_whether_gradients_are_wanted_changes_no_bit(found):
    assert found["same bits"] == dict.fromkeys(found["same bits"], True) != {}


def inputs(
    tokens: int = 63,
    experts: int = 7,
    choices: int = 1,
    d_model: int = 16,
    d_expert: int = 24,
    activation: str = "relu",
    route: int | None = None,
    d_out: int | None = None,
    strided: bool = False,
    **_how_to_run: Any,
) -> tuple[list[Tensor], Tensor]:
    """x, weight, w1, w2 in fp64, rounded to fp16, and the experts' indices."""

    def random(*shape: int) -> Tensor:
        value = torch.randn(shape, dtype=torch.float64).half().double()
        return value.transpose(-1, -2).contiguous().transpose(-1, -2) if strided else value

    if route is None:
        index = torch.randint(0, experts + 1, (tokens, choices))
    else:
        index = torch.full((tokens, choices), route)
    hidden = 2 * d_expert if activation == "swiglu" else d_expert
    x, w1, w2 = (
        random(tokens, d_model),
        random(experts, hidden, d_model),
        random(experts, d_out or d_model, d_expert),
    )
    return [x, random(tokens, choices), w1 / 4, w2 / 4], index


def results(
    run: Any, values: list[Tensor], index: Tensor, dtype: torch.dtype, activation: str, autocast: bool
) -> list[Tensor]:
    """y and the gradients of x, weight, w1 and w2 under a fixed gradient of y."""
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = (wide if autocast else dtype, wide, *[wide if autocast else dtype] * 2)
    leaves = [v.detach().to(d).requires_grad_() for v, d in zip(values, dtypes, strict=True)]
    y = run(leaves[0], index, *leaves[1:], activation, dtype)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(run: Any, reference: Any, case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    values, index = inputs(**case)
    how = case.get("activation", "relu"), case.get("autocast", False)
    truth = results(reference, values, index, torch.float64, *how)
    same_dtype = results(reference, values, index, torch.float16, *how)
    kernel = results(run, values, index, torch.float16, *how)
    names = ("y", "x", "weight", "w1", "w2")
    return {
        n: (distance(k, t), distance(r, t))
        for n, k, r, t in zip(names, kernel, same_dtype, truth, strict=True)
    }


def check_plan() -> dict[str, bool]:
    """Hold the counting sort against torch's stable sort, over several of its blocks."""
    from switchmamba.ops.expert_feed_forward.dispatch import dispatch

    experts, rows = 5, 16
    index = torch.randint(0, experts + 1, (300, 2))
    x = torch.randn(300, 24).half()
    plan, sorted_x = dispatch(x, index, experts, rows, torch.float16, None)
    count = torch.bincount(index.flatten(), minlength=experts + 1)[:experts]
    tiles = (count + rows - 1) // rows
    used = int(tiles.sum())
    order = torch.sort(index.flatten(), stable=True).indices
    kept = plan.source[: used * rows]
    segments = zip(plan.first_place.tolist(), count.tolist(), tiles.tolist(), strict=True)
    ends = [plan.source[first + n : first + t * rows] for first, n, t in segments]
    places = torch.full((600,), -1, dtype=torch.int32)
    places[kept[kept >= 0].long()] = (kept >= 0).nonzero().flatten().int()
    return {
        "count": torch.equal(plan.count.long(), count),
        "order": torch.equal(kept[kept >= 0].long(), order[: int(count.sum())]),
        "inverse": torch.equal(plan.place, places),
        "filled up": all(bool((end == -1).all()) for end in ends),
        "tiles": plan.tile_expert.tolist()
        == torch.arange(experts).repeat_interleave(tiles).tolist() + [-1] * (len(plan.tile_expert) - used),
        "rows": torch.equal(sorted_x[: used * rows], x[kept // 2].where(kept[:, None] >= 0, 0)),
        "number of tiles": plan.num_tiles.tolist() == [used],
    }


def check_dropped(run: Any) -> dict[str, bool]:
    index = torch.tensor([[2], [0], [2], [1]])
    x = torch.randn(4, 8).half()
    x[0] = torch.nan
    weight = torch.tensor([[torch.inf], [1.0], [torch.nan], [1.0]])
    leaves = [x, weight, *(torch.randn(2, 8, 8).half() for _ in range(2))]
    for leaf in leaves:
        leaf.requires_grad_()
    y = run(leaves[0], index, *leaves[1:], "relu", torch.float16)
    y.sum().backward()
    finite = all(bool(tensor.isfinite().all()) for tensor in (y, *(leaf.grad for leaf in leaves)))
    zero = all(int(tensor[[0, 2]].count_nonzero()) == 0 for tensor in (y, leaves[0].grad, weight.grad))
    return {"kept are finite": finite, "dropped are zero": zero}


def check_trained_alone(run: Any) -> dict[str, bool]:
    torch.manual_seed(0)
    values, index = inputs()
    together = results(run, values, index, torch.float16, "relu", True)[1:]
    found = {}
    for place, name in enumerate(("x", "weight", "w1", "w2")):
        leaves = [value.float().requires_grad_(i == place) for i, value in enumerate(values)]
        y = run(leaves[0], index, *leaves[1:], "relu", torch.float16)
        generator = torch.Generator().manual_seed(1)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
        gradients = [leaf.grad for leaf in leaves]
        alone = gradients.pop(place)
        found[name] = torch.equal(alone, together[place]) and gradients == [None] * 3
    return found


def check_same_bits(run: Any) -> dict[str, bool]:
    torch.manual_seed(0)
    values, index = inputs(activation="silu")
    x, weight, w1, w2 = (value.half() for value in values)
    y = run(x, index, weight.float(), w1, w2, "silu", torch.float16)

    def misaligned(value: Tensor) -> Tensor:
        buffer = torch.empty(value.numel() + 1, dtype=value.dtype)
        return buffer[1:].view_as(value).copy_(value)

    scattered = [misaligned(value) for value in (x, weight.float(), w1, w2)]
    wanted = [value.clone().requires_grad_() for value in (x, weight.float(), w1, w2)]
    return {
        "slices of buffers": torch.equal(run(scattered[0], index, *scattered[1:], "silu", torch.float16), y),
        "int32 indices": torch.equal(run(x, index.int(), weight.float(), w1, w2, "silu", torch.float16), y),
        "gradients wanted": torch.equal(
            run(wanted[0], index, *wanted[1:], "silu", torch.float16).detach(), y
        ),
    }


def main() -> None:
    from triton.runtime import interpreter

    from switchmamba.ops.expert_feed_forward.reference import expert_feed_forward_reference
    from switchmamba.ops.expert_feed_forward.triton import expert_feed_forward_triton as run

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy_2_4(tensor: Any, scope: Any) -> None:
        """The interpreter's numbers are arrays of one element, which NumPy no longer turns into integers."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: int(number.handle.data.item()))

    interpreter._patch_lang_tensor = patch_for_numpy_2_4
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    errors = {name: compare(run, expert_feed_forward_reference, case) for name, case in CASES.items()}
    values, index = inputs(choices=2)
    autocast = results(run, values, index, torch.float16, "relu", True)
    found = {
        "errors": errors,
        "dtypes": [str(tensor.dtype) for tensor in autocast],
        "plan": check_plan(),
        "dropped": check_dropped(run),
        "same bits": check_same_bits(run),
        "trained alone equals trained together": check_trained_alone(run),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
