"""Native checkpoints and this package's own Hugging Face folders: the same logits, exactly, and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import switchmamba.hf  # noqa: F401, registers the classes
from switchmamba import load
from switchmamba.checkpoint import ALIGNMENT
from switchmamba.cli import main
from switchmamba.errors import CheckpointError
from switchmamba.interop.conversion import export_checkpoint, import_checkpoint
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.loading import save_model
from tests.interop.foreign_models import WORDS, tokenizer
from tests.interop.native_models import greedy, save, tiny

MODELS: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "moe-mamba": ("moe-mamba-tiny", []),
    "mamba2": ("mamba2-tiny", []),
    "transformer-moe": ("transformer-moe-tiny", []),
    "jamba-compat": ("jamba-compat-tiny", []),
    "tied": ("moe-mamba-tiny", [("tie_embeddings", True)]),
    "parallel": ("moe-mamba-tiny", [("pattern", [["mamba", "moe"]]), ("norm_per_branch", True)]),
    "bias balanced": ("moe-mamba-tiny", [("layers.moe.router", {"kind": "bias_balanced"})]),
    "looks ahead": ("moe-mamba-tiny", [("layers.moe.router", {"kind": "expert_choice"})]),
}


def exported(tmp_path: Path, name: str) -> tuple[LanguageModel, Path]:
    preset, overrides = MODELS[name]
    model = tiny(preset, *overrides)
    report = export_checkpoint(save(tmp_path / "native", model), "hf", tmp_path / "hf")
    assert report.agreement.relative == 0
    assert (
        len({file.stat().st_mode for file in (tmp_path / "hf").iterdir()}) == 1
    )  # none more private than others
    return model, tmp_path / "hf"


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_no_bit(tmp_path: Path, name: str) -> None:
    model, path = exported(tmp_path, name)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([tokenizer().encode(WORDS)])
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in theirs.parameters())  # AMD rounds by it
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert import_checkpoint(path, tmp_path / "back").relative == 0
    back, read = load(tmp_path / "back")
    assert back.config == model.config and read.sha256 == tokenizer().sha256
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(parameter_name), parameter)


def test_text_goes_the_same_way_in_both(tmp_path: Path) -> None:
    model, path = exported(tmp_path, "moe-mamba")
    theirs, words = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert words.eos_token_id == theirs.generation_config.eos_token_id == tokenizer().end_of_text_id
    prompt = words(WORDS[:20], return_tensors="pt")
    assert prompt.input_ids[0].tolist() == tokenizer().encode(WORDS[:20])
    drawn = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert drawn.tolist() == greedy(model, WORDS[:20], 24)


def test_the_weights_of_the_routing_losses_go_along(tmp_path: Path) -> None:
    tables = {"training": {"load_balance_coef": 0.5, "router_z_coef": 0.25}}
    save_model(tmp_path / "native", tiny("moe-mamba-tiny"), tokenizer(), tables)
    export_checkpoint(tmp_path / "native", "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["router_aux_loss_coef"], config["router_z_coef"]) == (0.5, 0.25)


def test_16_bit_folders_of_several_files_are_read_in_fp32(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "moe-mamba")
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors.index.json").is_file()
    assert import_checkpoint(tmp_path / "half", tmp_path / "back").relative == 0
    assert {p.dtype for p in load(tmp_path / "back").model.parameters()} == {torch.float32}


def test_a_damaged_or_other_folder_is_refused_whole(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "moe-mamba")
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for held, message in (
        (lacking, r"lacks the tensor lm_head\.weight"),
        (tensors | {"score.weight": torch.zeros(2, 2)}, r"holds score\.weight, which the model has no place"),
        (tensors | {"lm_head.weight": torch.zeros(2, 2)}, r"lm_head\.weight is \(2, 2\)"),
    ):
        save_file(held, weights, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_commands_go_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "native", tiny("moe-mamba-tiny"))
    assert main(["export", str(tmp_path / "native"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    assert "import switchmamba.hf" in (tmp_path / "hf" / "README.md").read_text()
    capsys.readouterr()
