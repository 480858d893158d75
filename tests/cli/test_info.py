"""``switchmamba info``: the figures of a preset, a file and a checkpoint, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from switchmamba import cli
from switchmamba.models.loading import save_model
from tests.generation.tiny_models import tiny_model, tiny_tokenizer

MODEL = """
[model]
vocab_size = 256
d_model = 32
num_blocks = 2
pattern = ["mamba", "moe"]
layers.mamba = { kind = "mamba" }
layers.moe = { kind = "moe", num_experts = 4, d_expert = 48 }
"""


def read(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main(["info", *map(str, words), "--json"]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    return figures


def test_a_preset_has_the_published_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    figures = read(capsys, "moe-mamba-25m")
    assert figures["parameters"]["total"] == 542_228_480
    assert figures["parameters"]["total_with_embeddings"] == 542_228_480 + 2 * 50_257 * 512
    assert figures["flops_per_token"]["training"] == 3 * figures["flops_per_token"]["forward"]


def test_overrides_batch_and_length_reach_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    before = read(capsys, "moe-mamba-tiny")
    more = read(capsys, "moe-mamba-tiny", "--model.layers.moe.num_experts", 8, "--batch", 16)
    assert more["parameters"]["total"] > before["parameters"]["total"]
    assert more["memory_bytes"]["activations"] > before["memory_bytes"]["activations"]
    longer = read(capsys, "transformer-tiny", "--length", 2048)["memory_bytes"]["state_per_sequence"]
    assert longer > read(capsys, "transformer-tiny")["memory_bytes"]["state_per_sequence"]


def test_a_file_that_only_describes_a_model_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(MODEL)
    assert read(capsys, tmp_path / "mine.toml")["parameters"]["active"] > 0


def test_a_file_without_a_vocabulary_is_counted_without_embedding_and_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole.toml").write_text(MODEL)
    (tmp_path / "open.toml").write_text(MODEL.replace("vocab_size = 256", ""))
    whole, without = (read(capsys, tmp_path / f"{name}.toml") for name in ("whole", "open"))
    assert without["vocab_size"] is without["parameters"]["embeddings"] is None
    assert without["parameters"]["total"] == whole["parameters"]["total"]
    head = 2 * 32 * 256
    assert without["flops_per_token"]["forward"] == whole["flops_per_token"]["forward"] - head
    assert without["memory_bytes"]["weights"] == 4 * whole["parameters"]["total"]
    assert cli.main(["info", str(tmp_path / "open.toml")]) == 0
    shown = capsys.readouterr().out
    assert "vocabulary not set" in shown and "--model.vocab_size N" in shown and "with embedding" not in shown
    assert read(capsys, tmp_path / "open.toml", "--model.vocab_size", 256) == whole | {
        "source": str(tmp_path / "open.toml")
    }


def test_a_checkpoint_has_the_parameters_of_its_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(dtype=torch.float32)
    training = {"training": {"of_another_version": 1}}
    save_model(tmp_path / "checkpoint", model, tiny_tokenizer(), training)
    counted = read(capsys, tmp_path / "checkpoint")["parameters"]["total_with_embeddings"]
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_the_table_shows_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "moe-mamba-25m"]) == 0
    out = capsys.readouterr().out
    assert "542,228,480" in out and "activations" in out and "state of one sequence" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["moe-mamba-tny"], 2, "did you mean moe-mamba-tiny?"),
        (
            ["moe-mamba-tiny", "--model.layers.moe.num_expert", "3"],
            2,
            "unknown key model.layers.moe.num_expert;",
        ),
        (["moe-mamba-tiny", "--training.learning_rat", "1"], 2, "did you mean learning_rate?"),
        (["moe-mamba-tiny", "--trainin.steps", "1"], 2, "did you mean training?"),
        (["moe-mamba-tiny", "--batch", "0"], 2, "--batch"),
        (["{dir}/none.toml"], 2, "no such configuration file"),
        (["{dir}"], 3, "{dir}: neither a run nor a checkpoint: checkpoints/ and manifest.json are missing"),
        (
            ["nothing"],
            2,
            "no run or checkpoint 'nothing' here, and no preset of that name; known: jamba-compat, jamba-compat-tiny, ",
        ),
        (["{dir}/open.toml", "--model.d_modl", "3"], 2, "unknown key model.d_modl; did you mean d_model?"),
    ],
)
def test_what_cannot_be_counted_is_one_line_with_its_exit_code(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "open.toml").write_text(MODEL.replace("vocab_size = 256", ""))
    message = message.replace("{dir}", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / "empty") if word == "{dir}" else word.format(dir=tmp_path) for word in words]
    assert cli.main(["info", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
