"""What a run warns of, before its first step and at its end."""

import logging
from pathlib import Path

import pytest

from switchmamba.training.trainer import train
from tests.training.tiny_run import tiny_config


def test_a_warm_up_beyond_the_end_is_warned_of(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "switchmamba"):
        train(tiny_config(("training.steps", 1), ("training.warmup_steps", 500)), data_dir, tmp_path / "run")
    assert "training.warmup_steps = 500 exceeds training.steps = 1" in caplog.text


@pytest.mark.parametrize(("rate", "warned"), [(1e-3, False), (10.0, True)])
def test_a_loss_above_that_of_guessing_is_warned_of_at_the_end(
    rate: float, warned: bool, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(
        ("training.steps", 8), ("training.warmup_steps", 1), ("training.learning_rate", rate)
    )
    with caplog.at_level(logging.WARNING, "switchmamba"):
        train(config, data_dir, tmp_path / "run")
    assert ("it has blown up; lower training.learning_rate" in caplog.text) == warned


@pytest.mark.parametrize("kind", ["expert_choice", "soft"])
def test_a_model_that_looks_ahead_is_warned_of_once_at_the_start(
    kind: str, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(
        ("training.steps", 2),
        ("model.layers.moe.router", {"kind": kind}),
        ("model.layers.moe.capacity_factor", None),
    )
    with caplog.at_level(logging.WARNING, "switchmamba"):
        train(config, data_dir, tmp_path / "run")
    warnings = [r.getMessage() for r in caplog.records if "the model is not causal" in r.getMessage()]
    assert len(warnings) == 1
    assert "layers.1.moe" in warnings[0] and "generate, chat and evaluate will refuse it" in warnings[0]
