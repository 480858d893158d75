import json
import subprocess
import sys

import pytest
import torch

from switchmamba import cli
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.loading import load, save_model
from tests.generation.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "checkpoint"
    save_model(path, tiny_model(dtype=torch.float32), tiny_tokenizer())
    return path


@pytest.fixture
def run(checkpoint, capsys):
    """Run ``switchmamba generate`` on the checkpoint; return exit code, stdout, stderr."""

    def call(*words, path=checkpoint):
        code = cli.main(["generate", str(path), "--device", "cpu", *map(str, words)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def expected(checkpoint, prompts, settings, **named):
    model, tokenizer = load(checkpoint)
    return generate(model, tokenizer, prompts, settings, **named).result.completions


def test_the_continuation_goes_to_stdout_and_the_speed_to_stderr(run, checkpoint):
    code, out, err = run("--prompt", "The sea", "--max-tokens", 20, "--seed", 5)
    (row,) = expected(checkpoint, ["The sea"], SamplingSettings(seed=5), max_tokens=20)
    assert (code, out) == (0, row.text + "\n")
    assert "tok/s" in err and "seed 5" in err and "Traceback" not in err


def test_every_sampling_option_reaches_the_sampler(run, checkpoint):
    options = [
        "--temperature",
        0.7,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--seed",
        3,
        "--stop",
        "\n",
        "--stop",
        "e",
    ]
    code, out, _ = run("--prompt", "a", "--max-tokens", 40, *options)
    settings = SamplingSettings(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, seed=3)
    (row,) = expected(checkpoint, ["a"], settings, max_tokens=40, stop=["\n", "e"])
    assert (code, out) == (0, row.text + "\n")


def test_greedy_is_temperature_zero(run):
    greedy = run("--prompt", "a", "--max-tokens", 10, "--greedy")
    assert greedy[1] == run("--prompt", "a", "--max-tokens", 10, "--temperature", 0)[1]


def test_without_a_seed_samples_differ_and_the_seed_that_is_logged_repeats_one(run):
    first, second = (run("--prompt", "a", "--max-tokens", 30) for _ in range(2))
    assert first[1] != second[1]
    seed = first[2].split("seed ")[1].split()[0]
    assert run("--prompt", "a", "--max-tokens", 30, "--seed", seed)[1] == first[1]


def test_json_is_one_object_on_stdout(run, checkpoint):
    code, out, _ = run("--prompt", "The", "--max-tokens", 7, "--seed", 1, "--json")
    (row,) = expected(checkpoint, ["The"], SamplingSettings(seed=1), max_tokens=7)
    result = json.loads(out)
    assert code == 0
    assert result["completions"] == [
        {
            "prompt": "The",
            "text": row.text,
            "finish_reason": row.finish_reason,
            "token_ids": list(row.token_ids),
        }
    ]
    assert result["prompt_tokens"] == len(tiny_tokenizer().encode("The"))
    assert result["drawn_tokens"] == len(row.token_ids) + (row.finish_reason == "end_of_text")
    assert result["decoded_tokens"] == result["drawn_tokens"] - 1
    assert (result["checkpoint"], result["step"]) == (str(checkpoint), None)
    assert result["prompt_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
    assert result["seed"] == 1


def test_what_is_reported_is_what_was_drawn_and_a_seed_only_where_it_was_used(run, tmp_path):
    assert "; drew 3, " in run("--prompt", "a", "--max-tokens", 3, "--seed", 1)[2]
    greedy = run("--prompt", "a", "--max-tokens", 3, "--greedy", "--json")
    assert "seed" not in greedy[2] and json.loads(greedy[1])["seed"] is None
    only_read = run("--prompt", "a", "--max-tokens", 0)[2]
    assert "drew" not in only_read and "seed" not in only_read and "read 1 token, " in only_read
    state = tmp_path / "state"
    assert "seed 6" in run("--prompt", "a", "--max-tokens", 0, "--seed", 6, "--save-state", state)[2]
    assert "seed" not in run("--load-state", state, "--max-tokens", 2)[2]
    assert "seed 7" in run("--load-state", state, "--max-tokens", 2, "--seed", 7)[2]


def test_other_fields_of_a_prompts_record_are_in_its_result(run, tmp_path):
    records = [{"id": 3, "prompt": "a", "tags": ["x"]}, {"prompt": "b", "text": "old"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, out, err = run("--prompts", tmp_path / "prompts.jsonl", "--max-tokens", 2, "--greedy")
    first, second = (json.loads(line) for line in out.splitlines())
    assert list(first) == ["id", "prompt", "tags", "text", "finish_reason", "token_ids"]
    assert (first["id"], first["tags"], second["prompt"]) == (3, ["x"], "b")
    assert second["text"] != "old" and "the results take the place of its text\n" in err


def test_a_prompt_can_come_from_a_file_or_from_stdin(run, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("für 3 €\n")
    options = ("--max-tokens", 8, "--greedy")
    expected_output = run("--prompt", "für 3 €\n", *options)[1]
    assert run("--prompt-file", tmp_path / "prompt.txt", *options)[1] == expected_output
    command = [sys.executable, "-m", "switchmamba", "generate", str(checkpoint), "--prompt-file", "-"]
    command += [*map(str, options), "--device", "cpu"]
    piped = subprocess.run(command, input="für 3 €\n".encode(), capture_output=True, timeout=60)
    assert piped.stdout.decode() == expected_output


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_file_of_prompts_becomes_a_file_of_completions(run, checkpoint, tmp_path, batch_size):
    prompts = ["The sea", "", "line\u2028separator", "🙂", "calm"]
    lines = [
        json.dumps({"prompt": prompt, "id": i}, ensure_ascii=i % 2 == 0) for i, prompt in enumerate(prompts)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines))
    out = tmp_path / "out.jsonl"
    code, stdout, _ = run(
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--out",
        out,
        "--batch-size",
        batch_size,
        "--max-tokens",
        9,
        "--seed",
        4,
    )
    assert (code, stdout) == (0, "")
    records = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    rows = expected(checkpoint, prompts, SamplingSettings(seed=4), max_tokens=9)
    assert [record["prompt"] for record in records] == prompts
    assert [record["token_ids"] for record in records] == [list(row.token_ids) for row in rows]
    assert [record["text"] for record in records] == [row.text for row in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_completions_of_a_file_go_to_stdout_without_out(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    options = ("--prompts", tmp_path / "prompts.jsonl", "--max-tokens", 3, "--greedy")
    lines = [json.loads(line) for line in run(*options)[1].splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "b"]
    assert json.loads(run(*options, "--json")[1])["completions"] == lines
    summary = json.loads(run(*options, "--json", "--out", tmp_path / "out.jsonl")[1])
    assert "completions" not in summary and summary["prompt_tokens"] == 2


def test_a_saved_state_goes_on_as_if_nothing_had_happened(run, tmp_path):
    state = tmp_path / "state"
    whole = run("--prompt", "The sea", "--max-tokens", 30, "--seed", 8, "--json")[1]
    start = run("--prompt", "The sea", "--max-tokens", 11, "--seed", 8, "--json", "--save-state", state)[1]
    rest = run("--load-state", state, "--max-tokens", 19, "--json")[1]
    token_ids = [json.loads(out)["completions"][0]["token_ids"] for out in (start, rest, whole)]
    assert token_ids[0] + token_ids[1] == token_ids[2]


def test_a_text_that_was_read_once_is_continued_by_several_prompts(run, checkpoint, tmp_path):
    state = tmp_path / "state"
    assert run("--prompt", "The sea was calm", "--max-tokens", 0, "--save-state", state)[1] == "\n"
    for more in (" and", "\n"):
        out = run("--load-state", state, "--prompt", more, "--max-tokens", 12, "--greedy")[1]
        tokens = [token for text in ("The sea was calm", more) for token in tiny_tokenizer().encode(text)]
        (row,) = expected(checkpoint, [tokens], SamplingSettings(temperature=0), max_tokens=12)
        assert out == row.text + "\n"


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--temperature", "-1"], 2, "temperature = -1"),
        (["--top-p", "0"], 2, "top_p"),
        (["--top-k", "0"], 2, "top_k"),
        (["--min-p", "nan"], 2, "min_p"),
        (["--seed", "-3"], 2, "seed"),
        (["--max-tokens", "-1"], 2, "max-tokens"),
        (["--batch-size", "0"], 2, "batch-size"),
        (["--threads", "0"], 2, "threads"),
        (["--greedy", "--temperature", "0.5"], 2, "--greedy"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "--prompt-file"),
        (["--prompt", "a", "--out", "b"], 2, "--prompts"),
        (["--prompts", "{good}", "--save-state", "s"], 2, "--save-state"),
        (["--prompts", "{good}", "--out", "{good}"], 2, "exists"),
        (["--save-state", "{dir}"], 2, "exists"),
        (["--prompts", "{good}", "--out", "{dir}/none/out"], 2, "no directory"),
        (["--device", "quantum"], 2, "quantum"),
        (["--stop", ""], 2, "stop"),
        (["--prompt-file", "{dir}/none"], 3, "none"),
        (["--prompt-file", "{latin}"], 3, "byte 3"),
        (["--prompts", "{dir}"], 3, "cannot be read"),
        (["--prompts", "{bad}"], 3, "line 2"),
        (["--prompts", "{fieldless}"], 3, "line 1"),
        (["--prompts", "{empty}"], 3, "no prompt"),
        (["--load-state", "{dir}/none"], 3, "no saved state"),
        (["--load-state", "{dir}"], 3, "manifest.json"),
    ],
)
def test_what_cannot_work_is_one_line_with_its_exit_code(options, code, part, run, tmp_path):
    files = {
        "good": b'{"prompt": "a"}\n',
        "bad": b'{"prompt": "a"}\n{"prompt": \n',
        "fieldless": b'{"text": "a"}\n',
        "latin": b"caf\xe9",
        "empty": b"\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = {name: tmp_path / name for name in files} | {"dir": tmp_path}
    before = sorted(tmp_path.iterdir())
    result, out, err = run(*(option.format(**names) for option in options))
    assert (result, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err
    assert sorted(tmp_path.iterdir()) == before


def test_refusals_come_before_torch_is_imported(checkpoint, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}")
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for words in (
        [checkpoint, "--top-p", "2"],
        [checkpoint, "--prompts", tmp_path / "bad.jsonl"],
        [tmp_path / "none", "--prompt", "a"],
        [tmp_path / "model.pt", "--prompt", "a"],
        [tmp_path / "empty", "--prompt", "a"],
        [checkpoint, "--load-state", tmp_path / "none"],
    ):
        program = (
            "import sys; from switchmamba.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
        )
        command = [sys.executable, "-c", program, "generate", *map(str, words)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stdout in ("2 False\n", "3 False\n"), result.stderr


def test_checkpoints_that_cannot_be_used_are_exit_3(run, checkpoint, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "model.pt", tmp_path / "empty"):
        code, out, err = run("--prompt", "a", path=path)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert path.name in err


def test_the_state_of_another_checkpoint_is_exit_3(run, tmp_path):
    save_model(tmp_path / "other", tiny_model(dtype=torch.float32, seed=1), tiny_tokenizer())
    run("--prompt", "a", "--max-tokens", 1, "--save-state", tmp_path / "state")
    code, out, err = run("--load-state", tmp_path / "state", path=tmp_path / "other")
    assert (code, out) == (3, "")
    assert "another model" in err and err.count("\n") == 1
