"""``switchmamba train`` as a user meets it: exit codes, one-line errors, signals, a full disk."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from switchmamba.checkpoint import newest_valid
from switchmamba.cli import main
from switchmamba.data.prepare import prepare
from switchmamba.evaluation.specialisation import specialisation
from switchmamba.models.loading import load
from switchmamba.training.progress import PlainProgress
from switchmamba.training.stop import stop_on_signals
from tests.training.tiny_run import prepare_tiny_data, read_lines

PRESET = "moe-mamba-tiny"
SMALL = ("--data.context_length=16", "--training.batch_size", "2", "--threads", "1")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of shards."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Undo --threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", PRESET, "--data", str(data), "--out", str(out), *SMALL, *more]


def start(arguments: list[str], before: str = "") -> "subprocess.Popen[str]":
    """Start the command in a process of its own; ``before`` is Python that runs first."""
    code = f"{before}\nimport sys; from switchmamba.cli import main; sys.exit(main({arguments!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(run: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    deadline = monotonic() + 120
    while (
        not (run / "metrics.jsonl").is_file()
        or len((run / "metrics.jsonl").read_bytes().split(b"\n")) <= steps
    ):
        assert process.poll() is None, process.communicate()
        assert monotonic() < deadline
        sleep(0.02)


def test_a_run_finishes_resumes_to_nothing_and_is_not_overwritten(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = command(data_dir, run, "--steps", "4", "--checkpoint-every", "2")
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{run}: finished at step 4 of 4\n"
    assert [line["step"] for line in read_lines(run)] == [1, 2, 3, 4]
    assert newest_valid(run).name == "step-4"
    assert main([*arguments, "--resume"]) == 0
    assert len(read_lines(run)) == 4
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"error: --out {run} exists; --resume continues it, or choose another\n"
    assert main([*arguments, "--resume", "--training.learning_rate", "1"]) == 2
    assert "training.learning_rate (was 0.003, is 1.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "message", "change"),
    [
        (2, "did you mean moe-mamba-tiny?", {1: "moe-mamba-tny"}),
        (2, "did you mean learning_rate?", {"--training.learning_rat": "1"}),
        (2, "training.steps = -5: input should be greater than or equal to 1", {"--training.steps": "-5"}),
        (2, "training.learning_rate = 'fast'", {"--training.learning_rate": "fast"}),
        (2, "--training.seed needs a value", {"--training.seed": None}),
        (2, "no such configuration file", {1: "missing.toml"}),
        (2, "unexpected argument", {"extra": None}),
        (2, "exceeds batch_size = 2", {"--training.micro_batch_size": "8"}),
        (3, "missing: no such directory; prepare it with", {3: "missing"}),
        (3, "one sample needs", {"--data.context_length": "1000000"}),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_the_run_exists(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    message: str,
    change: dict[int | str, str | None],
) -> None:
    arguments = command(data_dir, tmp_path / "run")
    for where, value in change.items():
        if isinstance(where, int):
            arguments[where] = str(value)
        else:
            arguments += [where] if value is None else [where, value]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_data_without_a_validation_split_needs_validation_switched_off(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([data_dir.parent / "texts"], "bpe:280", tmp_path / "data", validation_fraction=0)
    arguments = command(tmp_path / "data", tmp_path / "run", "--steps", "1")
    assert main(arguments) == 3
    assert "holds no validation split; prepare the data with one, or set" in capsys.readouterr().err
    assert main([*arguments, "--training.validate_every", "0"]) == 0


def test_a_vocabulary_larger_than_the_datas_is_honoured_and_a_smaller_one_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = command(data_dir, tmp_path / "small", "--steps", "1", "--model.vocab_size", "100")
    assert main(small) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: model.vocab_size = 100 is smaller than the 280 entries of the data's tokenizer;"
    )
    assert not (tmp_path / "small").exists()
    run = tmp_path / "large"
    large = command(data_dir, run, "--steps", "2", "--model.vocab_size", "320")
    assert main(large) == 0
    assert "model.vocab_size = 320 exceeds the 280 entries of the data's tokenizer" in capsys.readouterr().err
    model, tokenizer = load(run)
    assert (model.config.vocab_size, tokenizer.vocab_size) == (320, 280)
    assert main([*large, "--resume"]) == 0
    assert main(["evaluate", str(run), "--data", str(data_dir), "--max-tokens", "50"]) == 0
    assert main(["generate", str(run), "--max-tokens", "3"]) == 0
    tokens = torch.randint(280, (2, 12))
    assert len(specialisation(model, tokenizer, [(tokens, None)], minimum=1)) == 2


def test_a_run_that_is_longer_than_asked_says_so(
    data_dir: Path, run_with_two_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(command(data_dir, run_with_two_steps, "--steps", "1", "--resume")) == 0
    assert (
        capsys.readouterr().out
        == f"{run_with_two_steps}: at step 2 already; training.steps = 1 asks no more\n"
    )


def test_an_empty_directory_will_do_and_an_empty_name_will_not(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    assert main(command(data_dir, tmp_path / "run", "--steps", "1")) == 0
    capsys.readouterr()
    assert main(["train", PRESET, "--data", str(data_dir), "--out="]) == 2
    assert "'--out': is empty; name a directory" in capsys.readouterr().err


def test_the_help_has_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["train", "--help"]):
        assert main(words) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "2 what was typed or configured; 3 data or a checkpoint that cannot be used" in text
    assert "train saves and exits with 0" in text


def test_a_model_that_is_no_table_is_refused(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text("model = 3")
    arguments = command(data_dir, tmp_path / "run")
    assert main([arguments[0], str(tmp_path / "mine.toml"), *arguments[2:]]) == 2
    assert "model = 3: " in capsys.readouterr().err


def test_a_wrong_path_is_answered_in_under_five_seconds(tmp_path: Path) -> None:
    begin = monotonic()
    process = start(command(tmp_path / "missing", tmp_path / "run"))
    _, error = process.communicate()
    assert process.returncode == 3
    assert error.count("\n") == 1
    assert monotonic() - begin < 5


def test_sigterm_finishes_the_step_saves_and_exits_with_0(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(data_dir, run, "--steps", "100000"))
    wait_for_steps(run, 3, process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    steps = [line["step"] for line in read_lines(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert newest_valid(run).name == f"step-{len(steps)}", "nothing is lost"
    assert out == f"{run}: stopped at step {len(steps)} of 100000\n"
    assert "--resume continues" in error


def test_the_first_interrupt_finishes_the_step_and_saves(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_after_step_3(_self: object, line: Mapping[str, Any]) -> None:
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PlainProgress, "show", interrupt_after_step_3)
    assert main(command(data_dir, tmp_path / "run")) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [1, 2, 3]
    assert newest_valid(tmp_path / "run").name == "step-3"


def test_a_signal_before_training_begins_saves_too(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The signal comes while torch is being imported.
    before = """
import builtins, os, signal
original = builtins.__import__
def importing(name, *rest, **named):
    if name == "torch":
        builtins.__import__ = original
        os.kill(os.getpid(), signal.SIGTERM)
    return original(name, *rest, **named)
builtins.__import__ = importing
"""
    process = start(command(data_dir, run), before)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert newest_valid(run).name == "step-0"
    assert main(command(data_dir, run, "--steps", "2", "--resume")) == 0
    assert [line["step"] for line in read_lines(run)] == [1, 2]


def test_a_second_interrupt_gives_up_at_once() -> None:
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let no file grow beyond 30 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run_with_two_steps(data_dir: Path, tmp_path: Path) -> Path:
    """A run that has a checkpoint."""
    assert main(command(data_dir, tmp_path / "run", "--steps", "2")) == 0
    return tmp_path / "run"


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_is_one_clear_error_and_the_old_step_stays(
    data_dir: Path,
    run_with_two_steps: Path,
    asynchronous: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_with_two_steps
    more = ("--steps", "4", "--resume", "--training.asynchronous_checkpoints", asynchronous)
    request.getfixturevalue("small_disk")
    assert main(command(data_dir, run, *more)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {run}/checkpoints/step-4: cannot be written")
    assert "earlier checkpoints are intact" in last
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert newest_valid(run).name == "step-2"
