"""The logic of the fused decoding step on a CPU, by Triton's interpreter, against the layers' ordinary step in fp64.

The interpreter must be chosen before Triton is imported: this file as a program runs all cases in a process of its own.
On a GPU benchmarks/gpu_decode.py compares the whole step.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from switchmamba.layers.feed_forward.moe import MoEConfig
from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.interface import Layer, SequenceInfo
from switchmamba.layers.mixers.inner_moe_mamba import InnerMoEMambaConfig
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.ops import fused_step
from tests.ops.agreement import distance

ROWS = {"one row": 1, "few rows": 3, "one list per expert": 20, "products by a library": 70}
MANY_ROWS = 300  # a program of the router has 16 of them
LAYERS: dict[str, Any] = {
    "mamba": MambaConfig(d_state=5),
    "mamba without dt_rank's padding": MambaConfig(d_state=16, dt_rank=16, d_conv=2),
    "mamba, inner norms": MambaConfig(d_state=5, dt_rank=3, inner_norm_eps=1e-5),
    "relu": MoEConfig(num_experts=5, d_expert=24, activation="relu"),
    "gelu, top 2": MoEConfig(num_experts=3, d_expert=20, activation="gelu", router={"top_k": 2}),
    "silu": MoEConfig(num_experts=2, d_expert=16, activation="silu"),
    "inner moe": InnerMoEMambaConfig(
        projections=["out"],
        experts=MoEConfig(num_experts=5, d_expert=24, activation="relu"),
        d_state=5,
    ),
    "inner moe, top 2, odd widths": InnerMoEMambaConfig(
        projections=["gate"],
        experts=MoEConfig(num_experts=3, d_expert=11, router={"top_k": 2}),
        expand="5/3",
    ),
    "swiglu, top 3": MoEConfig(num_experts=6, d_expert=24, activation="swiglu", router={"top_k": 3}),
}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
D_MODEL = 40


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: CPU builds of torch do not bring it")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.test_fused_step_interpreter"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_fused_step_equals_the_layers_step(errors, layer, rows):
    assert errors[f"{layer}, {rows}"] < 2e-6


@pytest.mark.parametrize("layer", [name for name, config in LAYERS.items() if isinstance(config, MoEConfig)])
def test_the_router_serves_many_rows(errors, layer):
    assert errors[f"{layer}, {MANY_ROWS}"] < 2e-6


@pytest.mark.parametrize("rows", [*ROWS.values(), MANY_ROWS])
@pytest.mark.parametrize("layer", [name for name, config in LAYERS.items() if isinstance(config, MoEConfig)])
def test_nan_stays_nan_and_in_its_row(errors, layer, rows):
    assert errors[f"{layer}, NaN in {rows}"] == 0


def test_the_greedy_choice_of_nan_lies_within_the_vocabulary(errors):
    assert errors["choice of NaN"] == 0


def test_the_greedy_choice_is_the_first_maximum(errors):
    assert errors["argmax"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", ROWS)
def test_the_largest_logit_is_the_first_maximum_of_the_product(errors, rows, dtype):
    assert errors[f"largest logit, {rows}, {dtype}"] == 0


def measure() -> dict[str, float]:
    torch.manual_seed(0)
    found: dict[str, float] = {}
    with torch.inference_mode():
        for (name, config), (norm_name, norm_class) in zip(
            LAYERS.items(), [*NORMS.items()] * len(LAYERS), strict=False
        ):
            for label, rows in ROWS.items():
                layer = config.build(D_MODEL).eval()
                layer.initialize(SCHEMES["modern"](num_residual_steps=2))
                norm = norm_class(D_MODEL, eps=1e-5)
                norm.weight.normal_(1, 0.3)
                found[f"{name}, {label}"] = worst_error(layer, norm, rows)
            if isinstance(config, MoEConfig):
                found[f"{name}, {MANY_ROWS}"] = worst_error(layer, norm, MANY_ROWS)
                for rows in (*ROWS.values(), MANY_ROWS):
                    found[f"{name}, NaN in {rows}"] = wrong_of_nan(layer, norm, rows)
            assert norm_name
        nan = torch.full((3, D_MODEL), torch.nan)
        choices = fused_step.largest_logit_step(nan, torch.randn(300, D_MODEL))
        found["choice of NaN"] = float(((choices < 0) | (choices >= 300)).sum())
        x = torch.randn(3, 9000)
        x[1, 17] = x[1, 8000] = x.max() + 1
        found["argmax"] = float((fused_step.argmax_step(x) - x.argmax(-1)).abs().max())
        for label, rows in ROWS.items():
            for dtype in (torch.float32, torch.float16):
                found[f"largest logit, {label}, {str(dtype).removeprefix('torch.')}"] = wrong_choices(
                    rows, dtype
                )
    return found


def wrong_of_nan(layer: Layer, norm: nn.Module, rows: int) -> float:
    """Return how many numbers are finite in a row whose input is NaN, and how many are not elsewhere."""
    x_BD = torch.randn(rows, D_MODEL)
    x_BD[rows // 2] = torch.nan
    zeros = torch.zeros(rows, dtype=torch.int64)
    y_BD = layer.decode_(x_BD, norm, SequenceInfo(None, None, zeros, zeros, observe_routers=False), None)
    finite_B = y_BD.isfinite().sum(1)
    finite_B[rows // 2] = D_MODEL - finite_B[rows // 2]
    return float((D_MODEL - finite_B).sum())


def wrong_choices(rows: int, dtype: torch.dtype) -> float:
    """Return how many greedy choices differ from those of the product, with level logits, negative ones and zeros.

    Small integers, whose sums are exact: most rows have several largest logits.
    """
    x = torch.randint(-2, 3, (rows, D_MODEL)).to(dtype)
    weight = torch.randint(-2, 3, (300, D_MODEL)).to(dtype)
    weight[[0, 299]] = weight[((x[0] @ weight.T).float()).argmax()].clone()
    x[-1] = 0 if rows > 2 else x[-1]
    expected = (x.double() @ weight.double().T).argmax(-1)
    weight_below = -weight.abs()  # every logit of a row of ones is negative
    below = fused_step.largest_logit_step(torch.ones_like(x), weight_below)
    wrong = below != (torch.ones_like(x).double() @ weight_below.double().T).argmax(-1)
    return float((fused_step.largest_logit_step(x, weight) != expected).sum() + wrong.sum())


def worst_error(layer: Layer, norm: nn.Module, rows: int) -> float:
    """Take one step both ways; return the largest error of the output and the states."""
    x_BLD = torch.randn(rows, 3, D_MODEL)
    zeros = torch.zeros(rows, dtype=torch.int64)
    sequence = SequenceInfo(None, None, zeros, zeros, observe_routers=False)
    exact, exact_norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    state = exact(x_BLD[:, :2].double(), sequence).state
    expected = exact(exact_norm(x_BLD[:, 2:].double()), sequence, state)
    truth = {"y": x_BLD[:, 2].double() + expected.y[:, 0]}
    own = layer(x_BLD[:, :2], sequence).state
    found = {"y": layer.decode_(x_BLD[:, 2], norm, sequence, own)}
    if own is not None:
        found |= own.tensors()
        truth |= expected.state.tensors()
    return max(distance(found[name], truth[name]) for name in truth)


if __name__ == "__main__":
    import switchmamba.layers.feed_forward.moe
    import switchmamba.layers.mixers.mamba

    for module in (switchmamba.layers.feed_forward.moe, switchmamba.layers.mixers.mamba):
        module.fused_step_unavailable = lambda _device, _dtype: None
    print(json.dumps(measure()))
