"""Inner MoE: what a Mamba layer with routed projections computes, how it starts, and what it refuses."""

import itertools
from math import sqrt

import pytest
import torch

from switchmamba import LanguageModel
from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.mixers.inner_moe_mamba import InnerMoEMambaConfig
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config
from switchmamba.models.accounting import account
from tests.layers.contract import D_MODEL, build_layer, example_model, one_document
from tests.layers.test_contract import random_input, relative
from tests.models.test_accounting import saved_values_per_token

COMBINATIONS = [
    list(chosen) for n in (1, 2, 3) for chosen in itertools.combinations(("conv", "gate", "out"), n)
]


def inner_moe(**changes: object) -> InnerMoEMambaConfig:
    tables = {"projections": ["out"], "experts": {"num_experts": 3, "d_expert": 10, "activation": "relu"}}
    return validate(InnerMoEMambaConfig, tables | changes, source="x")


@pytest.mark.parametrize("projections", COMBINATIONS, ids="-".join)
def test_one_expert_that_is_the_matrix_makes_it_the_mamba_layer(projections):
    torch.manual_seed(0)
    mamba = MambaConfig().build(D_MODEL).double()
    mamba.initialize(SCHEMES["modern"](num_residual_steps=2))
    inner = 2 * D_MODEL
    config = inner_moe(
        projections=projections,
        experts={"num_experts": 1, "d_expert": 2 * inner, "activation": "relu"},
    )
    layer = config.build(D_MODEL).double()
    layer.load_state_dict(mamba.state_dict(), strict=False)
    conv, gate = mamba.in_proj.weight.chunk(2)
    matrices = {"conv": conv, "gate": gate, "out": mamba.out_proj.weight}
    with torch.no_grad():
        for name, matrix in matrices.items():
            module = layer.get_submodule(f"{name}_proj")
            if name not in projections:
                module.weight.copy_(matrix)
                continue
            width = matrix.shape[1]  # W relu(x) - W relu(-x) = W x
            module.router.weight.zero_()
            module.w1_EFD.zero_()
            module.w2_EDF.zero_()
            module.w1_EFD[0, : 2 * width] = torch.cat([torch.eye(width), -torch.eye(width)])
            module.w2_EDF[0, :, : 2 * width] = torch.cat([matrix, -matrix], 1)
    x = random_input()
    expected, found = mamba(x, one_document(2)), layer(x, one_document(2))
    assert relative(found.y, expected.y) < 1e-12
    assert relative(found.state.ssm_BIN, expected.state.ssm_BIN) < 1e-12
    assert len(found.router_stats) == len(projections)


def test_router_statistics_come_in_the_order_of_the_projections():
    layer = build_layer("inner-moe-conv-gate-out").eval()
    x = random_input()
    u = x.flatten(0, 1)
    own = [layer.conv_proj.router(u, None), layer.gate_proj.router(u, None)]
    stats = layer(x, one_document(2)).router_stats
    assert [s.tokens_per_expert_E.tolist() for s in stats[:2]] == [
        routing.stats.tokens_per_expert_E.tolist() for routing in own
    ]
    assert len(stats) == 3 and not torch.equal(stats[0].probability_sum_E, stats[1].probability_sum_E)


def test_only_the_experts_that_end_the_branch_are_scaled_by_depth():
    layer = inner_moe(projections=["conv", "gate", "out"]).build(64)
    layer.initialize(SCHEMES["modern"](num_residual_steps=16))
    for projection, scale in (("conv_proj", 1), ("gate_proj", 1), ("out_proj", 1 / 4)):
        largest = float(layer.get_submodule(projection).w2_EDF.abs().max().detach())
        assert largest == pytest.approx(scale / sqrt(10), rel=0.01)
        assert largest <= scale / sqrt(10)


def test_the_scheme_of_the_paper_starts_experts_by_its_fan_in():
    layer = inner_moe(
        projections=["conv", "gate", "out"],
        experts={"num_experts": 6, "d_expert": 40, "activation": "relu"},
    ).build(64)
    layer.initialize(SCHEMES["paper"](num_residual_steps=16))
    for projection, d_in in (("conv_proj", 64), ("gate_proj", 64), ("out_proj", 128)):
        moe = layer.get_submodule(projection)
        assert float(moe.w1_EFD.std().detach()) == pytest.approx(sqrt(0.1 / d_in), rel=0.05)
        assert float(moe.w2_EDF.std().detach()) == pytest.approx(sqrt(0.1 / (6 * 40)), rel=0.05)


def test_the_order_in_which_projections_are_named_does_not_matter():
    assert inner_moe(projections=["out", "conv"]) == inner_moe(projections=["conv", "out"])


@pytest.mark.parametrize(
    ("config_class", "tables", "message"),
    [
        (InnerMoEMambaConfig, {"projections": []}, "name at least one of"),
        (InnerMoEMambaConfig, {"projections": ["conv", "conv"]}, "each once"),
        (InnerMoEMambaConfig, {"projections": ["in"]}, "projections.0 = 'in'"),
        (
            InnerMoEMambaConfig,
            {"projections": ["conv"], "experts": {"d_expert": 3}},
            "experts.num_experts is missing",
        ),
        (InnerMoEMambaConfig, {"expand": "1/100"}, None),
        (MambaConfig, {"projections": ["conv"]}, "unknown key projections"),
        (Mamba2Config, {"projections": ["conv"]}, "unknown key projections"),
        (Mamba2Config, {"experts": {"num_experts": 2, "d_expert": 3}}, "unknown key experts"),
    ],
)
def test_what_it_cannot_be_is_refused(config_class, tables, message):
    experts = {"experts": {"num_experts": 2, "d_expert": 3}, "projections": ["conv"]}
    tables = (experts if config_class is InnerMoEMambaConfig else {}) | tables
    if message is None:
        with pytest.raises(ValueError, match="choose a larger expand"):
            validate(config_class, tables, source="x").check(D_MODEL)
        return
    with pytest.raises(ConfigError, match=message):
        validate(config_class, tables, source="x")


@pytest.mark.parametrize("name", ["inner-moe-every-layer", "inner-moe-every-other-layer"])
def test_activation_memory_is_what_autograd_saves(name):
    config = example_model(name, d_model=96, norm="layernorm")
    saved = saved_values_per_token(LanguageModel(config).train(), torch.zeros(2, 256, dtype=torch.int64))
    assert account(config).activation_values_per_token == pytest.approx(saved, rel=0.03)


def test_bf16_autocast_stays_near_fp32():
    layer, x = build_layer("inner-moe-conv-gate-out", dtype=torch.float32).train(), random_input().float()
    exact = layer(x, one_document(2)).y
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = layer(x, one_document(2)).y
    assert 1e-4 < relative(near.float(), exact) < 5e-2
