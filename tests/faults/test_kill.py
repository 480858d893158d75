"""Trainers that are killed go on as if nothing had happened."""

from pathlib import Path

import pytest

from tests.faults.kill import Executioner


def test_a_run_killed_three_times_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    tally = Executioner(tmp_path, seed=3).kill(3)
    assert tally.kills == 3
    assert sum(tally.kills_per_run) == 3


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_runs_killed_twenty_times_equal_an_uninterrupted_one(tmp_path: Path, asynchronous: bool) -> None:
    executioner = Executioner(tmp_path, 0, ("training.asynchronous_checkpoints", asynchronous))
    tally = executioner.kill(20)
    assert sum(tally.kills_per_run) == 20
    assert tally.while_saving > 0, "no kill fell into a save: the moments are badly chosen"


@pytest.mark.slow
def test_sigterm_at_any_moment_saves_the_step_and_exits_with_0(tmp_path: Path) -> None:
    tally = Executioner(tmp_path, seed=1).stop(20)
    assert sum(tally.kills_per_run) == 20
