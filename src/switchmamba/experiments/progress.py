"""What a person sees while runs train side by side: a row per run on a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
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
            self._live.update(table(statuses))
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


def table(statuses: Sequence[RunStatus]) -> Table:
    """Draw a row per run: bar, step, smoothed loss, held-out loss, speed, time left, load of the experts."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (
        ("run", "left"),
        ("", "left"),
        ("step", "right"),
        ("loss", "right"),
        ("held-out", "right"),
    ):
        grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name, justify in (("tok/s", "right"), ("ETA", "right"), ("expert load", "left")):
        grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    # Those at work first, if there are more than fit.
    order = (
        sorted(statuses, key=lambda status: status.state not in ("running", "analysing"))
        if len(statuses) > _MOST_ROWS
        else statuses
    )
    for status in order[:_MOST_ROWS]:
        line = status.line
        running = status.state == "running" and line is not None
        step = 0 if line is None else int(line["step"])
        grid.add_row(
            status.name,
            ProgressBar(total=status.steps, completed=step, width=18),
            f"{step:,}/{status.steps:,}",
            "" if line is None or line["loss_ema"] is None else f"{line['loss_ema']:.3f}",
            "" if status.validation_loss is None else f"{status.validation_loss:.3f}",
            f"{line['tokens_per_second']:,.0f}" if running and line is not None else "",
            eta(line, status.steps) if running and line is not None else status.state,
            expert_load(line) if line is not None and line.get("routers") else "",
            style=_STYLES[status.state],
        )
    if len(statuses) > _MOST_ROWS:
        grid.add_row(f"and {len(statuses) - _MOST_ROWS} more", style="dim")
    return grid


def sentence(status: RunStatus) -> str:
    """Describe one run in a line."""
    if status.line is None:
        return f"{status.name}: {status.state}"
    text = (
        f"{status.name}: {status.state}, step {status.line['step']}/{status.steps}  {describe(status.line)}"
    )
    return f"{text}  ETA {eta(status.line, status.steps)}" if status.state == "running" else text
