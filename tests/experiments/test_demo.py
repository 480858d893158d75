"""The demo, shortened: it goes through, is reused when it is there, and refuses what is not its own."""

import sys
from functools import partial
from pathlib import Path

import pytest

from switchmamba.cli import main
from switchmamba.errors import ConfigError
from switchmamba.experiments import demo, library_text
from switchmamba.experiments.demo import DemoEvents, demo_experiment, run_demo
from switchmamba.experiments.dry_run import build_runs
from switchmamba.experiments.library_text import LibraryText
from switchmamba.experiments.results import read_results
from switchmamba.experiments.runner import run_experiment
from switchmamba.experiments.spec import restrict
from tests.experiments import stub_trainer


def test_its_two_models_match_in_active_parameters_and_see_the_same_tokens() -> None:
    mamba, moe = build_runs(demo_experiment())
    assert mamba.run.preset == "mamba-demo"
    assert moe.account.active_parameters == pytest.approx(mamba.account.active_parameters, rel=0.02)
    assert moe.account.parameters > 3 * mamba.account.parameters
    assert moe.config.data == mamba.config.data
    differing = {
        name
        for name, value in moe.config.training.model_dump().items()
        if value != mamba.config.training.model_dump()[name]
    }
    assert differing <= {"learning_rate", "load_balance_coef"}


def test_a_directory_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds thesis.tex, which no demo wrote" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--minutes", "1", "--steps", "2"]) == 2
    assert not (tmp_path / "new").exists()


def test_what_a_killed_demo_left_does_not_make_it_a_directory_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.tmp-0123abcd").mkdir()
    (tmp_path / "data.tmp-0123abcd" / "train-00000.tokens").write_bytes(b"half")
    monkeypatch.setattr(library_text, "write_library_text", write_little_text)
    events = DemoEvents(lambda name, ready: None, lambda statuses: None, lambda text: None)
    with pytest.raises(ConfigError, match=r"training\.steps"):
        run_demo(tmp_path, events, steps=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data"]


def write_little_text(directory: Path) -> LibraryText:
    directory.mkdir()
    paths = [directory / f"{split}.jsonl" for split in ("train", "validation")]
    for path in paths:
        path.write_text(f'{{"text": "def f(): return {path.stem!r}"}}\n')
    return LibraryText(*paths, documents=2, num_bytes=50)


def test_its_runs_are_evaluated_where_they_trained_and_it_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = (sys.executable, str(Path(stub_trainer.__file__)))
    monkeypatch.setattr(demo, "run_experiment", partial(run_experiment, program=stub))
    monkeypatch.setattr(demo.environment, "corpus", lambda data: "text")
    monkeypatch.setattr(demo.environment, "corpus_sha256", lambda data: "0")
    stages: list[bool] = []
    states: set[tuple[str, str]] = set()
    events = DemoEvents(
        lambda name, ready: stages.append(ready),
        lambda statuses: states.update((status.run.arm, status.state) for status in statuses),
        lambda text: None,
    )
    experiment = restrict(demo_experiment(), None, [("training.steps", 3), ("training.learning_rate", 1.0)])
    assert demo._train(experiment, tmp_path / "data", tmp_path, events)
    assert {("mamba", "analysing"), ("moe-mamba", "analysing")} <= states
    assert len(list(tmp_path.rglob("analysis/**/*.json"))) == 2
    (lost, _) = tmp_path.rglob("analysis/**/*.json")
    lost.unlink()  # a demo that was stopped before it came to it
    for _ in range(2):
        assert demo._train(experiment, tmp_path / "data", tmp_path, events)
    assert lost.exists()
    assert stages == [False, False, True]


@pytest.mark.slow
def test_it_goes_through_and_a_second_time_reuses_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "3"]) == 0
    first = capsys.readouterr().out
    assert "class Stack:" in first
    assert "reused" not in first
    results = read_results(out)
    assert [arm.runs[0].metrics.steps for arm in results.arms] == [3, 3]
    assert results.verdicts()[0].sentence in " ".join(first.split())
    page = (out / "report.html").read_text()
    for part in (
        "Claim under test",
        "All held-out documents",
        "over-represented",
        "A sample",
        "switchmamba demo",
    ):
        assert part in page
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert main(["demo", "--out", str(out), "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("reused") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == trained
    assert main(["demo", "--out", str(out), "--steps", "4"]) == 2
    assert "a demo of another length" in capsys.readouterr().err
