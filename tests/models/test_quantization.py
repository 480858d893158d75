"""A model in eight bits is the model with rounded weights: in every form of computing, on disk, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from switchmamba import LanguageModel, load
from switchmamba.checkpoint import read_tensors
from switchmamba.cli import main
from switchmamba.data.prepare import prepare
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.quantized import KEPT, Int8Linear, Int8MoE
from switchmamba.models.loading import copy_weights, save_model
from switchmamba.models.quantization import is_quantized, quantize
from switchmamba.ops.int8_linear import quantize_rows
from tests.generation.tiny_models import PRESETS, tiny_model, tiny_tokenizer


def rounded(model: LanguageModel) -> LanguageModel:
    """The same model in floating point, its projections and experts rounded to what eight bits can say."""
    model = copy.deepcopy(model)
    if model.config.tie_embeddings:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    for name, module in model.named_modules():
        weights = []
        if isinstance(module, MoE):
            weights = [module.w1_EFD, module.w2_EDF]
        elif type(module) is nn.Linear and name.split(".")[-1] not in KEPT:
            weights = [module.weight]
        for weight in weights:
            quantized, scale = quantize_rows(weight)
            weight.data = (quantized * scale[..., None]).to(weight.dtype)
    return model


def tokens(rows=3, length=40, seed=0):
    return torch.randint(
        tiny_tokenizer().vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def models() -> dict[str, LanguageModel]:
    made = {preset: tiny_model(preset, dtype=torch.float32) for preset in PRESETS}
    config = made["moe-mamba-tiny"].config
    for name, change in {
        "shared experts, two choices": {
            "layers": {**tables(config), "moe": moe(config, num_shared_experts=1, top_k=2)}
        },
        "inner experts": {
            "layers": {"mamba": inner(config)},
            "pattern": ["mamba"],
        },
        "mamba2": {"layers": {"mamba": {"kind": "mamba2", "head_dim": 16}}, "pattern": ["mamba"]},
        "tied": {"tie_embeddings": True},
    }.items():
        torch.manual_seed(0)
        made[name] = LanguageModel(type(config).model_validate(config.model_dump() | change)).eval()
    return made


def tables(config):
    return config.model_dump()["layers"]


def moe(config, top_k, **change):
    own = tables(config)["moe"] | {"activation": "swiglu"} | change
    return own | {"router": own["router"] | {"top_k": top_k}}


def inner(config):
    experts = {"num_experts": 4, "d_expert": 24, "activation": "relu"}
    return {"kind": "inner_moe_mamba", "projections": ["conv", "out"], "experts": experts}


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_it_computes_what_the_model_with_rounded_weights_does(name):
    model = MODELS[name]
    expected = rounded(model)(tokens()).logits
    found = quantize(copy.deepcopy(model))(tokens()).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (found - model(tokens()).logits).norm() > 1e-4 * expected.norm()  # and that is another model


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_step_by_step_equals_the_whole(name):
    model = quantize(copy.deepcopy(MODELS[name]))
    whole, asked = model(tokens()).logits, tokens()
    output = model(asked[:, :5])
    steps = [output.logits]
    for t in range(5, asked.shape[1]):
        output = model(asked[:, t : t + 1], state=output.state)
        steps.append(output.logits)
    assert (torch.cat(steps, 1) - whole).norm() <= 1e-5 * whole.norm()
    if model.state_grows:
        return
    state = model(asked[:, :5]).state
    for t in range(5, 9):
        logits_BV = model.decode_(asked[:, t], state)
        assert (logits_BV - whole[:, t]).norm() <= 1e-5 * whole[:, t].norm()


def test_what_decides_the_recurrence_and_the_routing_stays_fp32_under_bf16():
    model = quantize(copy.deepcopy(MODELS["moe-mamba-tiny"])).bfloat16()
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        if last in ("A_log", "D", "scale", "w1_scale_EF", "w2_scale_ED") or "router" in name:
            assert parameter.dtype == torch.float32, name
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), (Int8Linear, Int8MoE)):
            assert parameter.dtype == torch.int8, name
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_no_matrix_is_forgotten():
    for name, model in MODELS.items():
        model = quantize(copy.deepcopy(model))
        for path, module in model.named_modules():
            assert type(module) is not MoE, (name, path)
            assert type(module) is not nn.Linear or path.split(".")[-1] in KEPT, (name, path)


@pytest.mark.parametrize("name", ["moe-mamba-tiny", "transformer-moe-tiny", "tied", "inner experts"])
def test_a_checkpoint_in_eight_bits_comes_back_bit_for_bit(name, tmp_path):
    model = quantize(copy.deepcopy(MODELS[name]))
    save_model(tmp_path / "small", model, tiny_tokenizer())
    again, _ = load(tmp_path / "small")
    assert is_quantized(again)
    for (a_name, a), (b_name, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a_name == b_name
        assert torch.equal(a, b)
    with torch.inference_mode():
        assert torch.equal(model(tokens()).logits, again(tokens()).logits)


def test_the_command_writes_what_loading_with_quantization_gives(tmp_path, capsys):
    save_model(tmp_path / "full", MODELS["moe-mamba-tiny"], tiny_tokenizer())
    assert main(["quantize", str(tmp_path / "full"), "--out", str(tmp_path / "small")]) == 0
    assert "MB of weights" in capsys.readouterr().out
    loaded, _ = load(tmp_path / "full", quantization="int8")
    stored = read_tensors(tmp_path / "small" / "model.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.6 * sizes[0]  # of so small a model the embedding is a large part
    assert main(["quantize", str(tmp_path / "full"), "--out", str(tmp_path / "small")]) == 2


def test_what_is_not_for_inference_refuses_a_checkpoint_in_eight_bits_alike(tmp_path, capsys):
    small, out, text = tmp_path / "small", str(tmp_path / "out"), tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(500))))
    save_model(small, quantize(copy.deepcopy(MODELS["moe-mamba-tiny"])), tiny_tokenizer())
    prepare([text], tiny_tokenizer(), tmp_path / "data", validation_fraction=0)
    data = ["--data", str(tmp_path / "data"), "--out", out, "--data.context_length", "16", "--steps", "1"]
    for words in (
        ["quantize", str(small), "--out", out],
        ["export", str(small), "--to", "hf", "--out", out],
        ["upcycle", str(small), "--to", "moe-mamba-tiny", "--out", out],
        ["finetune", str(small), *data, "--training.validate_every", "0"],
    ):
        assert main(words) == 3, words
        assert f"{small}" in (error := capsys.readouterr().err) and "is in eight bits, for" in error
        assert not (tmp_path / "out").exists()


def test_generate_writes_the_same_from_both(tmp_path, capsys):
    save_model(tmp_path / "full", MODELS["moe-mamba-tiny"], tiny_tokenizer())
    assert main(["quantize", str(tmp_path / "full"), "--out", str(tmp_path / "small")]) == 0
    capsys.readouterr()
    words = ["--prompt", "calm", "--greedy", "--max-tokens", "12", "--device", "cpu"]
    texts = []
    for source in ([str(tmp_path / "full"), "--quantization", "int8"], [str(tmp_path / "small")]):
        assert main(["generate", *source, *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_routers_of_every_kind_stay_as_they_were():
    config = MODELS["moe-mamba-tiny"].config
    for kind in ("top_k", "expert_choice", "bias_balanced", "policy_gradient", "gumbel", "soft"):
        experts = {**tables(config)["moe"], "router": {"kind": kind}}
        change = {"layers": {**tables(config), "moe": experts}}
        model = LanguageModel(type(config).model_validate(config.model_dump() | change)).eval()
        before = {name: p.clone() for name, p in model.named_parameters() if ".router." in name}
        after = dict(quantize(model).named_parameters())
        assert before and all(torch.equal(after[name], value) for name, value in before.items()), kind


def test_it_is_not_trained_on(tmp_path):
    save_model(tmp_path / "small", quantize(copy.deepcopy(MODELS["mamba-tiny"])), tiny_tokenizer())
    with pytest.raises(CheckpointError, match="for inference"):
        copy_weights(copy.deepcopy(MODELS["mamba-tiny"]), tmp_path / "small" / "model.safetensors")
    with pytest.raises(ConfigError, match="training mode"):
        quantize(copy.deepcopy(MODELS["mamba-tiny"]).train())
    with pytest.raises(ConfigError, match="already"):
        quantize(quantize(copy.deepcopy(MODELS["mamba-tiny"])))
