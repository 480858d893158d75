"""``switchmamba experiment`` with real runs: from a file to a report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from switchmamba.cli import main
from switchmamba.experiments.curves import read_lines
from switchmamba.experiments.results import read_results
from tests.experiments.synthetic import comparison, write_experiment
from tests.training.tiny_run import prepare_tiny_data

TINY = """
name = "tiny"
claim = "MoE-Mamba's loss lies below Mamba's."
expect = ["moe < mamba"]
baseline = "mamba"
[arms.mamba]
preset = "mamba-tiny"
[arms.moe]
preset = "moe-mamba-tiny"
[set]
training.steps = 4
training.warmup_steps = 1
training.validate_every = 2
training.checkpoint_every = 2
training.device = "cpu"
data.context_length = 16
[sweep]
"training.learning_rate" = [3e-3]
"""


def write(directory: Path, text: str = TINY) -> str:
    path = directory / "tiny.toml"
    path.write_text(text)
    return str(path)


def recorder(told: list[tuple[int, int | None]]) -> Any:
    """Return a progress bar that writes down what it is told."""
    return lambda noun: nullcontext(lambda done, total: told.append((done, total)))


def test_a_file_becomes_runs_answers_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = str(prepare_tiny_data(tmp_path)), tmp_path / "out"
    assert (
        main(["experiment", "run", write(tmp_path), "--data", data, "--out", str(out), "--parallel", "2"])
        == 0
    )
    results = read_results(out)
    for arm in results.arms:
        (run,) = arm.runs
        assert run.metrics.steps == 4
        assert run.metrics.validation_step_V.tolist() == [2, 4]
    summary = json.loads((out / "summary.json").read_text())
    for numbers in summary["arms"].values():
        (evaluation,) = numbers["evaluation"]
        assert evaluation["loss"] == pytest.approx(math.log(evaluation["perplexity"]))
        # hardly trained: close to the uniform distribution over 280 tokens
        assert numbers["validation_loss"][0] == pytest.approx(math.log(280), rel=0.1)
    analysis = json.loads((out / "analysis/moe/learning_rate=0.003/seed=0.json").read_text())
    assert [
        sum(expert["share"] for expert in layer["experts"]) for layer in analysis["specialisation"]
    ] == pytest.approx([1.0] * len(analysis["specialisation"]))
    assert results.verdicts()[0].sentence in capsys.readouterr().out

    again = out / "analysis/moe/learning_rate=0.003/seed=0.json"
    again.unlink()
    told: list[tuple[int, int | None]] = []
    monkeypatch.setattr("switchmamba.cli.experiment.progress_bar", recorder(told))
    assert main(["experiment", "analyse", str(out), "--run", "moe/learning_rate=0.003/seed=0"]) == 0
    assert "evaluating moe/learning_rate=0.003/seed=0" in capsys.readouterr().err
    assert json.loads(again.read_text())["evaluation"]["loss"] == pytest.approx(
        analysis["evaluation"]["loss"]
    )
    # How far it is with each of the three questions.
    ends = [end for end, after in pairwise([*told, (0, None)]) if after[0] < end[0]]
    assert ends[0][0] == analysis["evaluation"]["tokens"]
    assert [done for done, _ in ends] == [total for _, total in ends]
    assert len(ends) == 3

    markdown = tmp_path / "docs" / "tiny.md"
    assert main(["experiment", "report", str(out), "--markdown", str(markdown)]) == 0
    assert "mamba-tiny" in markdown.read_text()
    assert (
        f"experiment run {tmp_path / 'tiny.toml'} --data {data} --out {out} --parallel 2\n"
        in markdown.read_text()
    )
    assert main(["experiment", "run", write(tmp_path), "--data", data, "--out", str(out)]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_a_dry_run_counts_every_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = write(
        tmp_path, TINY.replace('"moe-mamba-tiny"', '"moe-mamba-25m"').replace("[3e-3]", "[1e-3, 3e-3]")
    )
    assert main(["experiment", "run", path, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.count("542,228,480") == 2
    assert output.count("mamba/learning_rate") == 2
    assert main(["experiment", "run", path, "--dry-run", "--arms", "moe"]) == 0
    assert capsys.readouterr().out.count("learning_rate") == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.toml"]


def test_an_arm_that_only_diverges_is_named_in_a_report_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(prepare_tiny_data(tmp_path))
    growing = "set.training = { learning_rate = 10, weight_decay = 10 }\nsweep = {}"  # weights by 99 a step
    wild = TINY.replace("[arms.moe]", f"[arms.moe]\n{growing}").replace("steps = 4", "steps = 40")
    out = tmp_path / "out"
    assert main(["experiment", "run", write(tmp_path, wild), "--data", data, "--out", str(out)]) == 1
    assert "arm moe: every run of its search diverged" in capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert "moe diverged, mamba did not." in page
    assert "<code>moe/seed=0</code> at step" in page
    assert json.loads((out / "summary.json").read_text())["diverged"] == ["moe/seed=0"]


def test_a_dry_run_into_a_pipe_keeps_long_names_whole(tmp_path: Path) -> None:
    name = "an-arm-of-a-name-that-leaves-no-room-for-numbers-in-the-eighty-columns-of-a-terminal"
    path = write(tmp_path, TINY.replace("[arms.moe]", f"[arms.{name}]").replace("moe <", f"{name} <"))
    command = [sys.executable, "-m", "switchmamba", "experiment", "run", path, "--dry-run"]
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"\n{name}/learning_rate=0.003/seed=0 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "missing.toml", "--dry-run"], 2, "missing.toml: no such configuration file"),
        (["run", "FILE", "--out", "out"], 2, "--data is missing"),
        (["run", "FILE", "--data", "nowhere", "--out", "out"], 3, "nowhere"),
        (["run", "FILE", "--dry-run", "--seeds", "0,x"], 2, "--seeds '0,x' must be whole numbers"),
        (
            ["run", "FILE", "--dry-run", "--arms", "moe,manba"],
            2,
            "tiny.toml: no arm 'manba'; did you mean mamba?",
        ),
        (["run", "FILE", "--dry-run", "--set", "training.steps"], 2, "must look like training.steps=100"),
        (["run", "FILE", "--dry-run", "--set", "training.stepz=1"], 2, "did you mean steps?"),
        (["run", "FILE", "--dry-run", "--set", "training.learning_rate=1"], 2, "is swept"),
        (["report", "nowhere"], 3, "experiment.json"),
        (["report", "nowhere", "--markdown", "x.html"], 2, "must name a .md file"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    assert main(["experiment", *(file if argument == "FILE" else argument for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_torchs_threads_sleep_while_a_run_is_evaluated_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for command in ("analyse", "report"):
        for before, after in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
            monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
            if before is None:
                monkeypatch.delenv("OMP_WAIT_POLICY")
            assert main(["experiment", command, "nowhere"]) == 3
            assert os.environ["OMP_WAIT_POLICY"] == after


def test_a_preset_that_is_not_there_is_answered_with_file_and_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, TINY.replace('"mamba-tiny"', '"mamba-tny"'))
    assert main(["experiment", "run", file, "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}: arm mamba: no preset 'mamba-tny'; did you mean mamba-tiny?\n"
    )


def test_a_file_without_any_of_the_arms_asked_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = write(tmp_path), tmp_path / "other.toml"
    other.write_text(
        TINY.replace('"tiny"', '"other"').replace("arms.moe", "arms.rest").replace("moe <", "rest <")
    )
    assert main(["experiment", "run", file, str(other), "--dry-run", "--arms", "moe"]) == 2
    assert f"names no arm of {other} (mamba, rest); leave this file out" in capsys.readouterr().err
    assert main(["experiment", "run", file, str(other), "--dry-run", "--arms", "moe,rest"]) == 0


def test_an_archive_takes_the_place_of_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other, foreign = (tmp_path / name for name in ("mine", "other", "foreign"))
    write_experiment(mine, comparison(), steps=30)
    write_experiment(other, comparison(name="another"), steps=30)
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, message in (
        (mine, "is the experiment itself"),
        (other, "holds experiment another, not beats-mamba"),
        (foreign, "holds no experiment"),
        (foreign / "notes.txt", "is not a directory"),
    ):
        assert main(["experiment", "archive", str(mine), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_an_experiment_that_is_killed_ends_as_if_it_never_was(tmp_path: Path) -> None:
    data = str(prepare_tiny_data(tmp_path))
    text = TINY.replace("training.steps = 4", "training.steps = 120")
    command = [
        sys.executable,
        "-m",
        "switchmamba",
        "experiment",
        "run",
        write(tmp_path, text),
        "--data",
        data,
        "--parallel",
        "2",
    ]
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    subprocess.run([*command, "--out", str(reference)], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, "--out", str(killed)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics = killed / "runs/moe/learning_rate=0.003/seed=0/metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert 0 < metrics.read_bytes().count(b"\n") < 120
    assert list((metrics.parent / "checkpoints").iterdir())
    subprocess.run([*command, "--out", str(killed), "--resume"], check=True, capture_output=True)
    for arm in ("mamba", "moe"):
        place = f"runs/{arm}/learning_rate=0.003/seed=0/metrics.jsonl"
        one, other = read_lines(reference / place), read_lines(killed / place)
        assert [(r["step"], r["loss"], r["loss_ema"]) for r in one] == [
            (r["step"], r["loss"], r["loss_ema"]) for r in other
        ]
