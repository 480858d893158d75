"""Plots that set an experiment's arms against each other: over its axis, in accuracy, in speed and memory."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from switchmamba.experiments.plot_style import INKS, WIDTH, colours, figure_with_axes, label_ends, styled
from switchmamba.experiments.results import ArmResult, Results


@styled
def over_axis(results: Results) -> Figure:
    """Final held-out loss minus the baseline's over the experiment's axis, a line or a colour of bars for each series.

    The published differences, of another scale, are hollow; arms without a place on the axis are lines across it.
    """
    axis = results.experiment.axis
    assert axis is not None
    figure, axes = figure_with_axes(3.4)
    axes.axhline(0, color=INKS["base"][0], linewidth=1.4)
    if axis.scale == "words":
        _bars(axes, results)
    else:
        _lines(axes, results)
    axes.set_xlabel(axis.label)
    axes.set_ylabel(f"final loss − {results.baseline.label}'s, nats")
    return figure


def on_axis(results: Results) -> dict[str, list[ArmResult]]:
    """Return the finished arms that have a place on the axis, by series, in the axis's order."""
    arms = results.experiment.arms
    placed = [arm for arm in results.arms if arm.runs and arms[arm.name].x is not None]
    if results.experiment.axis is not None and results.experiment.axis.scale != "words":
        placed.sort(key=lambda arm: arms[arm.name].x)  # type: ignore[arg-type, return-value]
    series = dict.fromkeys(arms[arm.name].series or "" for arm in placed)
    return {name: [arm for arm in placed if (arms[arm.name].series or "") == name] for name in series}


def _off_axis(axes: Axes, results: Results) -> list[tuple[float, str, str]]:
    """Draw a line across for each finished arm without a place on the axis; return where they end."""
    arms, colour_of, ends = results.experiment.arms, colours(results), []
    for arm in results.arms:
        if arm.runs and arms[arm.name].x is None and arm.name != results.experiment.baseline:
            gap = results.gaps_to_baseline(arm).mean
            axes.axhline(gap, color=colour_of[arm.name], linewidth=1.4)
            ends.append((gap, arm.label, colour_of[arm.name]))
    return [*ends, (0.0, results.baseline.label, INKS["base"][0])]


def published_gap(results: Results, arm: str) -> float | None:
    """Return an arm's published loss minus the baseline's; None unless both are published."""
    published = results.experiment.published
    baseline = results.experiment.baseline
    if published is None or arm not in published.loss or baseline not in published.loss:
        return None
    return published.loss[arm] - published.loss[baseline]


def _lines(axes: Axes, results: Results) -> None:
    place, colour_of, ends = _places(results), colours(results), []
    for name, arms in on_axis(results).items():
        colour = colour_of[arms[-1].name]
        gaps = [results.gaps_to_baseline(arm).values for arm in arms]
        x = [place[arm.name] for arm in arms]
        axes.fill_between(
            x, [min(g) for g in gaps], [max(g) for g in gaps], color=colour, alpha=0.2, linewidth=0
        )
        means = [float(np.mean(g)) for g in gaps]
        axes.plot(x, means, color=colour, marker="o", markersize=4.5)
        ends.append((means[-1], name or arms[-1].label, colour))
        known = [(place[a.name], gap) for a in arms if (gap := published_gap(results, a.name)) is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True), "--D", color=colour, linewidth=1.2, markersize=4.5, mfc="white"
            )
            ends.append((known[-1][1], f"{name or arms[-1].label}, published".strip(", "), colour))
    _axis_ticks(axes, results)
    label_ends(axes, [*ends, *_off_axis(axes, results)], "{:+.3f}")


def _bars(axes: Axes, results: Results) -> None:
    series, colour_of = on_axis(results), colours(results)
    words = list(
        dict.fromkeys(str(results.experiment.arms[a.name].x) for arms in series.values() for a in arms)
    )
    width = 0.8 / max(1, len(series))
    for number, (name, arms) in enumerate(series.items()):
        colour = colour_of[arms[-1].name]
        x = [
            words.index(str(results.experiment.arms[a.name].x)) + (number - (len(series) - 1) / 2) * width
            for a in arms
        ]
        gaps = [results.gaps_to_baseline(arm) for arm in arms]
        axes.bar(x, [gap.mean for gap in gaps], width * 0.9, color=colour, label=name)
        for place, arm in zip(x, arms, strict=True):
            known = published_gap(results, arm.name)
            if known is not None:
                axes.plot(
                    [place],
                    [known],
                    "D",
                    markersize=5,
                    markerfacecolor="white",
                    markeredgecolor=INKS["ink"][0],
                )
    axes.xaxis.set_major_locator(FixedLocator(range(len(words))))
    long = sum(map(len, words)) > 40
    axes.set_xticklabels(words, rotation=30 if long else 0, ha="right" if long else "center")
    axes.grid(visible=False, axis="x")
    label_ends(axes, _off_axis(axes, results), "{:+.3f}")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="best")


def _places(results: Results) -> dict[str, float]:
    numbers = {name: arm.x for name, arm in results.experiment.arms.items()}
    return {name: float(x) for name, x in numbers.items() if isinstance(x, (int, float))}


@styled
def speed_over_axis(results: Results, speed: Callable[[ArmResult], float]) -> Figure:
    """Tokens per second and, below, the peak memory over the experiment's axis, a line for each series."""
    axis = results.experiment.axis
    assert axis is not None
    place, colour_of = _places(results), colours(results)
    known = any(np.isfinite(arm.peak_memory) for arms in on_axis(results).values() for arm in arms)
    figure = Figure(figsize=(WIDTH, 4.6 if known else 2.9), layout="constrained")
    panels = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    measures = [(panels[0], speed, "training tokens per second")]
    if known:
        measures.append((panels[1], lambda arm: arm.peak_memory / 2**30, "peak memory, GiB"))
    for axes, measure, label in measures:
        ends = []
        for name, arms in on_axis(results).items():
            colour, values = colour_of[arms[-1].name], [measure(arm) for arm in arms]
            axes.plot([place[arm.name] for arm in arms], values, color=colour, marker="o", markersize=4.5)
            ends.append((values[-1], name or arms[-1].label, colour))
        axes.set_ylim(0, 1.08 * max([*axes.get_ylim(), *(value for value, _, _ in ends)]))
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(FuncFormatter(_compact))
        label_ends(axes, ends, "{:,.0f}" if axes is panels[0] else "{:.3g}")
    _axis_ticks(panels[-1], results)
    panels[-1].set_xlabel(axis.label)
    return figure


def _axis_ticks(axes: Axes, results: Results) -> None:
    assert results.experiment.axis is not None
    if results.experiment.axis.scale == "log":
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(_places(results).values()))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@styled
def accuracy_against_perplexity(
    points: Mapping[str, Sequence[tuple[float, float]]], results: Results, accuracy: str
) -> Figure:
    """A point for each run, (perplexity, accuracy), coloured by arm: whether a lower perplexity comes with accuracy."""
    figure, axes = figure_with_axes(3.2)
    colour_of = colours(results)
    ends = []
    for name, own in points.items():
        if not own:
            continue
        perplexity, share = zip(*own, strict=True)
        axes.plot(perplexity, share, "o", color=colour_of[name], markersize=6, alpha=0.85)
        ends.append((float(np.mean(share)), results.arm(name).label, colour_of[name]))
    axes.margins(0.1)
    axes.set_xlabel("perplexity of held-out text")
    axes.set_ylabel(accuracy)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1%}"))
    label_ends(axes, ends, "{:.1%}")
    return figure


@styled
def speed_and_memory(speeds: Sequence[tuple[str, float, float, str]]) -> Figure:
    """Bars of (label, tokens per second, peak bytes or NaN, colour): speed left, memory right."""
    known = any(np.isfinite(memory) for _, _, memory, _ in speeds)
    figure = Figure(figsize=(WIDTH, 0.8 + 0.2 * len(speeds)), layout="constrained")
    panels = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
    rows = range(len(speeds))
    inks = [colour for *_, colour in speeds]
    panels[0].barh(rows, [speed for _, speed, _, _ in speeds], color=inks, height=0.75)
    panels[0].set_xlabel("training tokens per second")
    panels[0].xaxis.set_major_formatter(FuncFormatter(_compact))
    if known:
        panels[1].barh(rows, [memory / 2**30 for _, _, memory, _ in speeds], color=inks, height=0.75)
        panels[1].set_xlabel("peak memory, GiB")
    panels[0].set_yticks(rows, [label for label, *_ in speeds], fontsize=8)
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    return figure


def _compact(value: float, _place: object) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"
