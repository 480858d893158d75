"""Speedup on curves whose speedup is known, and metrics that survive a crash."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.errors import DataError
from switchmamba.experiments.curves import Spike, centred, read_metrics, speedup, tokens_to_reach
from switchmamba.training.metrics import SmoothedLoss

TOKENS = np.arange(1, 2001) * 1024.0


def power_law(rate: float, floor: float = 2.0) -> np.ndarray:
    """Loss of a model that needs 1/rate of the tokens of rate 1."""
    return floor + 30 * (rate * TOKENS) ** -0.4


@given(rate=st.floats(0.5, 4))
def test_speedup_of_a_curve_that_learns_r_times_as_fast_is_r(rate: float) -> None:
    curve = speedup((TOKENS, power_law(1)), (TOKENS, power_law(rate)))
    assert curve.ratio == pytest.approx(rate, rel=2e-3)
    assert np.all(np.diff(curve.level) < 0)


def test_speedup_ends_at_the_lowest_loss_that_both_reach() -> None:
    slow, fast = (TOKENS, power_law(1)), (TOKENS, power_law(2))
    assert speedup(slow, fast).level[-1] == slow[1][-1]
    assert speedup(fast, slow).level[-1] == slow[1][-1]
    assert speedup(slow, fast).final == pytest.approx(2, rel=2e-3)
    assert speedup(fast, slow).final == pytest.approx(0.5, rel=2e-3)


def test_tokens_to_reach_interpolates_between_steps_and_counts_the_first_crossing() -> None:
    tokens, loss = np.array([10.0, 20, 30, 40]), np.array([4.0, 3, 3.5, 1])
    reached = tokens_to_reach(tokens, loss, np.array([5.0, 4, 3.5, 3, 2, 1, 0.5]))
    assert reached[:6] == pytest.approx([10, 10, 15, 20, 35, 40])
    assert np.isnan(reached[6])


def test_smoothing_to_both_sides_does_not_lag_and_ends_at_the_trailing_average() -> None:
    step_S = np.arange(400.0)
    falling_S = 5 - 0.005 * step_S
    assert centred(falling_S, 0.05)[190:210] == pytest.approx(falling_S[190:210], abs=1e-4)
    assert centred(np.full(30, 2.5), 0.03) == pytest.approx(np.full(30, 2.5))
    trailing = SmoothedLoss(0.05)
    for loss in falling_S:
        trailing = trailing.update(float(loss))
    assert centred(falling_S, 0.05)[-1] == pytest.approx(trailing.value)
    assert trailing.value > falling_S[-1] + 0.08, "which lags"


def line(step: int, **more: object) -> str:
    return json.dumps(
        {
            "step": step,
            "tokens": step * 10,
            "loss": 4.0 / step,
            "loss_ema": 5.0 / step,
            "tokens_per_second": 7.0,
            **more,
        }
    )


def test_metrics_come_back_as_they_were_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    routers = [{"fraction": [0.25, 0.75]}, {"fraction": [0.5, 0.5]}]
    path.write_text(
        "".join(
            line(s, routers=routers, **({"validation_loss": 9.0} if s == 2 else {})) + "\n" for s in (1, 2, 3)
        )
    )
    metrics = read_metrics(path)
    assert metrics.steps == 3
    assert metrics.tokens == 30
    assert metrics.loss_S.tolist() == [4.0, 2.0, 4.0 / 3]
    assert metrics.final_loss == 5.0 / 3
    assert (metrics.validation_step_V.tolist(), metrics.final_validation_loss) == ([2], 9.0)
    assert [load.shape for load in metrics.load_WE] == [(3, 2), (3, 2)]
    assert [load[0].tolist() for load in metrics.load_WE] == [[0.25, 0.75], [0.5, 0.5]]


def test_loads_of_routers_may_stand_on_some_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    routers = {s: [{"fraction": [s / 10, 1 - s / 10]}, {"fraction": [0.0, 1.0]}] for s in (2, 4)}
    path.write_text(
        "".join(line(s, **({"routers": routers[s]} if s in routers else {})) + "\n" for s in range(1, 6))
    )
    metrics = read_metrics(path)
    assert metrics.steps == 5
    assert metrics.load_tokens_W.tolist() == [20, 40]
    assert [load.shape for load in metrics.load_WE] == [(2, 2), (2, 2)]
    assert metrics.load_WE[0] == pytest.approx(np.array([[0.2, 0.8], [0.4, 0.6]]))
    assert np.isnan(metrics.final_dropped)  # older archives do not hold it
    assert (metrics.dead_experts, metrics.emptiest_load, metrics.fullest_load) == (1, 0.0, 2.0)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9.0, 4.0] * 7, None),  # too short to tell
        ([4.0] * 50 + [4.9] + [4.0] * 349, None),
        ([4.0] * 50 + [700.0] + [4.0] * 349, Spike(51, 4.0, 700.0)),
        ([4.0] * 18 + [700.0] + [4.0] * 381, None),  # within the first twentieth everything may happen
        ([4.0] * 18 + [700.0] * 4 + [4.0] * 378, Spike(21, 4.0, 700.0)),  # but not last
        ([3.0, 4.0, 5.0] * 66 + [3.0], None),  # batches that differ by more are no rise
        ([3.0, 4.0, 5.0] * 66 + [5.1, 3.0], Spike(199, 4.0, 5.1)),
        ([4.0] * 50 + [700.0] + [4.1] * 349, Spike(51, 4.0, 700.0, came_back=False)),
        ([4.0] * 399 + [700.0], Spike(400, 4.0, 700.0, came_back=False)),
    ],
)
def test_a_loss_that_rises_high_is_a_spike_and_says_whether_it_came_back(
    tmp_path: Path, losses: Sequence[float], expected: Spike | None
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(s, loss=x) + "\n" for s, x in enumerate(losses, start=1)))
    assert read_metrics(path).spike == expected
    assert read_metrics(tmp_path / "missing.jsonl").spike is None


def test_a_step_without_a_loss_is_no_spike_and_weighs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    losses = (2.0, None, 2.0, 2.0)
    path.write_text("".join(line(s, loss=x) + "\n" for s, x in enumerate(losses, 1)))
    assert read_metrics(path).spike is None
    assert centred(read_metrics(path).loss_S, 0.3) == pytest.approx(2.0)


def test_a_smoothed_loss_begins_before_the_first_target_with_what_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(s, loss_ema=x) + "\n" for s, x in enumerate((None, None, 3.0, 2.0), 1)))
    assert read_metrics(path).loss_ema_S.tolist() == [3.0, 3.0, 3.0, 2.0]


def test_peak_memory_is_the_most_of_any_line_and_may_be_unknown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, peak_memory=5) + "\n" + line(2, peak_memory=9) + "\n")
    assert read_metrics(path).peak_memory == 9
    path.write_text(line(1) + "\n")
    assert np.isnan(read_metrics(path).peak_memory)


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "\n" + line(2)[:20])
    assert read_metrics(path).steps == 1


def test_steps_taken_again_after_a_crash_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([line(1), line(2), line(2, loss_ema=8.0)]) + "\n")
    assert read_metrics(path).loss_ema_S.tolist() == [5.0, 8.0]


def test_a_run_that_has_not_begun_has_no_metrics(tmp_path: Path) -> None:
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert (metrics.steps, metrics.tokens, metrics.load_WE) == (0, 0, ())
    assert np.isnan(metrics.final_loss)


def test_damage_inside_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line(1)}\n{{oops\n{line(3)}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
