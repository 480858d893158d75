"""What the search chooses and what the verdict says, on curves that are known."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from switchmamba.checkpoint import write_directory
from switchmamba.errors import CheckpointError, DataError
from switchmamba.experiments.analysis import analyse
from switchmamba.experiments.curves import read_metrics
from switchmamba.experiments.results import Spread, due_runs, read_results, read_run, require_room
from switchmamba.experiments.run_files import (
    adopt,
    analysis_path,
    is_analysed,
    log_path,
    remove_checkpoints,
    run_directory,
)
from switchmamba.experiments.spec import Experiment, Run
from tests.experiments.synthetic import comparison, power_law, write_experiment, write_run


def names(experiment: Experiment, directory: Path) -> list[str]:
    return [run.name for run in due_runs(experiment, directory)]


def test_the_search_comes_first_and_seeds_follow_for_each_arm_by_itself(tmp_path: Path) -> None:
    experiment = comparison()
    search = [run for arm in experiment.arms for run in experiment.candidates(arm)]
    assert names(experiment, tmp_path) == [run.name for run in search]
    for run in experiment.candidates("moe-mamba"):
        write_run(tmp_path, run, power_law, steps=30)
    assert names(experiment, tmp_path)[6:] == [
        "moe-mamba/learning_rate=0.001/seed=1",
        "moe-mamba/learning_rate=0.001/seed=2",
    ]


def test_the_lowest_final_validation_loss_is_chosen(tmp_path: Path) -> None:
    def best_at_the_end(steps: np.ndarray, run: Run) -> np.ndarray:
        rate = dict(run.point)["training.learning_rate"]
        return 4 - rate * 100 * steps / steps[-1] + (0.5 if rate == 2e-3 else 0) * (steps < steps[-1])

    write_experiment(tmp_path, comparison(seeds=[0]), best_at_the_end, steps=40)
    for arm in read_results(tmp_path).arms:
        assert arm.chosen is not None
        assert dict(arm.chosen.run.point) == {"training.learning_rate": 2e-3}


def test_a_half_finished_candidate_holds_the_choice_back(tmp_path: Path) -> None:
    experiment = comparison()
    first, *others = experiment.candidates("mamba")
    write_run(tmp_path, first, power_law, steps=30, taken=29)
    for run in others:
        write_run(tmp_path, run, power_law, steps=30)
    assert not read_run(tmp_path, first).finished
    assert len(due_runs(experiment, tmp_path)) == 6


def test_a_run_without_its_last_checkpoint_is_not_finished(tmp_path: Path) -> None:
    run = comparison().candidates("mamba")[0]
    write_run(tmp_path, run, power_law, steps=30)
    place = tmp_path / "runs" / run.name / "checkpoints"
    (place / "step-30").rename(place / "step-30.tmp-1-abcdef01")
    assert not read_run(tmp_path, run).finished


def test_a_candidate_that_diverged_is_an_outcome_and_never_chosen(tmp_path: Path) -> None:
    experiment = comparison(seeds=[0])
    bad, *others = experiment.candidates("mamba")
    write_run(tmp_path, bad, lambda steps, run: np.full(steps.size, 0.1), steps=30, taken=12)
    log_path(tmp_path, bad).write_text(
        "step 12\nerror: the loss is nan: NaN or infinity comes first out of layers.3\n"
    )
    for run in others:
        write_run(tmp_path, run, power_law, steps=30)
    write_experiment(tmp_path, experiment, steps=30)
    arm = read_results(tmp_path).arm("mamba")
    assert read_run(tmp_path, bad).diverged
    assert arm.chosen is not None
    assert dict(arm.chosen.run.point) == {"training.learning_rate": 1e-3}


def diverge(directory: Path, run: Run) -> None:
    """Make of a finished run one that diverged half way."""
    place = run_directory(directory, run)
    shutil.rmtree(place / "checkpoints")
    lines = (place / "metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "metrics.jsonl").write_text("".join(lines[: len(lines) // 2]))
    log_path(directory, run).write_text(
        "error: the loss is nan: NaN or infinity comes first out of layers.3\n"
    )


def test_further_seeds_that_diverge_are_named_and_count_against_their_arm(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=60)
    for result in read_results(tmp_path).arm("moe-mamba").runs[1:]:
        diverge(tmp_path, result.run)
    results = read_results(tmp_path)
    (verdict,) = results.verdicts()
    assert verdict.below == (True, False, False)
    assert verdict.outcome == "undecided"
    assert "(1 of 3 seeds below; MoE-Mamba diverged in 2 of 3)" in verdict.sentence
    assert [result.run.seed for result in results.diverged] == [1, 2]
    assert results.unfinished == []


def test_seeds_of_the_other_arm_that_diverge_count_for_the_claim(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=60)
    diverge(tmp_path, read_results(tmp_path).arm("mamba").runs[2].run)
    (verdict,) = read_results(tmp_path).verdicts()
    assert verdict.outcome == "holds"
    assert "(3 of 3 seeds below; Mamba diverged in 1 of 3)" in verdict.sentence


@pytest.mark.parametrize(
    ("arm", "outcome", "sentence"),
    [
        ("mamba", "holds", "MoE-Mamba ends below Mamba, which diverged."),
        ("moe-mamba", "fails", "MoE-Mamba diverged, Mamba did not."),
    ],
)
def test_an_arm_whose_whole_search_diverged_has_lost(
    tmp_path: Path, arm: str, outcome: str, sentence: str
) -> None:
    experiment = comparison(seeds=[0])
    write_experiment(tmp_path, experiment, steps=60)
    for run in experiment.candidates(arm):
        diverge(tmp_path, run)
    results = read_results(tmp_path)
    (verdict,) = results.verdicts()
    assert (verdict.outcome, verdict.sentence) == (outcome, sentence)
    assert results.arm(arm).runs == ()
    assert len(results.diverged) == len(experiment.candidates(arm))


def test_a_finished_run_has_not_diverged_whatever_its_analysis_said(tmp_path: Path) -> None:
    experiment = comparison(seeds=[0])
    (one, *_) = experiment.candidates("mamba")
    write_run(tmp_path, one, power_law, steps=30)
    log_path(tmp_path, one).write_text("error: the loss is nan: the weights are damaged\n")
    result = read_run(tmp_path, one)
    assert result.finished
    assert not result.diverged
    assert np.isfinite(result.selected_loss("validation_loss"))


def test_the_peak_memory_is_known_of_a_run_whose_first_lines_do_not_have_it(tmp_path: Path) -> None:
    line = {"tokens": 8, "loss": 1.0, "loss_ema": 1.0, "tokens_per_second": 1.0}
    memory = [{}, {"peak_memory": 7}, {"peak_memory": 5}]
    lines = [json.dumps(line | {"step": i} | more) for i, more in enumerate(memory, start=1)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert read_metrics(path).peak_memory == 7
    path.write_text(lines[0] + "\n")
    assert np.isnan(read_metrics(path).peak_memory)


class Killed(BaseException):
    """Stands for the end of the process."""


def analysed_run(directory: Path, steps: int) -> Run:
    """A finished and analysed run with two checkpoints."""
    (one, *_) = comparison(seeds=[0]).candidates("mamba")
    write_run(directory, one, power_law, steps=steps)
    (run_directory(directory, one) / "checkpoints" / f"step-{steps - 5}").mkdir()
    analysis_path(directory, one).parent.mkdir(parents=True)
    analysis_path(directory, one).write_text(json.dumps({"step": steps}))
    return one


def test_a_kill_while_checkpoints_are_removed_leaves_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = analysed_run(tmp_path, 30)
    place = run_directory(tmp_path, one)

    def die_halfway(path: Path) -> None:
        (path / "step-30").rmdir()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("shutil.rmtree", die_halfway)
        remove_checkpoints(place)
    assert read_run(tmp_path, one).finished
    assert is_analysed(tmp_path, one)
    remove_checkpoints(place)
    assert not list(place.glob("checkpoints*"))
    assert read_run(tmp_path, one).finished


@pytest.mark.parametrize("copied", range(4))
def test_a_kill_while_a_run_is_adopted_leaves_an_unfinished_run(
    copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = analysed_run(tmp_path / "source", 30)
    log_path(tmp_path / "source", one).write_text("done\n")
    write_run(tmp_path / "twin", one, power_law, steps=30, taken=12)
    calls = []

    def die_while_copying(source: Path, target: Path) -> None:
        calls.append(source)
        target.write_bytes(source.read_bytes()[: 3 if len(calls) > copied else None])
        if len(calls) > copied:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("shutil.copyfile", die_while_copying)
        adopt(tmp_path / "source", one, tmp_path / "twin", one)
    result = read_run(tmp_path / "twin", one)
    assert not result.finished
    assert not result.diverged
    adopt(tmp_path / "source", one, tmp_path / "twin", one)
    assert read_run(tmp_path / "twin", one).finished
    assert is_analysed(tmp_path / "twin", one)


def test_a_damaged_last_checkpoint_is_not_analysed_as_the_one_before_it(tmp_path: Path) -> None:
    experiment = comparison(seeds=[0])
    write_experiment(tmp_path, experiment, steps=30)
    (one, *_) = experiment.candidates("mamba")
    checkpoints = run_directory(tmp_path, one) / "checkpoints"
    write_directory(checkpoints / "step-20", {"weights": b""}, {})
    with pytest.raises(CheckpointError, match=r"its last step, 30, is damaged; .* train on from step 20"):
        analyse(tmp_path, one.name)
    assert not analysis_path(tmp_path, one).exists()


def test_the_verdict_holds_when_every_seed_agrees(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=400)
    (verdict,) = read_results(tmp_path).verdicts()
    gap = 20 / np.sqrt(408) - 20 / np.sqrt(608)
    assert verdict.outcome == "holds"
    assert verdict.gaps.values == pytest.approx([gap] * 3)
    assert verdict.speedup == pytest.approx(1.5, rel=5e-3)
    assert f"{gap:.3f} ± 0.000 nats per token below Mamba" in verdict.sentence
    assert "3 of 3 seeds below" in verdict.sentence


def test_the_verdict_says_so_when_the_claim_fails(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(expect=["mamba < moe-mamba"]), steps=400)
    (verdict,) = read_results(tmp_path).verdicts()
    assert verdict.outcome == "fails"
    assert "above MoE-Mamba" in verdict.sentence
    assert verdict.speedup == pytest.approx(1 / 1.5, rel=5e-3)


def test_seeds_that_disagree_leave_it_undecided(tmp_path: Path) -> None:
    def noisy(steps: np.ndarray, run: Run) -> np.ndarray:
        return 3 + 10 / steps + (0.01 if (run.arm == "mamba") == (run.seed == 1) else 0)

    write_experiment(tmp_path, comparison(), noisy, steps=60)
    results = read_results(tmp_path)
    (verdict,) = results.verdicts()
    assert verdict.outcome == "undecided"
    assert "1 of 3 seeds below" in verdict.sentence
    higher_by = results.gaps_to_baseline(results.arm("moe-mamba")).mean
    assert higher_by > 0
    assert f"MoE-Mamba's held-out loss differs from Mamba's by {higher_by:.3f} ± " in verdict.sentence


def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(seeds=[0]), steps=60)
    (verdict,) = read_results(tmp_path).verdicts()
    assert "one seed, so its spread is unknown" in verdict.sentence


def test_without_runs_the_verdict_is_open(tmp_path: Path) -> None:
    write_experiment(tmp_path, comparison(), steps=60)
    for path in (tmp_path / "runs" / "mamba").rglob("metrics.jsonl"):
        path.unlink()
    results = read_results(tmp_path)
    assert results.verdicts()[0].outcome == "open"
    assert len(results.unfinished) == 3


def test_spread_is_the_sample_standard_deviation() -> None:
    assert Spread((1.0, 2.0, 3.0)).text() == "2.000 ± 1.000"
    assert Spread((1.5,)).text(2) == "1.50"
    assert Spread(()).text() == "–"


def test_a_directory_without_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"experiment\.json"):
        read_results(tmp_path)


@pytest.mark.parametrize("content", ['{"experiment": ', '{"threads": "two"}'])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(DataError, match=r"experiment\.json: .*restore it from a copy"):
        read_results(tmp_path)


def test_a_directory_in_use_needs_resume_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    require_room(tmp_path / "new", resume=False)
    write_experiment(tmp_path / "old", comparison(seeds=[0]), steps=30)
    require_room(tmp_path / "old", resume=True)
    with pytest.raises(ValueError, match="--resume"):
        require_room(tmp_path / "old", resume=False)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no experiment"):
        require_room(tmp_path / "foreign", resume=True)
