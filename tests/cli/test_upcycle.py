"""``switchmamba upcycle`` and ``train --from``: from a trained model to a trained mixture of experts, and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from switchmamba.cli import main
from switchmamba.models.loading import load
from tests.layers.test_contract import relative
from tests.training.tiny_run import prepare_tiny_data, read_lines

SMALL = ("--data.context_length=16", "--training.batch_size", "2", "--threads", "1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of shards."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def source(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Transformer."""
    run = tmp_path_factory.mktemp("source") / "transformer"
    assert main(train(data_dir, run, "transformer-tiny", "--steps", "3")) == 0
    return run


def train(data: Path, out: Path, preset: str, *more: str) -> list[str]:
    return ["train", preset, "--data", str(data), "--out", str(out), *SMALL, *more]


def test_from_dense_to_sparse_to_trained_to_resumed_to_text(
    source: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown, run = tmp_path / "grown", tmp_path / "run"
    two = ("--model.layers.moe.router.top_k", "2")
    assert main(["upcycle", str(source), "--to", "transformer-moe-tiny", *two, "--out", str(grown)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{grown}: (attention → moe) × 2 from {source}/checkpoints/step-3"
    assert [line.strip() for line in lines[1:3]] == [
        "2 × attention: copied",
        "2 × moe: 4 experts, each a copy, in place of mlp",
    ]
    config = json.loads((grown / "config.json").read_text())
    assert config["upcycled_from"] == {
        "checkpoint": f"{source}/checkpoints/step-3",
        "step": 3,
        "experts": "copy",
        "seed": 0,
    }
    before, after = (load(path) for path in (source, grown))
    assert after.tokenizer.sha256 == before.tokenizer.sha256
    tokens = torch.randint(280, (4, 30))
    logits, new_logits = (loaded.model(tokens).logits.detach() for loaded in (before, after))
    assert relative(new_logits, logits) < 1e-6

    command = train(data_dir, run, "transformer-moe-tiny", *two, "--from", str(grown))
    assert main([*command, "--steps", "2"]) == 0
    assert main([*command, "--steps", "4", "--resume"]) == 0
    assert [line["step"] for line in read_lines(run)] == [1, 2, 3, 4]
    assert "starting from the weights of" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "the", "--max-tokens", "3"]) == 0
    assert main(["evaluate", str(grown), "--data", str(data_dir), "--max-tokens", "50"]) == 0
    assert main(["info", str(grown)]) == 0


def test_new_layers_leave_the_loss_as_it_is(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, grown = tmp_path / "mamba", tmp_path / "grown"
    assert main(train(data_dir, source, "mamba-tiny", "--steps", "2")) == 0
    target = ["--to", "moe-mamba-tiny", "--model.num_blocks", "4"]
    assert main(["upcycle", str(source), *target, "--out", str(grown)]) == 0
    assert "4 × moe: new, its output 0" in capsys.readouterr().out
    losses = []
    for path in (source, grown):
        assert main(["evaluate", str(path), "--data", str(data_dir), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]


def test_the_seed_decides_the_fresh_weights(source: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / name
        words = ["--to", "transformer-moe-tiny", "--experts", "fresh", "--seed", seed, "--out", str(out)]
        assert main(["upcycle", str(source), *words]) == 0
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "did you mean transformer-moe-tiny?", ["--to", "transformer-moe-tny"]),
        (
            2,
            "layers.1.moe has d_expert = 64, the mlp in its place d_ff",
            ["--model.layers.moe.d_expert", "64"],
        ),
        (2, "(attention → mlp) × 2 cannot become (mamba → moe) × 2", ["--to", "moe-mamba-tiny"]),
        (2, "model.vocab_size (280 → 300)", ["--model.vocab_size", "300"]),
        (2, "did you mean num_experts?", ["--model.layers.moe.num_expert", "3"]),
        (2, "--out . exists; checkpoints are never overwritten", ["--out", "."]),
        (2, "is empty; name a directory", ["--out", ""]),
        (2, "--training.steps: nothing is trained here", ["--training.steps", "3"]),
        (2, "--experts", ["--experts", "many"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_and_leaves_nothing(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    message: str,
    words: list[str],
) -> None:
    out = tmp_path / "grown"
    arguments = ["upcycle", str(source), "--to", "transformer-moe-tiny", "--out", str(out), *words]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["upcycle", "missing", "--to", "moe-mamba-tiny", "--out", "grown"],
        ["train", "moe-mamba-tiny", "--data", "DATA", "--out", "run", "--from", "missing"],
    ],
)
def test_a_checkpoint_that_is_missing_is_answered_without_torch(
    data_dir: Path, tmp_path: Path, words: list[str]
) -> None:
    words = [str(data_dir) if word == "DATA" else word for word in words]
    program = (
        f"import sys; from switchmamba.cli import main; code = main({words!r}); "
        "sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (3, "error: missing: no such checkpoint\n")
    assert not list(tmp_path.iterdir())


def test_a_run_from_another_model_names_the_fields(
    source: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train(data_dir, tmp_path / "run", "transformer-tiny", "--from", str(source))
    assert main([*arguments, "--model.layers.mlp.activation", "relu"]) == 2
    assert "model.layers.mlp.activation (was 'swiglu', is 'relu')" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
