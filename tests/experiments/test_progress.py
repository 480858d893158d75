"""The live table of an experiment is readable on any terminal: numbers and states are whole."""

from io import StringIO

import pytest
from rich.console import Console

from switchmamba.experiments.progress import table
from switchmamba.experiments.runner import RunStatus, State
from tests.experiments.synthetic import comparison


def status(arm: int, point: int, state: State, step: int, load: bool = False) -> RunStatus:
    experiment = comparison()
    run = experiment.candidates(list(experiment.arms)[arm])[point]
    line = {
        "step": step,
        "tokens": step * 1000,
        "loss": 7.0,
        "loss_ema": 7.0625,
        "tokens_per_second": 12345.0,
    }
    router = {"fraction": [0.25] * 4, "largest_load": 1.0}
    line["routers"] = [router] if load else []
    return RunStatus(run, run.name, state, 3052, line if step else None, 7.125 if step else None)


STATUSES = [
    status(0, 0, "finished", 3052),
    status(0, 1, "diverged", 1200),
    status(0, 2, "waiting", 0),
    status(1, 0, "running", 1300, load=True),
    status(1, 1, "analysing", 3052, load=True),
]
NUMBERS = ("3,052/3,052", "1,200/3,052", "0/3,052", "7.062", "7.125", "12,345", "0:02:21")
STATES = ("finished", "diverged", "waiting", "analysing")


def drawn(width: int, statuses: list[RunStatus]) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(table(statuses, width))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_numbers_and_states_are_whole_at_any_width(width: int) -> None:
    lines = drawn(width, STATUSES)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert all(part in text for part in (*NUMBERS, *STATES))
    assert "…" not in text


def test_the_bar_goes_before_the_load_and_both_before_a_name_is_folded() -> None:
    def holds(width: int, part: str) -> bool:
        return any(part in line for line in drawn(width, STATUSES))

    assert [(holds(width, "━"), holds(width, "expert load")) for width in (80, 105, 120)] == [
        (False, False),
        (False, True),
        (True, True),
    ]
    assert holds(105, "moe-mamba/learning_rate=0.0005/seed=0 ")
    folded = "".join(line[:31].strip() for line in drawn(80, STATUSES))
    assert "moe-mamba/learning_rate=0.0005/seed=0" in folded


def test_columns_stay_where_they_are_while_runs_go_on() -> None:
    heads = {
        drawn(95, [status(0, 0, state, step)])[0].rstrip()
        for state, step in (("waiting", 0), ("running", 7), ("analysing", 3052), ("finished", 3052))
    }
    assert len(heads) == 1
