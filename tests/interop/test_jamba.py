"""Native models and JambaForCausalLM: the same logits and greedy tokens, and back again bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba import load
from switchmamba.cli import main
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.interop.conversion import export_checkpoint, import_checkpoint
from switchmamba.interop.verification import relative_difference
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.quantization import quantize
from tests.interop.foreign_models import WORDS, tokenizer
from tests.interop.native_models import greedy, save, tiny

transformers = pytest.importorskip("transformers")

ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "rope_base": None}
DENSE = {"kind": "mlp", "d_ff": 64, "activation": "swiglu"}
TOP_2 = ("layers.moe.router", {"kind": "top_k", "top_k": 2, "renormalize": False})
MODELS: dict[str, list[tuple[str, Any]]] = {
    "all Mamba, all experts": [],
    "raw top-2": [TOP_2],
    "odd sizes": [("layers.mamba.d_state", 5), ("layers.mamba.dt_rank", 3), ("layers.mamba.expand", 3)],
    "dense and experts": [("pattern", ["mamba", "mlp", "mamba", "moe"]), ("layers.mlp", DENSE)],
    "no experts": [
        ("pattern", ["mamba", "mlp"]),
        ("layers", {"mamba": {"kind": "mamba", "inner_norm_eps": 1e-5}, "mlp": DENSE}),
    ],
    "with attention": [
        ("pattern", ["mamba", "mlp", "attention", "moe", "mamba", "mlp"]),
        ("layers.mlp", DENSE),
        ("layers.attention", ATTENTION),
        ("num_blocks", 1),
        TOP_2,
    ],
    "tied": [("tie_embeddings", True)],
}
PROMPT = WORDS[:20]


def exported(tmp_path: Path, *overrides: tuple[str, Any]) -> tuple[LanguageModel, Path]:
    model = tiny("jamba-compat-tiny", *overrides)
    export_checkpoint(save(tmp_path / "native", model), "jamba", tmp_path / "jamba")
    return model, tmp_path / "jamba"


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_the_native_models_and_so_is_the_way_back(
    tmp_path: Path, name: str
) -> None:
    model, path = exported(tmp_path, *MODELS[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert type(theirs).__name__ == "JambaForCausalLM"
    ids = tokenizer().encode(PROMPT)
    with torch.no_grad():
        tokens = torch.tensor([ids * 3])
        assert relative_difference(theirs(tokens).logits, model(tokens).logits) < 2e-6
    theirs_too = theirs.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[
        0, len(ids) :
    ].tolist()
    assert greedy(model, PROMPT, 24) == theirs_too

    import_checkpoint(path, tmp_path / "back")
    back = load(tmp_path / "back").model
    assert [[back.config.layers[n].kind for n in step] for step in back.config.steps] == [
        [model.config.layers[n].kind for n in step] for step in model.config.steps
    ]
    for name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_greedy_tokens_are_equal_in_native_own_and_jamba_form(tmp_path: Path) -> None:
    import switchmamba.hf  # noqa: F401 - registers the classes

    model, path = exported(tmp_path)
    export_checkpoint(tmp_path / "native", "hf", tmp_path / "hf")
    ids = torch.tensor([tokenizer().encode(PROMPT)])
    drawn = []
    for folder, name in ((tmp_path / "hf", "SwitchMambaForCausalLM"), (path, "JambaForCausalLM")):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__name__ == name
        drawn.append(theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist())
    assert drawn[0] == drawn[1] == greedy(model, PROMPT, 40)


def test_the_added_layer_changes_no_bit_of_the_residual_stream(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert theirs.config.layer_types == ["linear_attention", "linear_attention", "full_attention"]
    seen: dict[str, torch.Tensor] = {}
    layer = theirs.model.layers[-1]
    layer.register_forward_hook(
        lambda _module, inputs, output: seen.update(entering=inputs[0], leaving=output)
    )
    theirs(torch.tensor([[3, 4, 5]]))
    assert torch.equal(seen["entering"], seen["leaving"])


def test_their_tokenizer_gives_our_ids(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    for text in (PROMPT, " two  spaces\n\n\tand äöü 字 \U0001f642", ""):
        ids = tokenizer().encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer().end_of_text_id
    spelled = "a <|endoftext|> b"
    assert tokenizer().end_of_text_id in theirs(spelled).input_ids
    assert theirs(spelled, split_special_tokens=True).input_ids == tokenizer().encode(spelled)


def test_experts_lie_one_by_one_under_the_names_that_other_loaders_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, path = exported(tmp_path)
    with safe_open(path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        up = file.get_tensor("model.layers.1.feed_forward.experts.2.up_proj.weight")
    assert torch.equal(up, model.get_parameter("layers.3.moe.w1_EFD")[2, 64:])
    assert "model.layers.0.feed_forward.router.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_a_jamba_of_theirs_with_attention_bfloat16_and_shards_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.JambaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=4,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=8,
        mamba_conv_bias=False,
    )
    theirs = transformers.JambaForCausalLM(config).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    tokenizer().save(tmp_path / "theirs" / "tokenizer.json")
    assert import_checkpoint(tmp_path / "theirs", tmp_path / "ours").relative < 1e-5
    model = load(tmp_path / "ours").model
    assert model.config.pattern == ["mamba", "mlp", "attention", "moe", "mamba", "mlp", "mamba", "moe"]


@pytest.mark.parametrize(
    ("preset", "overrides", "reasons"),
    [
        (
            "moe-mamba-25m",
            [("d_model", 32), ("num_blocks", 2), ("layers.moe.num_experts", 2), ("layers.moe.d_expert", 8)],
            [
                "model.norm = 'layernorm', Jamba has 'rmsnorm'",
                "model.final_norm = false",
                "mamba has no norms on Δ, B and C, Jamba has (inner_norm_eps = 1e-05)",
                "moe has activation = 'relu', Jamba has 'swiglu'",
                "jamba-compat",
                "--to hf exports every model",
            ],
        ),
        ("transformer-tiny", [], ["no mamba layer is in the pattern", "rope_base = 10000.0"]),
        ("mamba-tiny", [], ["a mixer and a feed-forward in turn"]),
        (
            "jamba-compat-tiny",
            [("norm_eps", 1e-6)],
            ["inner_norm_eps = 1e-05 and the model norm_eps = 1e-06"],
        ),
        ("jamba-compat-tiny", [("layers.mamba.expand", "3/2")], ["expand = 3/2, Jamba's is a whole number"]),
        ("jamba-compat-tiny", [("layers.moe.router.top_k", 2)], ["raw weights"]),
        (
            "jamba-compat-tiny",
            [("layers.moe.router", {"kind": "bias_balanced"})],
            ["router.kind = 'bias_balanced'"],
        ),
        (
            "jamba-compat-tiny",
            [("layers.moe.num_shared_experts", 1)],
            ["num_shared_experts = 1, Jamba has none"],
        ),
        ("jamba-compat-tiny", [("pattern", [["mamba", "moe"]])], ["side by side"]),
        (
            "jamba-compat-tiny",
            [
                ("pattern", ["mamba", "moe", "mamba", "mlp", "mamba", "moe", "mamba", "moe"]),
                ("layers.mlp", DENSE),
            ],
            ["experts do not stand at a fixed period"],
        ),
        (
            "jamba-compat-tiny",
            [("pattern", ["mamba", "moe", "mamba", "mlp"]), ("layers.mlp", DENSE | {"d_ff": 32})],
            ["mlp has d_ff = 32 and moe d_expert = 64"],
        ),
        (
            "jamba-compat-tiny",
            [
                ("pattern", ["mamba", "moe", "other", "moe"]),
                ("layers.other", {"kind": "mamba", "d_state": 4}),
            ],
            ["layers of kind mamba differ in d_state, inner_norm_eps"],
        ),
    ],
)
def test_what_is_no_jamba_is_refused_with_every_reason(
    tmp_path: Path, preset: str, overrides: list[tuple[str, Any]], reasons: list[str]
) -> None:
    native = save(tmp_path / "native", tiny(preset, *overrides))
    with pytest.raises(ConfigError, match="the model is no Jamba") as error:
        export_checkpoint(native, "jamba", tmp_path / "jamba")
    for reason in reasons:
        assert reason in str(error.value)
    assert [child.name for child in tmp_path.iterdir()] == ["native"]


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    native = save(tmp_path / "native", quantize(tiny()))
    with pytest.raises(CheckpointError, match="name the checkpoint that it was made of"):
        export_checkpoint(native, "jamba", tmp_path / "jamba")


def test_an_export_whose_logits_differ_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switchmamba.interop import jamba

    right = jamba.to_jamba
    monkeypatch.setattr(
        jamba,
        "to_jamba",
        lambda model, shape: {
            name: tensor.roll(1, 0).contiguous() if name.endswith("1.feed_forward.router.weight") else tensor
            for name, tensor in right(model, shape).items()
        },
    )
    native = save(tmp_path / "native", tiny())
    with pytest.raises(CheckpointError, match=r"the first to differ is what leaves layers\.3\.moe"):
        export_checkpoint(native, "jamba", tmp_path / "jamba")
    assert [child.name for child in tmp_path.iterdir()] == ["native"]


def test_a_configuration_that_transformers_refuses_is_a_checkpoint_that_cannot_be_used(
    tmp_path: Path,
) -> None:
    _, path = exported(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers refuses it: .*hidden_size"):
        import_checkpoint(path, tmp_path / "back")


def test_an_unknown_activation_is_refused_at_import(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu", "mamba_proj_bias": True}))
    with pytest.raises(ConfigError, match=r"hidden_act = 'gelu'.*mamba_proj_bias"):
        import_checkpoint(path, tmp_path / "back")


def test_the_preset_trains_exports_and_comes_back_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.training.tiny_run import prepare_tiny_data

    data, run = prepare_tiny_data(tmp_path / "tiny"), tmp_path / "run"
    small = [
        "--steps",
        "3",
        "--data.context_length",
        "16",
        "--training.batch_size",
        "2",
        "--training.validate_every",
        "3",
    ]
    assert main(["train", "jamba-compat-tiny", "--data", str(data), "--out", str(run), *small]) == 0
    assert main(["export", str(run), "--to", "jamba", "--out", str(tmp_path / "jamba")]) == 0
    assert "logits equal the native model's" in capsys.readouterr().out
    card = (tmp_path / "jamba" / "README.md").read_text()
    assert "| steps | 3 |" in card
    assert "| tokens | 96, in sequences of 16 |" in card
    assert "| validation loss | " in card
    assert "| data: tokenizer_sha256 | `" in card
    assert "One attention layer was added" in card
    assert main(["export", str(run), "--to", "jamba", "--out", str(tmp_path / "jamba")]) == 2
    assert main(["import", str(tmp_path / "jamba"), "--out", str(tmp_path / "back")]) == 0
    for path in (run, tmp_path / "back"):
        assert (
            main(["generate", str(path), "--prompt", "the cat", "--max-tokens", "8", "--temperature", "0"])
            == 0
        )
    texts = capsys.readouterr().out.splitlines()
    assert texts[-1] == texts[-2]
    assert Tokenizer.from_file(tmp_path / "jamba" / "tokenizer.json").sha256
