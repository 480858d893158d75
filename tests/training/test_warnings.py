"""What a run warns of, before its first step and at its end."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchmamba.training import trainer
from switchmamba.training.train_step import StepResult, train_step
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


def test_a_run_that_came_back_is_not_warned_of_though_its_smoothed_loss_remembers(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter([1e6])

    def blow_up_once(*args: Any) -> StepResult:
        result = train_step(*args)
        return replace(result, loss=next(first, result.loss))

    monkeypatch.setattr(trainer, "train_step", blow_up_once)
    config = tiny_config(("training.steps", 4), ("training.loss_ema_alpha", 0.001))
    with caplog.at_level(logging.WARNING, "switchmamba"):
        train(config, data_dir, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_ema"] > 1e5 > lines[-1]["loss"]
    assert "it has blown up" not in caplog.text


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
