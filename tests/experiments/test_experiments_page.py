"""``docs/experiments.md`` lists every key of an experiment file, and its example is one."""

import re
from pathlib import Path

import pytest

from switchmamba.config import Config
from switchmamba.experiments.dry_run import build_runs
from switchmamba.experiments.spec import Arm, Axis, Experiment, Published, Small, read_experiment, shrink

PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
TABLES = [
    re.findall(r"^\| `(\w+)` \| \S.* \|$", table, flags=re.MULTILINE)
    for table in PAGE.split("| key | meaning |\n")[1:]
]


@pytest.mark.parametrize(("number", "table"), list(enumerate([Experiment, Arm, Axis, Published, Small])))
def test_every_key_stands_on_the_page(number: int, table: type[Config]) -> None:
    assert TABLES[number] == list(table.model_fields)


def test_the_example_is_the_nine_runs_that_the_page_says_and_has_a_small_version(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path / "few-experts.toml"
    path.write_text(block, encoding="utf-8")
    experiment = read_experiment(path)
    searched = list(build_runs(experiment))
    assert len(searched) == 6
    assert "This is nine runs" in PAGE
    assert len(searched) + len(experiment.arms) * (len(experiment.seeds) - 1) == 9
    small = [planned.config.training for planned in build_runs(shrink(experiment))]
    # A training loss that is smoothed over more than a tenth of a run lags behind it.
    assert [(training.steps, training.loss_ema_alpha) for training in small] == [(300, 0.05)] * 3
