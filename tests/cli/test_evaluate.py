import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from switchmamba import cli
from switchmamba.checkpoint import write_directory
from switchmamba.data.prepare import prepare
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.evaluation.perplexity import evaluate
from switchmamba.evaluation.repeats import repeats
from switchmamba.models.loading import load, save_model
from tests.generation.tiny_models import TEXTS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "checkpoint"
    save_model(path, tiny_model(dtype=torch.float32), tiny_tokenizer())
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def run(checkpoint, capsys):
    """Run ``switchmamba evaluate`` on the checkpoint; return exit code, stdout, stderr."""

    def call(*words, path=checkpoint):
        code = cli.main(["evaluate", str(path), "--device", "cpu", *map(str, words)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def source(checkpoint, step=None):
    return {"checkpoint": str(checkpoint), "step": step}


def test_json_holds_the_checkpoint_the_evaluation_and_nothing_else(run, checkpoint, text):
    code, out, _ = run("--data", text, "--json")
    assert code == 0
    assert json.loads(out) == source(checkpoint) | asdict(evaluate(*load(checkpoint), text))


def test_of_a_run_the_newest_step_is_named(run, checkpoint, text, tmp_path):
    step = tmp_path / "checkpoints" / "step-7"
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    write_directory(step, {name: (checkpoint / name).read_bytes() for name in names}, {"step": 7})
    result = json.loads(run("--data", text, "--json", path=tmp_path)[1])
    assert {name: result[name] for name in ("checkpoint", "step")} == source(step, 7)
    assert f"checkpoint    {step}, step 7\n" in run("--data", text, path=tmp_path)[1]


def test_every_option_reaches_the_evaluation(run, checkpoint, text, tmp_path):
    prepare([text], tiny_tokenizer(), tmp_path / "data", validation_inputs=[text])
    options = ["--split", "train", "--max-tokens", 40, "--batch-size", 2, "--chunk-size", 8]
    code, out, _ = run("--data", tmp_path / "data", "--json", *options)
    model, tokenizer = load(checkpoint)
    expected = evaluate(
        model, tokenizer, tmp_path / "data", split="train", max_tokens=40, batch_size=2, chunk_size=8
    )
    assert (code, json.loads(out)) == (0, source(checkpoint) | asdict(expected))


def test_the_table_says_what_the_numbers_are(run, checkpoint, text):
    code, out, err = run("--data", text)
    result = evaluate(*load(checkpoint), text)
    assert code == 0
    assert f"{result.loss:.4f} nats per token" in out
    assert f"{result.bits_per_byte:.4f}" in out
    assert f"{result.tokens:,} in {result.documents} documents" in out
    assert "tok/s" in err


def test_repeats_are_measured_in_place_of_the_text(run, checkpoint, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(f"{i} sea, {i * i} ships;" for i in range(60)))
    options = ["--repeats", "--chunk-size", 200, "--max-tokens", 300, "--batch-size", 4]
    code, out, err = run("--data", tmp_path / "long.txt", "--json", *options)
    expected = repeats(
        *load(checkpoint), tmp_path / "long.txt", context_length=200, max_tokens=300, batch_size=4
    )
    assert (code, json.loads(out)) == (0, source(checkpoint) | expected.model_dump())
    assert f"{expected.tokens_read:,} tokens, " in err
    table = run("--data", tmp_path / "long.txt", *options)[1]
    (planted,) = expected.planted
    assert f"{planted.first.loss:12.4f}{100 * planted.first.accuracy:10.2f} %" in table
    assert f"{planted.second.loss:14.4f}{100 * planted.second.accuracy:10.2f} %" in table
    assert all(f"{ngram.loss:12.4f}" in table for ngram in expected.natural)


def test_one_document_is_singular(run, tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    assert " in 1 document, 5 bytes\n" in run("--data", tmp_path / "one.txt")[1]


def test_another_tokenizers_data_is_exit_3(run, text, tmp_path):
    other = Tokenizer.train(["quite different words"], vocab_size=270)
    prepare([text], other, tmp_path / "data", validation_inputs=[text])
    code, out, err = run("--data", tmp_path / "data")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "another tokenizer" in err


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ([], 2, "--data"),
        (["--data", "{text}", "--split", "test"], 2, "--split"),
        (["--data", "{text}", "--max-tokens", "0"], 2, "max-tokens"),
        (["--data", "{text}", "--batch-size", "0"], 2, "batch-size"),
        (["--data", "{text}", "--device", "quantum"], 2, "quantum"),
        (["--data", "{dir}/none"], 3, "none"),
        (["--data", "{text}", "--field", "body"], 3, "line 1"),
        (["--data", "{latin}"], 3, "byte 3"),
        (["--data", "{empty}"], 3, "empty.jsonl"),
        (["--data", "{dir}/damaged"], 3, "index.json"),
    ],
)
def test_what_cannot_work_is_one_line_with_its_exit_code(options, code, part, run, text, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "index.json").write_text("{")
    names = {
        "text": text,
        "latin": tmp_path / "latin.txt",
        "empty": tmp_path / "empty.jsonl",
        "dir": tmp_path,
    }
    result, out, err = run(*(option.format(**names) for option in options))
    assert (result, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err


def test_refusals_come_before_torch_is_imported(checkpoint, text, tmp_path):
    for words in ([checkpoint, "--data", tmp_path / "none"], [tmp_path / "none", "--data", text]):
        program = (
            "import sys; from switchmamba.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
        )
        command = [sys.executable, "-c", program, "evaluate", *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stdout == "3 False\n", result.stderr
