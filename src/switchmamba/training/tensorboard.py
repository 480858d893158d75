"""TensorBoard events beside ``metrics.jsonl``; needs the extra ``tensorboard``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchmamba.errors import ConfigError
from switchmamba.training.metrics import Line

_SCALARS = (
    "loss",
    "loss_ema",
    "validation_loss",
    "load_balance_loss",
    "z_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu",
)


class TensorBoard:
    """An observer of the trainer that writes each line's numbers as scalars into ``directory``."""

    def __init__(self, directory: Path) -> None:
        """Refuse with ConfigError if the package is missing; write nothing yet."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "training.tensorboard = true needs a package; pip install 'switchmamba[tensorboard]'"
            ) from None
        self._open: Callable[[int], Any] = lambda step: SummaryWriter(str(directory), purge_step=step)
        self._writer: Any = None

    def start(self, step: int, steps: int) -> None:
        """Open the file; the viewer hides what an earlier process logged after ``step``."""
        self._writer = self._open(step + 1)
        self._writer.add_scalar("steps", steps, step)

    def show(self, line: Line) -> None:
        """Write one step."""
        for name in _SCALARS:
            if line.get(name) is not None:
                self._writer.add_scalar(name, line[name], line["step"])
        for i, router in enumerate(line["routers"]):
            for name in ("entropy", "dropped", "dead", "largest_load"):
                self._writer.add_scalar(f"router_{i}/{name}", router[name], line["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
