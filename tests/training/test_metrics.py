"""The metrics file: smoothing, router statistics, truncation on resume, one writer."""

import json
import logging
from math import log
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.errors import ConfigError
from switchmamba.layers.interface import RouterStats
from switchmamba.training.metrics import MetricsLog, SmoothedLoss, router_metrics
from switchmamba.training.progress import PlainProgress, describe, eta, expert_load
from switchmamba.training.utilisation import measured_peak_flops, mfu


@given(
    losses=st.lists(st.floats(0, 20), min_size=1, max_size=50),
    alpha=st.sampled_from([1e-3, 0.01, 0.5, 1.0]),
)
def test_the_smoothed_loss_is_the_exponentially_weighted_mean(losses: list[float], alpha: float) -> None:
    smoothed = SmoothedLoss(alpha)
    for loss in losses:
        smoothed = smoothed.update(loss)
    weights = [(1 - alpha) ** (len(losses) - 1 - i) for i in range(len(losses))]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert smoothed.value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def stats(tokens_per_expert: list[int], dropped: int = 0) -> RouterStats:
    tokens = torch.tensor(tokens_per_expert)
    total = int(tokens.sum())
    probability = torch.full((len(tokens_per_expert),), total / len(tokens_per_expert))
    entropy = total * log(len(tokens_per_expert))
    return RouterStats(
        tokens_per_expert_E=tokens,
        probability_sum_E=probability,
        squared_logsumexp_sum=torch.tensor(total * 4.0),
        entropy_sum=torch.tensor(entropy),
        dropped=torch.tensor(dropped),
        num_tokens=torch.tensor(total),
        top_k=1,
    )


def test_router_metrics_say_what_each_router_saw() -> None:
    metrics = router_metrics((stats([6, 2, 0, 0], dropped=4), stats([5, 5])))
    assert metrics["load_balance_loss"] == pytest.approx(1.0)
    assert metrics["z_loss"] == pytest.approx(4.0)
    first, second = metrics["routers"]
    assert first["fraction"] == [0.75, 0.25, 0.0, 0.0]
    assert first["entropy"] == pytest.approx(log(4))
    assert (first["dropped"], first["dead"], first["largest_load"]) == (0.5, 2, 3.0)
    assert second["fraction"] == [0.5, 0.5]
    assert (second["dropped"], second["dead"], second["largest_load"]) == (0.0, 0, 1.0)
    json.dumps(metrics)


def test_a_model_without_routers_has_none_to_report() -> None:
    assert router_metrics(()) == {"load_balance_loss": None, "z_loss": None, "routers": []}


def write(path: Path, steps: range) -> None:
    with MetricsLog(path) as log_file:
        for step in steps:
            log_file.write({"step": step, "loss": step / 3})
        log_file.sync()


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 9', "\n", '{"step": 9}', "\0\0\0\0\n"])
def test_resuming_cuts_off_later_steps_and_a_torn_line(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 9))
    with path.open("a") as file:
        file.write(tail)
    with MetricsLog(path) as log_file:
        log_file.truncate(after_step=5)
        log_file.write({"step": 6})
    assert read_steps(path) == [1, 2, 3, 4, 5, 6]


def test_steps_that_are_missing_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    with caplog.at_level(logging.WARNING, "switchmamba"), MetricsLog(path) as log_file:
        log_file.truncate(after_step=5)
    assert "holds no steps from 3 to 5" in caplog.text


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    with (
        MetricsLog(tmp_path / "metrics.jsonl"),
        pytest.raises(ConfigError, match="being trained by another process"),
    ):
        MetricsLog(tmp_path / "metrics.jsonl")
    MetricsLog(tmp_path / "metrics.jsonl").__exit__(None, None, None)


LINE = {
    "step": 25,
    "tokens": 25 * 1000,
    "loss": 3.25,
    "tokens_per_second": 500.0,
    "routers": [
        {"fraction": [0.5, 0.5, 0.0, 0.0]},
        {"fraction": [0.5, 0.0, 0.5, 0.0]},
    ],
}


def test_progress_tells_loss_speed_time_left_and_load() -> None:
    assert expert_load(LINE) == "█▅▅▁ 2.0×"
    assert describe(LINE) == "loss 3.250  500 tok/s  load █▅▅▁ 2.0×"
    assert eta(LINE, steps=100) == "0:02:30"


def test_plain_progress_logs_every_so_often_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    progress = PlainProgress(every=10)
    with caplog.at_level(logging.INFO, "switchmamba"):
        progress.start(5, 27)
        for step in range(6, 28):
            extra = {"validation_loss": 1.5} if step == 13 else {}
            progress.show({**LINE, "step": step, **extra})
    logged = [record.getMessage().split("  ")[0] for record in caplog.records]
    assert logged == ["training from step 5 to 27", *(f"step {n}/27" for n in (10, 13, 20, 27))]


def test_utilisation_is_work_done_over_work_possible() -> None:
    assert mfu(tokens_per_second=1000, training_flops_per_token=6e6, peak=1.2e10) == pytest.approx(0.5)
    assert measured_peak_flops(torch.device("cpu"), torch.float32) > 1e8
