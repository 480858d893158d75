"""An archive says what the experiment says: its points, its tables, and which runs are finished."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from switchmamba.cli import main
from switchmamba.experiments.archive import LINES, LOADS, archive, thinned
from switchmamba.experiments.curves import read_metrics
from switchmamba.experiments.processes import cpu_slots
from switchmamba.experiments.progress import sentence, table
from switchmamba.experiments.report import Report
from switchmamba.experiments.results import Results, due_runs, read_results
from switchmamba.experiments.run_files import run_directory
from switchmamba.experiments.runner import RunStatus, run_experiment
from switchmamba.experiments.spec import Run
from tests.experiments import stub_trainer
from tests.experiments.synthetic import comparison, power_law, write_analyses, write_experiment

STEPS = 600


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    write_experiment(directory, comparison(set={"training.steps": STEPS}), steps=STEPS, noise=0.05)
    write_analyses(directory, STEPS)
    return directory


@pytest.fixture(scope="module")
def archived(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("archive") / "beats-mamba"
    archive(original, out)
    return out


def lines(steps: int) -> list[dict[str, object]]:
    """Steps of 64 tokens with loads of every step and a held-out loss at every 70th."""
    return [
        {
            "step": step,
            "tokens": step * 64,
            "loss": 3 + 1 / 3 / step,
            "loss_ema": 3.0,
            "tokens_per_second": 5.0,
            "grad_norm": 1.0,
            "routers": [{"fraction": [1 / 3, 2 / 3], "dropped": 1 / 6, "largest_load": 4 / 3}],
            **({"validation_loss": 3.2} if step % 70 == 0 else {}),
        }
        for step in range(1, steps + 1)
    ]


def test_every_held_out_loss_and_the_last_step_stay_and_a_plots_worth_of_others() -> None:
    kept = thinned(lines(1999))
    steps = [line["step"] for line in kept]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1999
    assert [line["step"] for line in kept if "validation_loss" in line] == list(range(70, 2000, 70))
    assert LINES * 0.9 <= len(kept) <= LINES + 1999 // 70 + LOADS + 1
    loaded = [line["step"] for line in kept if "routers" in line]
    assert LOADS * 0.9 <= len(loaded) <= LOADS + 1
    assert loaded[-1] == 1999


def test_what_is_thin_stays_as_it_is() -> None:
    once = thinned(lines(1999))
    assert thinned(once) == once


def test_a_kept_line_says_what_it_said_to_six_digits_and_of_routers_the_loads_to_four() -> None:
    kept = thinned(lines(1999))
    last = kept[-1]
    assert last.keys() == {
        "step", "tokens", "loss", "loss_ema", "tokens_per_second", "routers", "noted_at_end",
    }  # fmt: skip
    assert last["tokens"] == 1999 * 64
    assert last["loss"] == pytest.approx(3 + 1 / 3 / 1999, rel=1e-5)
    noted = [line["routers"] for line in kept if "routers" in line]
    assert noted[0] == [{"fraction": [0.3333, 0.6667], "dropped": 0.166667}]
    assert noted[-1] == [{"fraction": [0.333333, 0.666667], "dropped": 0.166667}]


def test_at_the_end_stands_the_mean_of_the_last_twentieth_of_the_loads() -> None:
    logged = lines(200)
    for line in logged[-10:]:
        line["routers"] = [{"fraction": [line["step"] / 1000, 1e-5], "dropped": line["step"] % 2}]
    last = thinned(logged)[-1]
    assert last["routers"] == [{"fraction": [0.1955, 0.00001], "dropped": 0.5}]
    assert last["noted_at_end"] == 10


def test_the_steps_asked_for_stay_and_so_does_a_step_without_a_target(tmp_path: Path) -> None:
    logged = lines(1999)
    logged[0] |= {"loss": None, "loss_ema": None}
    steps = {line["step"] for line in thinned(logged)}
    assert 1001 not in steps
    kept = thinned(logged, [1001])
    assert {line["step"] for line in kept} == steps | {1001}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert np.isnan(read_metrics(path).loss_S).tolist() == [True] + [False] * len(steps)


def test_a_spike_of_one_step_stays(tmp_path: Path) -> None:
    def blown(steps: np.ndarray, run: Run) -> np.ndarray:
        return np.where(steps == 301, 5e4, power_law(steps, run))

    experiment = comparison(sweep={}, seeds=[0], set={"training.steps": STEPS})
    write_experiment(tmp_path / "whole", experiment, blown, steps=STEPS)
    write_analyses(tmp_path / "whole", STEPS)
    archive(tmp_path / "whole", tmp_path / "archive")
    (first, spike), *_ = read_results(tmp_path / "archive").unstable
    assert (spike.step, spike.loss) == (301, 5e4)
    assert first.metrics.step_S.size < STEPS


@pytest.mark.parametrize("begin", [160, 1500])
def test_a_run_and_its_archive_are_unstable_alike(tmp_path: Path, begin: int) -> None:
    whole = lines(3000)
    for line in whole[begin : begin + 16]:
        line["loss"] = 50.0
    whole[begin + 7]["loss"] = 51.0
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    spike = read_metrics(tmp_path / "whole.jsonl").spike
    assert spike is not None and spike.step == begin + 8
    kept = thinned(whole, [spike.step])
    (tmp_path / "thin.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    archived = read_metrics(tmp_path / "thin.jsonl").spike
    assert archived is not None and (archived.step, archived.loss) == (spike.step, spike.loss)
    assert archived.level_before == pytest.approx(spike.level_before, rel=1e-2)


def test_a_short_run_stays_whole() -> None:
    assert [line["step"] for line in thinned(lines(20))] == list(range(1, 21))
    assert thinned([]) == []


def test_it_is_small_and_holds_no_weights(original: Path, archived: Path) -> None:
    assert not list(archived.rglob("checkpoints"))
    for path in archived.rglob("metrics.jsonl"):
        whole = original / path.relative_to(archived)
        assert path.stat().st_size < whole.stat().st_size / 2
        assert (
            read_metrics(path).validation_loss_V.tolist()
            == pytest.approx(read_metrics(whole).validation_loss_V.tolist(), rel=1e-5)
        )  # fmt: skip


def tables(results: Results) -> list[str]:
    return re.findall(r"<table.*?</table>", Report(results).document().html(), re.DOTALL)


def test_a_report_from_it_has_the_same_tables_and_numbers(original: Path, archived: Path) -> None:
    ours, theirs = read_results(archived), read_results(original)
    assert len(tables(ours)) >= 4
    assert tables(ours) == tables(theirs)
    assert [v.sentence for v in ours.verdicts()] == [v.sentence for v in theirs.verdicts()]
    numbers, expected = Report(ours).summary()["arms"], Report(theirs).summary()["arms"]
    for arm in ("mamba", "moe-mamba"):
        for name in ("training_loss", "validation_loss", "speedup"):
            assert numbers[arm][name] == pytest.approx(expected[arm][name], rel=1e-3)


def test_the_commands_archive_and_report_need_no_data(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "archive"
    assert main(["experiment", "archive", str(original), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"archived 10 runs in {out}\n"
    assert "left out" not in said.err
    assert main(["experiment", "report", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["verdicts"][0]["outcome"] == "holds"


def test_its_runs_are_finished_and_none_is_started_again(archived: Path) -> None:
    results = read_results(archived)
    assert results.unfinished == []
    stub = (sys.executable, str(Path(stub_trainer.__file__)))
    shown: list[str] = []

    def observe(statuses: Sequence[RunStatus]) -> None:
        Console(file=StringIO()).print(table(statuses, 80))
        shown.extend(sentence(status) for status in statuses)

    assert run_experiment(
        results.record, archived, cpu_slots(2, 1), observe=observe, analyse=True, program=stub
    )
    assert all(": finished, step" in said for said in shown[:10])
    assert not list(archived.rglob("starts"))


def test_what_has_not_finished_or_was_not_analysed_is_left_out_and_named(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(original, tmp_path / "copy")
    name = "moe-mamba/learning_rate=0.0005/seed=0"
    (copy / "analysis" / f"{name}.json").unlink()
    (copy / "runs/mamba/learning_rate=0.001/seed=2/metrics.jsonl").unlink()
    taken, left_out = archive(copy, tmp_path / "archive")
    assert left_out == [name, "mamba/learning_rate=0.001/seed=2"]
    assert not (tmp_path / "archive/runs" / name).exists()
    experiment = read_results(copy).experiment
    assert sorted(taken + left_out) == sorted(run.name for run in due_runs(experiment, copy))
    assert main(["experiment", "archive", str(copy), "--out", str(tmp_path / "archive")]) == 0
    assert name in capsys.readouterr().err


def test_a_run_that_diverged_has_diverged_in_it(original: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(original, tmp_path / "copy")
    run = comparison().candidates("mamba")[0]
    place = run_directory(copy, run)
    shutil.rmtree(place / "checkpoints")
    (copy / "analysis" / f"{run.name}.json").unlink()
    place.with_name("seed=0.log").write_text("error: the loss is nan at step 9\n")
    _, left_out = archive(copy, tmp_path / "archive")
    assert left_out == []
    assert [c.diverged for c in read_results(tmp_path / "archive").arm("mamba").candidates] == [
        True,
        False,
        False,
    ]
