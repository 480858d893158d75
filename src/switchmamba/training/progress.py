"""What a person sees while a model trains: a bar on a terminal, plain lines elsewhere."""

import logging
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from switchmamba.training.metrics import Line

logger = logging.getLogger("switchmamba")

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_EXPERTS_DRAWN = 32


class Observer(Protocol):
    """Who watches a run; called by the trainer between steps."""

    def start(self, step: int, steps: int) -> None:
        """Training goes on after ``step`` of ``steps``."""

    def show(self, line: Line) -> None:
        """One step is done; ``line`` is its line of ``metrics.jsonl``."""


class PlainProgress:
    """Log a line every ``every`` steps, and for each validated and the last step."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._steps = 0

    def start(self, step: int, steps: int) -> None:
        """Remember where the run ends."""
        self._steps = steps
        logger.info("training from step %d to %d", step, steps)

    def show(self, line: Line) -> None:
        """Log the step if it is due."""
        if line["step"] % self.every == 0 or line["step"] == self._steps or "validation_loss" in line:
            logger.info(
                "step %d/%d  %s  ETA %s", line["step"], self._steps, describe(line), eta(line, self._steps)
            )


class TerminalProgress:
    """A bar with step, loss, tok/s, ETA and expert load, on the terminal of ``console``."""

    def __init__(self, console: Console, label: str) -> None:
        whole = Column(no_wrap=True)  # in a narrow terminal the bar is what shrinks
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(table_column=whole),
            BarColumn(bar_width=None),
            console=console,
        )
        self._task = self._bar.add_task(label, text="", start=False)

    def start(self, step: int, steps: int) -> None:
        """Set the bar to where the run stands."""
        self._bar.reset(self._task, total=steps, completed=step)

    def show(self, line: Line) -> None:
        """Move the bar; a validation is logged above it."""
        if "validation_loss" in line:
            logger.info("step %d  validation loss %.3f", line["step"], line["validation_loss"])
        text = describe({key: value for key, value in line.items() if key != "validation_loss"})
        self._bar.update(self._task, completed=line["step"], text=text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def describe(line: Line) -> str:
    """Say the loss, the speed and the experts' load of one step."""
    parts = [f"loss {_number(line['loss'])}", f"{line['tokens_per_second']:,.0f} tok/s"]
    if "validation_loss" in line:
        parts.insert(1, f"validation {line['validation_loss']:.3f}")
    if line.get("routers"):  # not in every line of an archived run
        parts.append(f"load {expert_load(line)}")
    return "  ".join(parts)


def _number(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def expert_load(line: Line) -> str:
    """Draw each expert's share, averaged over routers (a full block is twice the even one), and the peak."""
    routers = line["routers"]
    largest = max(max(router["fraction"]) * len(router["fraction"]) for router in routers)
    experts = len(routers[0]["fraction"])
    if experts > _MOST_EXPERTS_DRAWN or any(len(router["fraction"]) != experts for router in routers):
        return f"{largest:.1f}×"
    means = [sum(router["fraction"][i] for router in routers) / len(routers) for i in range(experts)]
    heights = [min(int(mean * experts / 2 * len(_BLOCKS)), len(_BLOCKS) - 1) for mean in means]
    return "".join(_BLOCKS[height] for height in heights) + f" {largest:.1f}×"


def eta(line: Line, steps: int) -> str:
    """Say how long the remaining steps take at the speed of this one, as h:mm:ss."""
    tokens_per_step = line["tokens"] / line["step"]
    seconds = int((steps - line["step"]) * tokens_per_step / line["tokens_per_second"])
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
