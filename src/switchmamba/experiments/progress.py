"""What a person sees while runs train side by side: a row per run on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from switchmamba.experiments.runner import RunStatus
from switchmamba.training.progress import describe, eta, expert_load

logger = logging.getLogger("switchmamba")

_STYLES = {
    "running": "",
    "analysing": "",
    "waiting": "dim",
    "finished": "dim",
    "diverged": "yellow",
    "failed": "red",
}
_MOST_ROWS = 24
_BAR, _GAP = 12, 2
"""Columns of the terminal: of the bar, and between two columns of the table."""


class LiveRuns:
    """Shows the runs of an experiment on ``console``; pass :meth:`observe` to the runner.

    On a terminal a table that moves; elsewhere a line per running run every ``every`` seconds, and one at
    each end.
    """

    def __init__(self, console: Console, every: float = 20.0) -> None:
        self._live = (
            Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        )
        self._every = every
        self._last = time.monotonic()
        self._states: dict[str, str] = {}

    def observe(self, statuses: Sequence[RunStatus]) -> None:
        """Show how things stand."""
        if self._live is not None:
            self._live.update(table(statuses, self._live.console.width))
            return
        due = time.monotonic() - self._last >= self._every
        for status in statuses:
            changed = self._states.get(status.name, "waiting") != status.state
            if changed or (due and status.state == "running" and status.line is not None):
                logger.info("%s", sentence(status))
            self._states[status.name] = status.state
        if due:
            self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


@dataclass(frozen=True)
class _Column:
    """A column of the table and what it takes to be readable; ``optional`` ones go where they do not fit, first 1."""

    head: str
    cells: Sequence[RenderableType]
    width: int
    right: bool = False
    optional: int = 0


def _text_column(head: str, cells: Sequence[str], longest: str = "", optional: int = 0) -> _Column:
    """Return a column with room for ``longest``, to the right if that is given: what comes later moves nothing."""
    width = max(map(cell_len, (head, longest, *cells)))
    return _Column(head, cells, width, bool(longest), optional)


def table(statuses: Sequence[RunStatus], width: int) -> Table:
    """Draw a row per run: bar, step, smoothed loss, held-out loss, speed, time left, load of the experts.

    On a terminal of ``width`` columns where that is too much the bar goes first, then the load; then names are folded.
    Numbers and states are always whole.
    """
    # Those at work first, if there are more than fit.
    order = (
        sorted(statuses, key=lambda status: status.state not in ("running", "analysing"))
        if len(statuses) > _MOST_ROWS
        else statuses
    )
    columns = _columns(order[:_MOST_ROWS])
    for number in (1, 2):
        if sum(column.width + _GAP for column in columns) - _GAP > width:
            columns = [column for column in columns if column.optional != number]
    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    grid.add_column(columns[0].head, overflow="fold")
    for column in columns[1:]:
        justify: JustifyMethod = "right" if column.right else "left"
        grid.add_column(column.head, justify=justify, no_wrap=True, min_width=column.width)
    for status, cells in zip(order, zip(*(column.cells for column in columns), strict=True), strict=False):
        grid.add_row(*cells, style=_STYLES[status.state])
    if len(statuses) > _MOST_ROWS:
        grid.add_row(f"and {len(statuses) - _MOST_ROWS} more", style="dim")
    return grid


def _columns(statuses: Sequence[RunStatus]) -> list[_Column]:
    lines = [status.line for status in statuses]
    working = [
        (status, line if status.state == "running" else None)
        for status, line in zip(statuses, lines, strict=True)
    ]
    steps = [0 if line is None else int(line["step"]) for line in lines]
    bars = [
        ProgressBar(total=status.steps, completed=step, width=_BAR)
        for status, step in zip(statuses, steps, strict=True)
    ]
    losses = ["" if line is None or line["loss_ema"] is None else f"{line['loss_ema']:.3f}" for line in lines]
    held_out = [f"{s.validation_loss:.3f}" if s.validation_loss is not None else "" for s in statuses]
    speeds = ["" if line is None else f"{line['tokens_per_second']:,.0f}" for _, line in working]
    counts = [f"{step:,}/{status.steps:,}" for step, status in zip(steps, statuses, strict=True)]
    ends = [f"{status.steps:,}/{status.steps:,}" for status in statuses]
    left = [status.state if line is None else eta(line, status.steps) for status, line in working]
    loads = [expert_load(line) if line is not None and line.get("routers") else "" for line in lines]
    return [
        _text_column("run", [status.name for status in statuses]),
        _Column("", bars, _BAR, optional=1),
        _text_column("step", counts, max(ends, key=len, default="")),
        _text_column("loss", losses, "10.000"),
        _text_column("held-out", held_out, "10.000"),
        _text_column("tok/s", speeds, "99,999"),
        _text_column("ETA", left, "analysing"),
        _text_column("expert load", loads, optional=2),
    ]


def sentence(status: RunStatus) -> str:
    """Describe one run in a line."""
    if status.line is None:
        return f"{status.name}: {status.state}"
    text = (
        f"{status.name}: {status.state}, step {status.line['step']}/{status.steps}  {describe(status.line)}"
    )
    return f"{text}  ETA {eta(status.line, status.steps)}" if status.state == "running" else text
