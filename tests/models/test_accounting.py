"""Counts from the configuration equal the published ones, and those of the module that is built."""

import json
from fractions import Fraction

import pytest
import torch

from switchmamba import LanguageModel, presets
from switchmamba.config import apply_overrides, validate
from switchmamba.layers.feed_forward.moe import mixtures
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config
from switchmamba.models.accounting import account
from switchmamba.models.config import ModelConfig
from switchmamba.ops import linear_cross_entropy
from tests.layers.contract import PATTERNS, example_model

PUBLISHED = {  # total, active; without embedding and head
    "mamba-25m": (27_131_904, 27_131_904),
    "moe-mamba-25m": (542_228_480, 26_329_088),
    "moe-mamba-25m-e32": (416_358_400, 26_288_128),
    "transformer-25m": (25_182_208, 25_182_208),
    "transformer-moe-25m": (545_406_976, 25_313_280),
    "mamba-100m": (120_717_312, 120_717_312),
    "moe-mamba-100m": (2_439_069_696, 117_522_432),
    "transformer-100m": (113_295_360, 113_295_360),
    "transformer-moe-100m": (2_454_110_208, 113_688_576),
}


def preset(name: str, **overrides: object) -> ModelConfig:
    dotted = [(key.replace("__", "."), value) for key, value in overrides.items()]
    return validate(ModelConfig, apply_overrides(presets[name]["model"], dotted), source=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_exactly_the_published_parameters(name):
    counted = account(preset(name))
    assert (counted.parameters, counted.active_parameters) == PUBLISHED[name]


def test_mamba_2_layer_has_the_parameters_of_the_upstream_module():
    # mamba_ssm's Mamba2(512): in_proj 512 · 2320, conv1d 1280 · 5, A_log, D, dt_bias 16 each, norm 1024,
    # out_proj 1024 · 512
    assert Mamba2Config().cost(512).parameters == 1_719_600
    assert account(preset("mamba2-25m")).parameters == 16 * (1_719_600 + 2 * 512)
    moe, moe2 = account(preset("moe-mamba-25m")), account(preset("moe-mamba2-25m"))
    assert moe2.parameters - moe.parameters == 8 * (1_719_600 - 1_694_720)
    assert moe2.active_parameters - moe.active_parameters == 8 * (1_719_600 - 1_694_720)


@pytest.mark.parametrize("name", presets)
def test_counts_of_a_preset_equal_the_built_model(name):
    config = preset(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    counted = account(config)
    assert counted.parameters_with_embeddings == sum(p.numel() for p in model.parameters())
    assert counted.embedding_parameters == 2 * config.vocab_size * config.d_model


@pytest.mark.parametrize(("d_model", "parameters"), [(512, 1_694_720), (768, 3_770_880)])
def test_one_mamba_layer_has_the_counts_of_the_specification(d_model, parameters):
    assert MambaConfig().cost(d_model).parameters == parameters


@pytest.mark.parametrize(
    ("expand", "d_inner", "d_expert", "experts", "total", "active"),
    [
        ("2/3", 341, 2560, 19, 403, 25.6),
        ("4/3", 682, 2048, 24, 412, 25.9),
        ("2", 1024, 1536, 32, 416, 26.3),
        ("8/3", 1365, 1024, 48, 421, 26.7),
        ("10/3", 1706, 512, 96, 426, 27.2),
    ],
)
def test_ratio_table_follows_from_a_fractional_expand(expand, d_inner, d_expert, experts, total, active):
    config = preset(
        "moe-mamba-25m",
        layers__mamba__expand=expand,
        layers__moe__d_expert=d_expert,
        layers__moe__num_experts=experts,
    )
    mamba = config.layers["mamba"]
    assert mamba.d_inner(512) == d_inner and mamba.expand == Fraction(expand)
    counted = account(config)
    assert counted.parameters / 1e6 == pytest.approx(total, abs=0.5)
    assert counted.active_parameters / 1e6 == pytest.approx(active, abs=0.06)


def test_six_to_zero_is_eight_layers_of_expand_four():
    assert account(preset("mamba-25m", num_blocks=8, layers__mamba__expand=4)).parameters == 27_123_712


@pytest.mark.parametrize("name", PATTERNS)
def test_state_bytes_equal_those_of_a_real_state(name):
    config = example_model(name)
    counted, model = account(config), LanguageModel(config).eval()
    for length in (1, 9):
        state = model(torch.zeros(1, length, dtype=torch.int64)).state
        assert state.num_bytes == counted.state_bytes_per_sequence(length)


@pytest.mark.parametrize("name", PATTERNS)
def test_flops_are_at_least_two_per_active_matrix_entry(name):
    config = example_model(name)
    matrices = [p for p in LanguageModel(config).parameters() if p.dim() == 2 and min(p.shape) > 5]
    counted = account(config)
    assert counted.forward_flops_per_token(1) >= 2 * counted.config.d_model * counted.config.vocab_size
    assert counted.training_flops_per_token(64) == 3 * counted.forward_flops_per_token(64)
    dense = not any(mixtures(config))
    if dense:
        assert counted.forward_flops_per_token(1) >= 2 * sum(p.numel() for p in matrices[1:])


def saved_values_per_token(model: LanguageModel, tokens: torch.Tensor) -> float:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _, _ = model.hidden_states(tokens)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens.flatten())
    saved = (
        sum(storages.values()) - 4 * model.head_weight.numel()
    )  # the head's gradient, made on the way forward
    assert loss.requires_grad
    return saved / 4 / tokens.numel()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba", {"norm": "rmsnorm"}),
        ("mamba", {"norm": "layernorm"}),
        ("moe-mamba", {"norm": "rmsnorm"}),
        ("moe-mamba", {"layers__moe__activation": "swiglu", "final_norm": False}),
        ("transformer", {"norm": "layernorm"}),
        ("transformer", {"layers__mlp__activation": "swiglu"}),
        ("transformer", {"layers__mlp__activation": "gelu"}),
        ("transformer-moe", {"layers__moe__router__top_k": 2}),
    ],
)
def test_activation_memory_is_what_autograd_saves(name, changes):
    config = preset(f"{name}-demo", num_blocks=2, vocab_size=64, **changes)
    saved = saved_values_per_token(LanguageModel(config).train(), torch.zeros(2, 256, dtype=torch.int64))
    assert account(config).activation_values_per_token == pytest.approx(saved, rel=0.03)


def test_activation_memory_of_mamba_2_is_what_autograd_saves():
    config = preset("mamba2-tiny", num_blocks=2, d_model=64)
    saved = saved_values_per_token(LanguageModel(config).train(), torch.zeros(2, 256, dtype=torch.int64))
    assert account(config).activation_values_per_token == pytest.approx(saved, rel=0.03)


def test_attention_costs_grow_with_length_and_mamba_costs_do_not():
    mamba, transformer = account(preset("mamba-25m")), account(preset("transformer-25m"))
    assert mamba.decode_flops_per_token(10**6) == mamba.decode_flops_per_token(1)
    assert mamba.state_bytes_per_sequence(10**6) == mamba.state_bytes_per_sequence(1)
    assert transformer.decode_flops_per_token(10**6) > 10 * transformer.decode_flops_per_token(1)
    assert transformer.state_bytes_per_sequence(10**6) > 10**9


def test_account_is_plain_json():
    tables = account(preset("moe-mamba-25m")).as_dict(batch=8, length=256)
    assert json.loads(json.dumps(tables))["parameters"]["total"] == 542_228_480


@pytest.mark.parametrize("name", presets)
def test_resolved_configuration_reads_back_equal(name):
    config = preset(name)
    again = validate(ModelConfig, json.loads(json.dumps(config.model_dump(mode="json"))), source="json")
    assert again == config
