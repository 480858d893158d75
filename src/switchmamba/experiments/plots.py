"""Plots of an experiment's curves and experts: one function a plot, each returning a matplotlib figure."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from switchmamba.experiments.curves import Floats, Metrics, centred
from switchmamba.experiments.plot_style import (
    INKS,
    WIDTH,
    aligned,
    colours,
    figure_with_axes,
    label_ends,
    styled,
    thin,
)
from switchmamba.experiments.results import ArmResult, Results, RunResult

LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#3b4cc0", "#8fb1ea", "#f1efea", "#f0a35e", "#b3410b"]
)
"""Blue below the fair share, orange above, nearly white at it."""

MOST_PANELS = 8
"""Routers that a plot shows one by one."""

SHARE_COLOURS = LinearSegmentedColormap.from_list("share", ["#f1efea", "#9ecae1", "#2171b5", "#08306b"])


@styled
def loss_curves(results: Results) -> Figure:
    """Training loss over tokens: each step faintly, smoothed to both sides as a line, seeds as a band; steps on top."""
    figure, axes = figure_with_axes(3.5)
    colour_of, ends = colours(results), []
    shown = [arm for arm in results.arms if arm.runs]
    _focus_on_the_end(axes, [arm.runs[0].metrics for arm in shown])
    ceiling = axes.get_ylim()[1]
    for arm in shown:
        colour = colour_of[arm.name]
        raw = arm.runs[0].metrics
        axes.plot(thin(raw.tokens_S), thin(raw.loss_S), color=colour, alpha=0.22, linewidth=0.6)
        loss_RS = aligned([_centred_loss(result, ceiling) for result in arm.runs])
        tokens_S, loss_S = raw.tokens_S[: loss_RS.shape[1]], loss_RS.mean(0)
        _band(axes, tokens_S, loss_RS, colour)
        axes.plot(thin(tokens_S), thin(loss_S), color=colour)
        ends.append((float(loss_S[-1]), arm.label, colour))
    _tokens_axis(axes)
    _steps_axis(axes, shown)
    axes.set_ylabel("training loss, nats per token")
    label_ends(axes, ends, "{:.2f}")
    return figure


@styled
def validation_curves(results: Results) -> Figure:
    """Held-out loss over tokens, measured during training; seeds as a band."""
    figure, axes = figure_with_axes(3.4)
    colour_of, ends = colours(results), []
    shown = [arm for arm in results.arms if arm.runs and arm.runs[0].metrics.validation_loss_V.size]
    for arm in shown:
        colour = colour_of[arm.name]
        loss_RV = aligned([result.metrics.validation_loss_V for result in arm.runs])
        tokens_V = arm.runs[0].metrics.validation_tokens_V[: loss_RV.shape[1]]
        if len(loss_RV) > 1:
            axes.fill_between(tokens_V, loss_RV.min(0), loss_RV.max(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(tokens_V, loss_RV.mean(0), color=colour, marker="o", markersize=3)
        ends.append((float(loss_RV[:, -1].mean()), arm.label, colour))
    _focus_on_the_end(axes, [arm.runs[0].metrics for arm in shown], validation=True)
    _tokens_axis(axes)
    axes.set_ylabel("held-out loss, nats per token")
    label_ends(axes, ends, "{:.2f}")
    return figure


@styled
def loss_gap(results: Results) -> Figure:
    """Smoothed training loss of each arm minus the baseline's at the same token, framed by its last four fifths."""
    figure, axes = figure_with_axes(2.9)
    colour_of, ends, seen = colours(results), [], []
    base_tokens, base_loss = results.baseline.mean_curve
    axes.axhline(0, color=INKS["base"][0], linewidth=1.4)
    for arm in (a for a in results.arms if a.runs and a.name != results.experiment.baseline):
        colour = colour_of[arm.name]
        gaps = []
        for result in arm.runs:
            base = results.baseline.seed(result.run.seed)
            if base is not None:
                m = result.metrics
                gaps.append(
                    m.loss_ema_S - np.interp(m.tokens_S, base.metrics.tokens_S, base.metrics.loss_ema_S)
                )
        if len(gaps) > 1:
            gap_RS = aligned(gaps)
            tokens_S = thin(arm.runs[0].metrics.tokens_S[: gap_RS.shape[1]])
            axes.fill_between(
                tokens_S, thin(gap_RS.min(0)), thin(gap_RS.max(0)), color=colour, alpha=0.2, linewidth=0
            )
        tokens_S, loss_S = arm.mean_curve
        gap_S = loss_S - np.interp(tokens_S, base_tokens, base_loss)
        axes.plot(thin(tokens_S), thin(gap_S), color=colour)
        ends.append((float(gap_S[-1]), arm.label, colour))
        calm_S = _calm(loss_S) - np.interp(tokens_S, base_tokens, _calm(base_loss))
        seen.append(calm_S[tokens_S > 0.2 * tokens_S[-1]])
    extremes = [0.0, *(float(end) for gap in seen if gap.size for end in (gap.min(), gap.max()))]
    room = max(0.15 * (max(extremes) - min(extremes)), 0.01)
    axes.set_ylim(min(extremes) - room, max(extremes) + room)
    _tokens_axis(axes)
    axes.set_ylabel(f"loss − {results.baseline.label}'s, nats")
    label_ends(axes, [*ends, (0.0, results.baseline.label, INKS["base"][0])], "{:+.3f}")
    return figure


@styled
def speedup_curves(results: Results) -> Figure:
    """Speedup(l): tokens the baseline needs to reach loss l / tokens the arm needs, from early (left) to late."""
    figure, axes = figure_with_axes(2.9)
    colour_of, ends, lowest, highest = colours(results), [], [1.0], [1.0]
    axes.axhline(1, color=INKS["base"][0], linewidth=1.4)
    for arm in (a for a in results.arms if a.runs and a.name != results.experiment.baseline):
        curve = results.speedup(arm)
        axes.plot(curve.level, curve.ratio, color=colour_of[arm.name])
        ends.append((curve.final, arm.label, colour_of[arm.name]))
        settled = curve.ratio[curve.ratio.size // 10 :]
        lowest.append(float(np.nanmin(settled)))
        highest.append(float(np.nanmax(settled)))
    axes.invert_xaxis()
    room = max(0.08, 0.15 * (max(highest) - min(lowest)))
    axes.set_ylim(min(lowest) - room, max(highest) + room)
    axes.set_xlabel("training loss reached, nats per token (falling)")
    axes.set_ylabel(f"speedup over {results.baseline.label}")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}×"))
    label_ends(axes, [*ends, (1.0, results.baseline.label, INKS["base"][0])], "{:.2f}×")
    return figure


@styled
def search(results: Results) -> Figure:
    """Final held-out loss of each point of the search over its first swept field; the choice is ringed."""
    figure, axes = figure_with_axes(2.9)
    colour_of, ends = colours(results), []
    field = ""
    for arm in results.arms:
        points = [
            (r.run.point[0][1], r.selected_loss(results.experiment.selection))
            for r in arm.candidates
            if r.run.point
        ]
        points = sorted(point for point in points if np.isfinite(point[1]))
        if not points:
            continue
        field = arm.candidates[0].run.point[0][0]
        values, losses = zip(*points, strict=True)
        axes.plot(values, losses, color=colour_of[arm.name], marker="o", markersize=4.5)
        if arm.chosen is not None:
            chosen = (arm.chosen.run.point[0][1], arm.chosen.selected_loss(results.experiment.selection))
            axes.plot(
                *chosen, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour_of[arm.name]
            )
        ends.append((float(losses[-1]), arm.label, colour_of[arm.name]))
    axes.set_xscale("log")
    ticks = sorted({float(r.run.point[0][1]) for arm in results.arms for r in arm.candidates if r.run.point})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.08, y=0.15)
    axes.set_xlabel(field.rsplit(".", 1)[-1].replace("_", " "))
    axes.set_ylabel("final held-out loss, nats per token")
    label_ends(axes, ends, "{:.2f}")
    return figure


@styled
def expert_load(arm: ArmResult) -> Figure:
    """Load of every expert over tokens, relative to the fair share 1/E: a panel for each router, :data:`MOST_PANELS` at
    most, evenly chosen.
    """
    metrics = arm.runs[0].metrics
    shown = panel_numbers(len(metrics.load_WE))
    experts = max(metrics.load_WE[router].shape[1] for router in shown)
    height = min(max(0.095 * experts, 0.55), 1.6)
    figure = Figure(figsize=(WIDTH, 0.95 + (height + 0.16) * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    image = None
    for router, axes in zip(shown, panels, strict=True):
        load_WE = metrics.load_WE[router]
        steps, experts = load_WE.shape
        bins = np.array_split(np.arange(steps), min(steps, 160))
        relative_EX = np.stack([load_WE[part].mean(0) for part in bins], axis=-1) * experts
        image = axes.imshow(
            np.log2(np.clip(relative_EX, 0.25, 4)),
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap=LOAD_COLOURS,
            norm=Normalize(-2, 2),
            extent=(0, metrics.tokens, 0.5, experts + 0.5),
        )
        axes.grid(visible=False)
        axes.set_ylabel(f"router {router + 1}", rotation=0, ha="right", va="center")
        axes.yaxis.set_major_locator(FixedLocator([1, experts]))
    _tokens_axis(panels[-1])
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), location="top", aspect=45, pad=0.02, shrink=0.75)
    bar.set_label("load of each expert ÷ fair share")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


@styled
def dropped(results: Results, shown: Sequence[ArmResult]) -> Figure:
    """Share of assignments that an arm's routers drop over tokens, mean over the routers; seeds as a band."""
    figure, axes = figure_with_axes(2.9)
    colour_of, ends = colours(results), []
    for arm in shown:
        noted = arm.noting_drops
        dropped_RW = aligned([metrics.dropped_W for metrics in noted])
        tokens_W = noted[0].load_tokens_W[: dropped_RW.shape[1]]
        _band(axes, tokens_W, dropped_RW, colour_of[arm.name])
        axes.plot(thin(tokens_W), thin(dropped_RW.mean(0)), color=colour_of[arm.name])
        ends.append((float(np.mean([m.final_dropped for m in noted])), arm.label, colour_of[arm.name]))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("assignments dropped")
    _tokens_axis(axes)
    label_ends(axes, ends, "{:.1%}")
    return figure


def panel_numbers(routers: int) -> list[int]:
    """Return which routers get a panel: all, or the first, the last and some between."""
    numbers: list[int] = np.linspace(0, routers - 1, min(routers, MOST_PANELS)).round().astype(int).tolist()
    return numbers


@styled
def class_shares(shares_YEC: Floats, classes: Sequence[str]) -> Figure:
    """Which expert takes which kind of token: by layer, the share of each class of tokens that goes to each expert."""
    numbers = panel_numbers(len(shares_YEC))
    shares_YEC = shares_YEC[numbers]
    layers, experts, kinds = shares_YEC.shape
    columns = min(layers, 2 if experts <= 16 else 1)
    rows = -(-layers // columns)
    panel_height = 0.21 * kinds + 0.3
    figure = Figure(figsize=(WIDTH, 0.85 + rows * panel_height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for layer, axes in enumerate(panels.flat):
        axes.grid(visible=False)
        if layer >= layers:
            axes.set_visible(False)
            continue
        image = axes.imshow(
            shares_YEC[layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap=SHARE_COLOURS,
            norm=Normalize(0, 1),
            extent=(0.5, experts + 0.5, kinds - 0.5, -0.5),
        )
        axes.set_title(f"router {numbers[layer] + 1}", color=INKS["soft"][0], fontsize=9.5)
        axes.yaxis.set_major_locator(FixedLocator(range(kinds)))
        axes.set_yticklabels(classes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.tick_params(length=0)
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    assert image is not None
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), location="top", aspect=45, pad=0.02, shrink=0.75)
    bar.set_label("share of the class that the expert takes")
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _centred_loss(result: RunResult, ceiling: float = np.inf) -> Floats:
    """Smooth a run's training loss to both sides; what is above ``ceiling`` counts as that: no spike spreads."""
    assert result.config is not None
    alpha, steps_S = result.config["training"]["loss_ema_alpha"], result.metrics.step_S
    apart = float(np.median(np.diff(steps_S))) if steps_S.size > 1 else 1.0  # more than 1 in an archive
    return centred(np.minimum(result.metrics.loss_S, ceiling), 1 - (1 - alpha) ** apart)


def _band(axes: Axes, tokens_S: Floats, loss_RS: Floats, colour: str) -> None:
    """Shade from the lowest to the highest seed."""
    if len(loss_RS) > 1:
        axes.fill_between(
            thin(tokens_S),
            thin(loss_RS.min(0)),
            thin(loss_RS.max(0)),
            color=colour,
            alpha=0.25,
            linewidth=0,
        )


def _focus_on_the_end(axes: Axes, shown: Sequence[Metrics], validation: bool = False) -> None:
    """Cut off the first steps' fall, and spikes, which would flatten everything else."""
    curves = [
        (m.validation_tokens_V, m.validation_loss_V) if validation else (m.tokens_S, m.loss_ema_S)
        for m in shown
    ]
    curves = [(tokens, loss) for tokens, loss in curves if tokens.size]
    if not curves:
        return
    lowest = min(float(loss.min()) for _, loss in curves)
    highest = max(float(np.interp(0.1 * tokens[-1], tokens, _calm(loss))) for tokens, loss in curves)
    room = max(0.06 * (highest - lowest), 0.01)
    axes.set_ylim(lowest - 2 * room, highest + room)


def _calm(loss_S: Floats) -> Floats:
    """Return the lowest loss up to each step: a curve without its spikes."""
    return np.minimum.accumulate(loss_S)


def _tokens_axis(axes: Axes) -> None:
    largest = axes.get_xlim()[1]
    unit, name = next(
        (u for u in ((1e9, "billion tokens"), (1e6, "million tokens")) if largest >= u[0]),
        (1e3, "thousand tokens"),
    )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.set_xlabel(name)


def _steps_axis(axes: Axes, shown: Sequence[ArmResult]) -> None:
    """Put steps on top where all arms take the same number of tokens a step."""
    rates = {round(arm.runs[0].metrics.tokens / arm.runs[0].metrics.steps) for arm in shown}
    if len(rates) == 1:
        rate = rates.pop()
        top = axes.secondary_xaxis("top", functions=(partial(_scale, 1 / rate), partial(_scale, rate)))
        top.set_xlabel("steps")
        top.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        top.spines["top"].set_visible(False)
        top.tick_params(length=0)


def _scale(factor: float, values: Floats) -> Floats:
    return np.multiply(values, factor)
