"""How plots look: colours, sizes, names at the ends of curves, and the files they become.

Colours are Okabe and Ito's, which colour-blind readers tell apart; the baseline is grey. Curves carry their
names where they end instead of a legend, up to a number that fits. In SVG every colour of :data:`INKS` becomes a CSS
variable, so that a page can go dark.
"""

import colorsys
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from switchmamba.experiments.curves import Floats
from switchmamba.experiments.results import Results

INKS: Mapping[str, tuple[str, str, str]] = {
    "ink": ("#1f2328", "#1f2328", "#e6e4df"),
    "soft": ("#68707a", "#68707a", "#a3a8ae"),
    "rule": ("#e3e1dc", "#e3e1dc", "#393d42"),
    "base": ("#7b8087", "#7b8087", "#a9aeb5"),
    "blue": ("#0072b2", "#0072b2", "#58b2ea"),
    "vermillion": ("#d55e00", "#d55e00", "#f08a3c"),
    "green": ("#009e73", "#009e73", "#3cc79c"),
    "purple": ("#aa4499", "#aa4499", "#d687c6"),
    "ochre": ("#b8860b", "#b8860b", "#e0b04a"),
    "sky": ("#5ab4e5", "#5ab4e5", "#a5dcff"),
    "brown": ("#7a4a22", "#7a4a22", "#b98a5e"),
}
"""Name → the colour in the figure, in a light page, in a dark page."""

WIDTH = 4.9
"""Inches: as wide as a phone shows 10 pt text legibly."""

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": INKS["soft"][0],
    "axes.labelcolor": INKS["soft"][0],
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INKS["ink"][0],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["rule"][0],
    "grid.linewidth": 0.7,
    "text.color": INKS["ink"][0],
    "xtick.color": INKS["soft"][0],
    "ytick.color": INKS["soft"][0],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "switchmamba",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

MOST_NAMES = 7
"""Curves that can carry their names at their ends; more get a legend below."""

SHORT_NAME = 9
"""Letters of a name whose number stands beside it; that of a longer one stands below."""

LETTERS_BELOW = 64
"""Letters of two columns of a legend that fit beside each other."""

Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Make a function draw in this house's style."""

    @wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return styled


def svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element that scales with its container; its colours are CSS variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
    )
    text = text.replace("'DejaVu Sans', sans-serif", "inherit")
    for name, (drawn, _, _) in INKS.items():
        text = text.replace(drawn, f"var(--{name})")
    return text.strip()


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG on white, sharp on dense displays, in 256 colours: small enough to be committed."""
    drawn, small = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(drawn, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    image = Image.open(drawn).convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(small, "PNG", optimize=True)
    return small.getvalue()


def colours(results: Results) -> dict[str, str]:
    """Return each arm's colour: grey for the baseline, one for every other arm, or for every series in its shades."""
    wheel = [INKS[name][0] for name in ("blue", "vermillion", "green", "purple", "ochre", "sky", "brown")]
    baseline = results.experiment.baseline
    others = [arm.name for arm in results.arms if arm.name != baseline]
    series = {name: results.experiment.arms[name].series or name for name in others}
    hues = {s: wheel[i % len(wheel)] for i, s in enumerate(dict.fromkeys(series.values()))}
    members = {s: [name for name in others if series[name] == s] for s in hues}
    shades = {name: _shade(hues[s], members[s].index(name), len(members[s])) for name, s in series.items()}
    return {baseline: INKS["base"][0], **shades}


def _shade(colour: str, place: int, of: int) -> str:
    """Return a colour from light (the first of several) to itself (the last)."""
    if of == 1:
        return colour
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    lighter = lightness + (0.8 - lightness) * 0.75 * (1 - place / (of - 1))
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lighter, saturation))


def figure_with_axes(height: float) -> tuple[Figure, Axes]:
    """Return a figure of the usual width and this height in inches, and its one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def thin(values: Floats, most: int = 700) -> Floats:
    """Keep at most ``most`` values, the last included: more would only make the file large."""
    if values.size <= most:
        return values
    kept: Floats = values[np.linspace(0, values.size - 1, most).round().astype(int)]
    return kept


def aligned(curves: Sequence[Floats]) -> Floats:
    """Stack curves, cut to the shortest."""
    shortest = min(curve.size for curve in curves)
    return np.stack([curve[:shortest] for curve in curves])


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], number: str) -> None:
    """Name each curve right of its end; names that would touch move apart, within the frame.

    Too many, or more than fit there, stand in a legend, the lowest last.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    between = "\n" if any(len(name) > SHORT_NAME for _, name, _ in ends) else "  "
    half = 0.075 if between == "\n" else 0.04
    row = half * (high - low) * 3.2 / axes.get_figure().get_size_inches()[1]  # type: ignore[union-attr]
    if len(ends) > MOST_NAMES or 2 * row * len(ends) > high - low:
        _legend_below(axes, ends, number)
        return
    places = [min(max(y, low), high) for y, _, _ in ordered]
    for _ in range(50):
        for i in range(len(places) - 1):
            overlap = 2 * row - (places[i + 1] - places[i])
            if overlap > 1e-9:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    last = len(places) - 1
    places = [max(place, low + row * (1 + 2 * i)) for i, place in enumerate(places)]
    places = [min(place, high - row * (1 + 2 * (last - i))) for i, place in enumerate(places)]
    for place, (y, name, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            f"{name}{between}{_written(y, number)}",
            xy=(1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            ha="left",
            color=colour,
            fontsize=9,
            linespacing=1.15,
            annotation_clip=False,
        )


def _written(value: float, number: str) -> str:
    """Write a value with the minus sign that tables have."""
    return number.format(value).replace("-", "−")


def _legend_below(axes: Axes, ends: Sequence[tuple[float, str, str]], number: str) -> None:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    ordered = sorted(ends, reverse=True)
    handles = [Line2D([], [], color=colour, linewidth=2.2) for _, _, colour in ordered]
    labels = [f"{name}  {_written(value, number)}" for value, name, _ in ordered]
    half = -(-len(labels) // 2)
    columns = [labels[:half], labels[half:]] if len(labels) > 1 else [labels]
    if sum(max(map(len, column)) for column in columns) > LETTERS_BELOW:
        columns = [labels]
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * len(columns[0]) + 0.1)
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=len(columns),
        fontsize=8,
        frameon=False,
        handlelength=1.2,
    )
