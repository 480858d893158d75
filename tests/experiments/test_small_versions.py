"""The small version of every experiment file, a few steps of each run, from the command to the report."""

import html
import json
from pathlib import Path

import pytest

from switchmamba.cli import main
from switchmamba.data.prepare import prepare
from switchmamba.data.synthetic import TASKS, prepare_synthetic
from switchmamba.experiments import processes
from switchmamba.experiments.library_text import library_documents
from switchmamba.experiments.results import read_results
from switchmamba.experiments.spec import read_experiment
from tests.experiments import forked

ROOT = Path(__file__).parents[2] / "experiments"
COPYING = {path.stem: path for path in (ROOT / "copying").glob("*.toml")}
ON_TEXT = sorted(set(ROOT.rglob("*.toml")) - set(COPYING.values()))
STEPS = 4
SHORT = {
    "training.steps": STEPS,
    "training.warmup_steps": 1,
    "training.validate_every": STEPS // 2,
    "training.validation_batches": 1,
}
OPTIONS = {
    "induction-heads": {"length": 32},
    "selective-copying": {"length": 16, "data_tokens": 4, "vocabulary": 8},
}
"""As the files' headers prepare them."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of modules: whole documents would be read whole by every model, which takes attention long."""
    directory = tmp_path_factory.mktemp("text")
    beginnings = (json.dumps({"text": text[:2000]}) for _, text in library_documents(500_000))
    (directory / "text.jsonl").write_text("\n".join(beginnings))
    prepare([directory / "text.jsonl"], "bpe:512", directory / "data", validation_fraction=0.1)
    return directory / "data"


def run_small(files: list[Path], data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run them as a user would, and check that each has come out whole."""
    monkeypatch.setattr(processes, "subprocess", forked)
    changes = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    words = ["experiment", "run", *map(str, files), "--small", "--data", str(data), "--out", str(out)]
    assert main([*words, "--parallel", "2", "--threads", "1", *changes]) == 0
    for file in files:
        place = out if len(files) == 1 else out / f"{file.stem}-small"
        assert_whole(read_experiment(file).arms.keys(), place)


def assert_whole(arms: set[str], place: Path) -> None:
    results = read_results(place)
    assert results.unfinished == []
    assert {arm.name for arm in results.arms if arm.runs} == arms
    for arm in results.arms:
        for run in arm.runs:
            assert run.metrics.validation_step_V.tolist() == [STEPS // 2, STEPS]
    assert all(verdict.outcome != "open" for verdict in results.verdicts())
    summary = json.loads((place / "summary.json").read_text())
    assert summary["arms"].keys() == arms
    assert len(summary["verdicts"]) == len(results.experiment.expected_orders())
    for numbers in summary["arms"].values():
        assert len(numbers["evaluation"]) == len(numbers["runs"]) == len(results.experiment.seeds)
    page = html.unescape((place / "report.html").read_text())
    for arm in results.arms:
        assert arm.label in page
    for verdict in results.verdicts():
        assert verdict.sentence in page


@pytest.mark.slow
def test_every_experiment_on_text_has_a_small_version_that_comes_out_whole(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_small(ON_TEXT, text, tmp_path / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(COPYING))
def test_every_experiment_on_copying_has_a_small_version_that_comes_out_whole(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    task_options = TASKS[task].model_validate(OPTIONS[task])
    prepare_synthetic(task_options, data, train_examples=500, validation_examples=50)
    run_small([COPYING[task]], data, tmp_path / "out", monkeypatch)
