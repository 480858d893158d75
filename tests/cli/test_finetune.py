"""``switchmamba finetune`` and ``chat``, from conversations to answers, and what is refused."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic

import pytest

from switchmamba.checkpoint import newest_valid, read_json
from switchmamba.cli import main
from switchmamba.data.chat import CHAT_TEMPLATE
from tests.training.tiny_run import assert_same_run, read_lines

SAYS = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack"}
ASKS = ("What does the {} say?", "How does the {} go?", "Name the sound of a {}.")
THREAD = ("--threads", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has read a little, and conversations prepared for it beside it."""
    directory = tmp_path_factory.mktemp("finetune")
    text = " ".join(ask.format(animal) for animal in SAYS for ask in ASKS) + " moo woof meow quack "
    (directory / "text.txt").write_text(text * 20)
    talks = [
        {"prompt": ask.format(animal), "completion": sound} for animal, sound in SAYS.items() for ask in ASKS
    ]
    (directory / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks * 2))
    assert (
        run(
            "data",
            "prepare",
            "--input",
            directory / "text.txt",
            "--tokenizer",
            "bpe:320",
            "--out",
            directory / "data",
        )
        == 0
    )
    small = ("--steps", 10, "--data.context_length", 32, *THREAD)
    assert run("train", "mamba-tiny", "--data", directory / "data", "--out", directory / "base", *small) == 0
    source = ("--input", directory / "talks.jsonl", "--tokenizer", directory / "base")
    assert run("data", "prepare", "--chat", *source, "--out", directory / "talks") == 0
    return directory / "base"


def run(*words: object) -> int:
    return main(["-q", *map(str, words)])


def finetune(base: Path, out: Path, *more: object) -> int:
    return run("finetune", base, "--data", base.parent / "talks", "--out", out, *THREAD, *more)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Pipe lines into ``chat``; return exit code, stdout and stderr."""

    def ask(checkpoint: Path, *lines: str, more: tuple[object, ...] = ()) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = run("chat", checkpoint, "--greedy", *THREAD, *more)
        return code, *capsys.readouterr()

    return ask


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """The model after the conversations."""
    out = base.parent / "tuned"
    settings = ("--steps", 200, "--training.learning_rate", 1e-2, "--data.context_length", 64)
    assert finetune(base, out, *settings) == 0
    return out


def test_the_loss_on_the_assistants_tokens_falls_and_the_answers_become_right(base, tuned, asked, capsys):
    talks = base.parent / "talks"
    scores = {}
    for name, checkpoint in (("before", base), ("after", tuned)):
        assert run("evaluate", checkpoint, "--data", talks, "--split", "train", "--json", *THREAD) == 0
        scores[name] = json.loads(capsys.readouterr().out)
    assert scores["before"]["answer_accuracy"] == 0
    assert scores["after"]["answer_accuracy"] == 1
    assert scores["after"]["loss"] < 0.2 < 2 < scores["before"]["loss"]
    lines = [ask.format(animal) for animal in SAYS for ask in ASKS]
    code, answers, _ = asked(tuned, *(part for line in lines for part in (line, "/reset")))
    assert code == 0
    assert answers.splitlines() == [sound for sound in SAYS.values() for _ in ASKS]


def test_an_adapter_learns_the_same_and_the_run_continues_from_its_own_files(base, tmp_path, capsys):
    pytest.importorskip("peft")
    elsewhere, run_dir, whole = tmp_path / "base", tmp_path / "adapted", tmp_path / "whole"
    shutil.copytree(base, elsewhere)
    shutil.copytree(base.parent / "talks", tmp_path / "talks")
    lora = ("--lora", 4, "--lora-targets", "mamba, embedding, head", "--training.learning_rate", 2e-2)
    cut = ("--data.context_length", 64, "--training.validate_every", 0)
    assert finetune(elsewhere, whole, *lora, *cut, "--epochs", 50) == 0
    config = read_json(newest_valid(whole) / "config.json")
    steps = config["training"]["steps"]
    assert config["training"]["lora"] == {"rank": 4, "alpha": None, "targets": ["mamba", "embedding", "head"]}
    assert read_lines(whole)[-1]["loss"] < 0.6 < 2 < read_lines(whole)[0]["loss"]
    assert (
        finetune(elsewhere, run_dir, *lora, *cut, "--epochs", 50, "--training.checkpoint_every", steps // 2)
        == 0
    )
    shutil.rmtree(newest_valid(run_dir))
    shutil.rmtree(elsewhere)
    words = ("finetune", elsewhere, "--data", base.parent / "talks", "--out", run_dir, "--resume")
    assert main([*map(str, words), *THREAD]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("--resume: ")] == [
        "--resume: as the run was begun, but for what is typed: an adapter of rank 4 on mamba, embedding, head, "
        f"{steps} steps, learning rate 0.02, from {elsewhere}"
    ]
    assert_same_run(run_dir, whole, skipped={"config.json"})


def test_the_defaults_are_those_of_fine_tuning(base, tmp_path):
    assert finetune(base, tmp_path / "run", "--epochs", 1) == 0
    config = read_json(tmp_path / "run" / "config.json")
    training = config["training"]
    assert config["data"] == {"context_length": 32, "reset_state": True}
    assert training["learning_rate"] == pytest.approx(3e-4)
    assert (training["weight_decay"], training["freeze"], training["lora"]) == (0.0, [], None)
    assert training["initial_checkpoint"] == str(base)
    assert training["warmup_steps"] == 1
    assert training["steps"] == len(read_lines(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flag", "moved"), [([], False), (["--freeze-router"], False), (["--train-router"], True)]
)
def test_routers_stay_unless_they_are_to_be_trained(flag, moved, base, tmp_path):
    import torch

    from switchmamba import load

    sparse = base.parent / "sparse"
    if not sparse.exists():
        small = ("--steps", 1, "--data.context_length", 32, *THREAD)
        assert run("train", "moe-mamba-tiny", "--data", base.parent / "data", "--out", sparse, *small) == 0
    assert finetune(sparse, tmp_path / "run", "--steps", 2, *flag) == 0
    before, after = (dict(load(path).model.named_parameters()) for path in (sparse, tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("mamba" in name for name in changed)
    assert any("router" in name for name in changed) == moved
    coefficient = read_json(tmp_path / "run" / "config.json")["training"]["load_balance_coef"]
    assert (coefficient > 0) == moved


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--steps", "2", "--epochs", "1"], 2, "--steps and --epochs exclude each other"),
        (["--epochs", "0"], 2, "--epochs 0"),
        (["--lora-alpha", "4"], 2, "--lora-alpha has no meaning without --lora RANK"),
        (["--lora", "2", "--train-router"], 2, "an adapter holds no router"),
        (["--freeze-router"], 2, "the model has no router"),
        (["--training.stepps", "3"], 2, "did you mean steps"),
        (["--lora", "2", "--lora-targets", "mambo", "--steps", "1"], 2, "did you mean mamba"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_a_run_exists(
    words, code, complaint, base, tmp_path, capsys
):
    if "--lora" in words:
        pytest.importorskip("peft")
    assert finetune(base, tmp_path / "run", *words) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_conversations_that_the_context_cuts_are_counted(base, tmp_path, capsys):
    cut = ("--data.context_length", 26, "--training.validate_every", 0)
    assert finetune(base, tmp_path / "run", "--steps", 1, *cut) == 0
    error = capsys.readouterr().err
    assert "warning: windows of data.context_length = 26 cut" in error
    assert "raise data.context_length, the longest has" in error


def test_a_checkpoint_without_a_template_and_a_foreign_one_are_refused(base, tuned, asked, tmp_path):
    code, answer, error = asked(base, "Hello")
    assert (code, answer) == (3, "")
    assert "has no chat_template.jinja" in error
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert asked(tuned, "Hello", more=("--chat-template", tmp_path / "mine.jinja"))[0] == 2
    assert (newest_valid(tuned) / CHAT_TEMPLATE).is_file()


def test_a_chat_in_eight_bits_answers_too(tuned, asked):
    code, answer, _ = asked(tuned, "Hello", more=("--quantization", "int8", "--max-tokens", "5"))
    assert code == 0 and answer


def test_commands_in_a_piped_chat(tuned, asked, tmp_path):
    saved = tmp_path / "saved"
    ask = "What does the cow say?"
    lines = (ask, f"/save {saved}", "/system Be brief.", f"/load {saved}", "", "/help", "/exit", "no")
    code, answers, error = asked(tuned, *lines)
    assert (code, answers) == (0, "moo\n")
    assert "/system TEXT" in error
    assert [asked(tuned, line)[0] for line in ("/unknown", "/save", f"/load {tmp_path}/nothing")] == [2, 2, 3]


def test_ctrl_c_ends_the_answer_and_not_the_program_but_sigterm_does(base, tmp_path):
    """An untrained model goes on and on; in a terminal of its own."""
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}QQQZZ{% endfor %}")
    command = [sys.executable, "-m", "switchmamba", "chat", str(base), "--max-tokens", "1000000", *THREAD]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*command, "--chat-template", str(template), "--top-k", "1"],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    try:
        wait_for(leader, b"> ")
        os.write(leader, b"hello\n")
        wait_for(leader, b"hello", size=60)
        process.send_signal(signal.SIGINT)
        wait_for(leader, b"\n> ")
        # A signal between the prompt and the wait for a key is seen at the next one only: so more than once.
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            if wait_for(leader, b"Ctrl-D leaves", seconds=1):
                break
        for _ in range(6):
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.returncode == 143
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def wait_for(terminal: int, text: bytes, size: int = 0, seconds: float = 60) -> bool:
    """Read until ``text`` has appeared, and so many bytes behind it; False if it has not after so long."""
    seen, end = b"", monotonic() + seconds
    while text not in seen or len(seen) < seen.find(text) + len(text) + size:
        readable, _, _ = select.select([terminal], [], [], max(0.0, end - monotonic()))
        if not readable:
            assert seconds < 60, seen
            return False
        seen += os.read(terminal, 1024)
    return True
