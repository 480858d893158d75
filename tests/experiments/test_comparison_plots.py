"""Plots over an axis draw the results' numbers, named where they end or in a legend."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from switchmamba.experiments import plot_style
from switchmamba.experiments.comparison_plots import (
    accuracy_against_perplexity,
    on_axis,
    over_axis,
    speed_and_memory,
    speed_over_axis,
)
from switchmamba.experiments.plot_style import INKS, MOST_NAMES, colours
from switchmamba.experiments.report import Report
from switchmamba.experiments.results import Results, read_results
from switchmamba.experiments.spec import Run
from tests.experiments.synthetic import comparison, write_analyses, write_experiment

GAPS = {"mamba": 0.0, "s1": 0.3, "s4": -0.1, "s2": 0.2, "p1": 0.4, "p2": 0.25, "p4": 0.05}
"""Final loss minus Mamba's; deliberately not in the axis's order."""


def falling(gaps: dict[str, float]) -> Any:
    def loss(steps: np.ndarray, run: Run) -> np.ndarray:
        return 3 + gaps[run.arm] + 2 / np.sqrt(steps + 8) + 0.01 * run.seed * gaps[run.arm]

    return loss


def arms(x: dict[str, object], series: dict[str, str]) -> dict[str, dict[str, object]]:
    placed = {
        name: {"preset": "moe-mamba-tiny", "label": name.upper(), "series": series[name], "x": place}
        for name, place in x.items()
    }
    return {"mamba": {"preset": "mamba-tiny", "label": "Mamba"}, **placed}


def results_of(directory: Path, arms: dict[str, Any], gaps: dict[str, float], **changes: Any) -> Results:
    changes = {"expect": [], "sweep": {}, "seeds": [0, 1]} | changes
    write_experiment(directory, comparison(arms=arms, **changes), falling(gaps), steps=100)
    return read_results(directory)


SERIES = {name: "sequential" if name.startswith("s") else "parallel" for name in GAPS}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Results:
    x = {name: int(name[1:]) for name in GAPS if name != "mamba"}
    published = {"source": "a paper", "scale": "25M", "loss": {"mamba": 3.72, "s1": 3.76, "s4": 3.70}}
    return results_of(
        tmp_path_factory.mktemp("numbers"),
        arms(x, SERIES),
        GAPS,
        axis={"label": "experts"},
        published=published,
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Results:
    x = {"s1": "conv", "s4": "out", "s2": "gate", "p1": "conv", "p2": "gate", "p4": "out"}
    return results_of(
        tmp_path_factory.mktemp("words"),
        arms(x, SERIES),
        GAPS,
        axis={"label": "projection", "scale": "words"},
        published={"source": "a paper", "scale": "25M", "loss": {"mamba": 3.72, "p2": 3.89}},
    )


def curves(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """Lines that have more than a point and are not the baseline's."""
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_ydata()[0] != 0]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def names(axes: Axes) -> list[str]:
    """The names at curves' ends, without their numbers."""
    return [re.split(r"\n|  ", text.get_text())[0] for text in axes.texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for drawn in figure.legends for text in drawn.get_texts()]


def test_arms_stand_in_the_order_of_the_axis_in_their_series(numbers: Results) -> None:
    assert {name: [arm.name for arm in own] for name, own in on_axis(numbers).items()} == {
        "sequential": ["s1", "s2", "s4"],
        "parallel": ["p1", "p2", "p4"],
    }


def test_lines_go_through_the_gaps_to_the_baseline(numbers: Results) -> None:
    (axes,) = over_axis(numbers).axes
    drawn = curves(axes)
    expected = [[GAPS[name] * 1.005 for name in own] for own in (("s1", "s2", "s4"), ("p1", "p2", "p4"))]
    ours = [drawn[0], drawn[2]]  # the published ones stand between
    for (x, y), gaps in zip(ours, expected, strict=True):
        assert x == [1, 2, 4]
        assert y == pytest.approx(gaps)
    assert drawn[1] == ([1, 4], pytest.approx([0.04, -0.02]))
    assert axes.get_xscale() == "log"
    assert [tick for tick in axes.get_xticks() if tick] == [1, 2, 4]
    assert set(names(axes)) == {"Mamba", "sequential", "parallel", "sequential, published"}
    plot_style.svg(axes.get_figure())  # type: ignore[arg-type]


def test_the_band_of_a_line_spans_its_seeds(numbers: Results) -> None:
    (axes,) = over_axis(numbers).axes
    (low, high) = axes.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (pytest.approx(-0.1 * 1.01), pytest.approx(0.3 * 1.01))


def test_bars_have_the_height_of_the_gaps_and_stand_over_their_words(words: Results) -> None:
    figure = over_axis(words)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([GAPS[name] * 1.005 for name in ("s1", "s4", "s2", "p1", "p2", "p4")])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["conv", "out", "gate"]
    middle = [round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches]
    assert middle == [0, 1, 2, 0, 2, 1]
    drawn = axes.get_legend()
    assert drawn is not None
    assert [text.get_text() for text in drawn.get_texts()] == ["sequential", "parallel"]
    (diamond,) = [line for line in axes.lines if line.get_marker() == "D"]
    assert diamond.get_ydata() == pytest.approx([0.17])
    assert round(float(diamond.get_xdata()[0])) == 2
    plot_style.svg(figure)


def test_published_differences_have_a_column_only_where_one_is_published(
    numbers: Results, tmp_path: Path
) -> None:
    assert "Published difference" in Report(numbers).document().html()
    bare = results_of(tmp_path, arms({"s1": 1, "s2": 2}, SERIES), GAPS, axis={"label": "experts"}, seeds=[0])
    page = Report(bare).document().html()
    assert "Over experts" in page
    assert "Published difference" not in page


@pytest.mark.parametrize("count", [2, MOST_NAMES + 1])
def test_names_at_the_ends_have_the_minus_sign_of_the_tables(count: int) -> None:
    figure, axes = plot_style.figure_with_axes(3.4)
    plot_style.label_ends(axes, [(-0.484, f"curve-{i}", INKS["blue"][0]) for i in range(count)], "{:+.3f}")
    written = [text.get_text() for text in axes.texts] + legend(figure)
    assert [text.split()[-1] for text in written] == ["−0.484"] * count
    assert all("curve-" in text for text in written)


def test_an_arm_without_a_place_is_a_named_line_across(tmp_path: Path) -> None:
    everything = arms({"s1": "conv", "s2": "gate"}, SERIES)
    everything["p1"] = {"preset": "moe-mamba-tiny", "label": "beside"}
    results = results_of(
        tmp_path, everything, GAPS, axis={"label": "projection", "scale": "words"}, seeds=[0]
    )
    (axes,) = over_axis(results).axes
    assert names(axes) == ["Mamba", "beside"]
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([0, GAPS["p1"]])


def test_a_series_is_one_hue_from_light_to_full_and_the_baseline_grey(numbers: Results) -> None:
    colour = colours(numbers)
    assert colour["mamba"] == INKS["base"][0]
    assert len(set(colour.values())) == len(GAPS)
    full = {colour["s2"], colour["p4"]}  # the last that the file names
    assert full == {INKS["blue"][0], INKS["vermillion"][0]}


def test_few_curves_carry_their_names_and_eighteen_stand_in_a_legend(tmp_path: Path) -> None:
    gaps = {f"e{i}": 0.01 * (i - 4) for i in range(1, 18)}
    everything = results_of(
        tmp_path,
        arms({name: int(name[1:]) for name in gaps}, {name: name for name in gaps}),
        {"mamba": 0.0, **gaps},
        axis={"label": "experts"},
        seeds=[0],
    )
    assert len(everything.arms) == 18
    figure = over_axis(everything)
    assert names(figure.axes[0]) == []
    entries = legend(figure)
    assert len(entries) == 18
    assert entries[0].startswith("e17")
    assert entries[-1].startswith("e1 ")
    assert "Mamba  +0.000" in entries
    assert figure.get_size_inches()[1] > 3.4 + 0.19 * 9
    plot_style.png(figure)
    write_analyses(tmp_path, 100)
    page = Report(read_results(tmp_path)).document().html()  # a warning of any plot would be an error
    assert page.count("<svg") >= 6


@pytest.mark.parametrize(("name", "apart"), [("curve", 0.07), ("a long name", 0.1)])
@pytest.mark.parametrize("count", [MOST_NAMES, MOST_NAMES + 1])
def test_names_at_the_ends_do_not_touch_and_too_many_become_a_legend(
    count: int, name: str, apart: float
) -> None:
    figure, axes = plot_style.figure_with_axes(3.4)
    axes.plot([0, 1], [0, 1])
    height = figure.get_size_inches()[1]
    plot_style.label_ends(axes, [(0.5, f"{name} {i}", INKS["blue"][0]) for i in range(count)], "{:.2f}")
    if count > MOST_NAMES:
        assert len(legend(figure)) == count
        assert figure.get_size_inches()[1] > height
    else:
        places = sorted(text.xy[1] for text in axes.texts)  # type: ignore[attr-defined]
        assert len(places) == count
        assert min(np.diff(places)) > apart
    plot_style.svg(figure)


@pytest.mark.parametrize(
    "name", ["a longer name", "a name of a length that two of would not fit side by side"]
)
def test_names_that_do_not_fit_into_the_frame_stand_below_it_and_whole(name: str) -> None:
    figure, axes = plot_style.figure_with_axes(1.6)
    axes.plot([0, 1], [0, 1])
    plot_style.label_ends(axes, [(0.5, f"{name} {i}", INKS["blue"][0]) for i in range(6)], "{:.2f}")
    assert not axes.texts
    assert len(legend(figure)) == 6
    plot_style.svg(figure)  # lays it out
    (box,) = [below.get_window_extent() for below in figure.legends]
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_names_of_ends_that_lie_together_stay_beside_the_frame(end: float) -> None:
    _, axes = plot_style.figure_with_axes(3.4)
    axes.plot([0, 1], [0, 1])
    plot_style.label_ends(axes, [(end, f"curve {i}", INKS["blue"][0]) for i in range(5)], "{:.2f}")
    places = sorted(text.xy[1] for text in axes.texts)  # type: ignore[attr-defined]
    low, high = axes.get_ylim()
    assert low + 0.03 < places[0] < places[-1] < high - 0.03
    assert min(np.diff(places)) > 0.07


def with_memory(results: Results, gibibytes: Sequence[float]) -> Results:
    """The same results, each arm having held so much."""
    for arm, memory in zip(results.arms, gibibytes, strict=True):
        for run in arm.runs:
            path = run.directory / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text(
                "".join(json.dumps({**line, "peak_memory": memory * 2**30}) + "\n" for line in lines)
            )
    return read_results(results.directory)


def test_speed_and_memory_over_the_axis_are_what_was_noted(tmp_path: Path) -> None:
    x = {"s1": 256, "s2": 1024, "s4": 4096}
    results = results_of(
        tmp_path,
        arms(x, SERIES),
        GAPS,
        axis={"label": "context", "measure": "speed"},
        seeds=[0],
    )
    speeds = {"s1": 9e6, "s2": 8e6, "s4": 1000.0}
    assert len(speed_over_axis(results, lambda arm: speeds[arm.name]).axes) == 1
    known = with_memory(results, [1, 2, 4, 8])
    figure = speed_over_axis(known, lambda arm: speeds[arm.name])
    speed, memory = figure.axes
    assert curves(speed) == [([256, 1024, 4096], [9e6, 8e6, 1000.0])]
    assert curves(memory) == [([256, 1024, 4096], [2, 4, 8])]
    assert speed.get_ylim()[0] == memory.get_ylim()[0] == 0
    plot_style.svg(figure)


def test_bars_of_speed_stand_in_the_order_of_the_arms_with_memory_where_it_is_known() -> None:
    grey, blue = INKS["base"][0], INKS["blue"][0]
    bare = speed_and_memory([("Mamba", 5e3, float("nan"), grey), ("MoE", 2e6, float("nan"), blue)])
    assert len(bare.axes) == 1
    figure = speed_and_memory([("Mamba", 5e3, 2.0**30, grey), ("MoE", 2e6, 3 * 2.0**30, blue)])
    speed, memory = figure.axes
    assert [bar.get_width() for bar in speed.patches] == [5e3, 2e6]
    assert [bar.get_width() for bar in memory.patches] == [1, 3]
    assert [to_hex(bar.get_facecolor()) for bar in speed.patches] == [grey, blue]
    assert [label.get_text() for label in speed.get_yticklabels()] == ["Mamba", "MoE"]
    assert speed.get_ylim()[0] > speed.get_ylim()[1], "the first on top"
    plot_style.svg(figure)


def test_accuracy_over_perplexity_has_a_point_for_each_run(numbers: Results) -> None:
    points = {"mamba": [(20.0, 0.4), (21.0, 0.39)], "s1": [(18.0, 0.38)], "s2": []}
    (axes,) = accuracy_against_perplexity(points, numbers, "accuracy").axes
    assert [list(zip(*line.get_data(), strict=True)) for line in axes.lines] == [
        [(20.0, 0.4), (21.0, 0.39)],
        [(18.0, 0.38)],
    ]
    assert names(axes) == ["S1", "Mamba"]
