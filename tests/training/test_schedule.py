"""The learning rate at the steps where its formula is known by heart."""

from itertools import pairwise
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchmamba.training.config import TrainingConfig
from switchmamba.training.schedule import learning_rate


def config(steps: int, warmup: int, ratio: float = 0.1) -> TrainingConfig:
    return TrainingConfig(steps=steps, warmup_steps=warmup, learning_rate=2.0, min_learning_rate_ratio=ratio)


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    rates = [learning_rate(step, config(100, 4)) for step in range(4)]
    assert rates == [0.5, 1.0, 1.5, 2.0]


def test_the_cosine_is_halfway_down_halfway_through_and_ends_at_its_floor() -> None:
    assert isclose(learning_rate(51, config(100, 4)), 2.0 * (0.1 + 1) / 2)  # 48 of 96 steps after the warm-up
    assert isclose(learning_rate(99, config(100, 4)), 0.2)
    assert learning_rate(99, config(100, 0, ratio=0.0)) == pytest.approx(0.0, abs=1e-15)


def test_a_run_shorter_than_its_warm_up_ends_in_it() -> None:
    assert [learning_rate(step, config(2, 4)) for step in range(2)] == [0.5, 1.0]


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400), ratio=st.floats(0, 1))
def test_the_rate_rises_then_falls_and_never_exceeds_the_peak(steps: int, warmup: int, ratio: float) -> None:
    rates = [learning_rate(step, config(steps, warmup, ratio)) for step in range(steps)]
    assert max(rates) <= 2.0 * (1 + 1e-12)
    assert min(rates) > -1e-12
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[max(0, warmup - 1) :]))
