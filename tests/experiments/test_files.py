"""Every experiment file of the project can be built."""

from pathlib import Path

import pytest

from switchmamba.experiments.dry_run import build_runs
from switchmamba.experiments.spec import read_experiment, shrink

ROOT = Path(__file__).parents[2] / "experiments"
FILES = sorted(ROOT.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_builds_on_the_meta_device_and_compares_what_it_should(path: Path) -> None:
    experiment = read_experiment(path)
    assert experiment.name == path.stem
    assert experiment.expected_orders() or (
        experiment.axis is not None and experiment.axis.measure == "speed"
    )
    runs = list(build_runs(experiment))
    assert {run.run.arm for run in runs} == set(experiment.arms)
    assert len({run.run.name for run in runs}) == len(runs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_its_small_version_has_the_same_arms_and_fits_a_laptop(path: Path) -> None:
    experiment = read_experiment(path)
    small = shrink(experiment)
    runs = list(build_runs(small))
    assert {run.run.arm for run in runs} == set(experiment.arms)
    assert small.expected_orders() == experiment.expected_orders()
    for run in runs:
        training, tokens = (
            run.config.training,
            run.config.training.batch_size * run.config.data.context_length,
        )
        assert run.account.parameters < 10_000_000
        assert training.steps * tokens <= 700_000
        assert training.validate_every <= training.steps


def test_the_longer_comparison_is_fair() -> None:
    runs = list(build_runs(read_experiment(ROOT / "moe-mamba/beats-mamba-small.toml")))
    baseline = runs[0]
    for run in runs:
        assert run.account.active_parameters == pytest.approx(baseline.account.active_parameters, rel=0.02)
        assert run.config.data == baseline.config.data
        assert run.config.training.steps == baseline.config.training.steps
        assert run.config.training.batch_size == baseline.config.training.batch_size
    rates = [
        [r.config.training.learning_rate for r in runs if r.run.arm == arm] for arm in ("mamba", "moe-mamba")
    ]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 3
