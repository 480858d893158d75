"""``metrics.jsonl``: one line per step, what stands in it, and how it survives a crash.

A line has step, tokens (seen since the beginning), loss (cross-entropy, nats per target, null where the mask of the
data leaves a batch without a target), loss_ema (which skips such a step),
load_balance_loss and z_loss (mean over routers, without their coefficients), learning_rate, grad_norm
(before clipping), tokens_per_second, mfu and peak_memory in bytes (``utilisation.py``), ``routers`` (a list with one
entry per router: fraction per expert, entropy in nats, dropped fraction, dead experts, largest load over mean load),
and, where the step was validated, validation_loss. ``docs/runs.md`` tells users.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.layers.interface import RouterStats
from switchmamba.training.losses import mean_load_balance_loss, mean_z_loss

logger = logging.getLogger("switchmamba")

Line = Mapping[str, Any]
"""One line of ``metrics.jsonl``."""


@dataclass(frozen=True)
class SmoothedLoss:
    """Exponential moving average of the loss, bias-corrected as Adam's moments are (arXiv 1412.6980, §3).

        m_t = (1 − α)·m_{t−1} + α·loss_t,  value = m_t / (1 − (1 − α)^t)

    So it begins as the mean of the losses so far and forgets the first ones at the rate α. A step without a target has
    no loss, and changes nothing.
    """

    alpha: float
    moment: float = 0.0
    count: int = 0

    def update(self, loss: float | None) -> Self:
        """Return the average after one more loss, if there is one."""
        if loss is None:
            return self
        moment = (1 - self.alpha) * self.moment + self.alpha * loss
        return type(self)(self.alpha, moment, self.count + 1)

    @property
    def value(self) -> float | None:
        """The smoothed loss; None before the first one."""
        if not self.count:
            return None
        return self.moment / (1 - (1 - self.alpha) ** self.count)


def router_metrics(router_stats: tuple[RouterStats, ...]) -> dict[str, Any]:
    """Return the part of a line that speaks of the routers, in one transfer from the device."""
    if not router_stats:
        return {"load_balance_loss": None, "z_loss": None, "routers": []}
    values = [mean_load_balance_loss(router_stats).view(1), mean_z_loss(router_stats).view(1)]
    for stats in router_stats:
        scalars = (stats.entropy, stats.dropped_fraction, stats.dead_experts, stats.largest_load)
        values += [torch.stack([scalar.float() for scalar in scalars]), stats.fraction_E]
    load_balance_loss, z_loss, *rest = torch.cat(values).tolist()
    routers = []
    for stats in router_stats:
        (entropy, dropped, dead, largest_load), rest = rest[:4], rest[4:]
        fraction, rest = [round(f, 5) for f in rest[: stats.num_experts]], rest[stats.num_experts :]
        routers.append(
            {
                "fraction": fraction,
                "entropy": entropy,
                "dropped": dropped,
                "dead": int(dead),
                "largest_load": largest_load,
            }
        )
    return {"load_balance_loss": load_balance_loss, "z_loss": z_loss, "routers": routers}


class MetricsLog:
    """The file, locked: a second process on the same run is refused."""

    def __init__(self, path: Path) -> None:
        """Open and lock ``path``, which need not exist."""
        self.path = path
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{path.parent} is being trained by another process; stop it or choose another --out"
            ) from None

    def truncate(self, after_step: int) -> None:
        """Cut off what comes after ``after_step``: those steps are taken again."""
        kept, last_step = 0, 0
        with self.path.open("rb") as lines:
            for line in lines:
                step = _step_of(line)
                if step is None or not last_step < step <= after_step:
                    break
                kept, last_step = kept + len(line), step
        if last_step < after_step:
            logger.warning("%s: holds no steps from %d to %d", self.path, last_step + 1, after_step)
        self._file.truncate(kept)

    def write(self, line: Line) -> None:
        """Append one line."""
        remaining = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise SwitchMambaError(
                f"{self.path}: cannot be written ({error.strerror}); free space and --resume"
            ) from error

    def sync(self) -> None:
        """Return when all lines are on the disk; a checkpoint may be published only then."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()


def last_step(path: Path) -> int:
    """Return the step of the last complete line of ``metrics.jsonl``; 0 if there is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return next((step for line in reversed(lines) if (step := _step_of(line)) is not None), 0)


def _step_of(line: bytes) -> int | None:
    """Return the step of a complete line, None for one that was being written when the process died."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
