"""A full disk costs the step that did not fit, and nothing else."""

from pathlib import Path

from tests.faults.disk_full import try_cases


def test_every_published_step_survives_a_full_disk(tmp_path: Path) -> None:
    outcomes = try_cases(tmp_path, cases=6, seed=0)
    assert outcomes["ran full at checkpoints"] > 0
