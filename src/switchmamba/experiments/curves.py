"""Curves of a run: its ``metrics.jsonl`` as arrays, and the speedup of one curve over another.

Speedup at loss l, MoE-Mamba §4.2: tokens the baseline needs to reach l / tokens the model needs. Suffixes:
S steps, V validations, W steps whose line has the routers' loads, E experts.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchmamba.errors import DataError

Floats = NDArray[np.floating[Any]]


SPIKE = 1.0
"""Nats that a training loss rises above its lowest level before, for a run to be called unstable."""

LEVEL = 15
"""Steps whose median is the level of a loss: batches differ, the easiest one is no measure of the others.

In an archive, which keeps every so many steps, as many as fall into these, but at least three.
"""


def count_at_end(count: int) -> int:
    """Return how many of ``count`` notes about routers are the end of a run: the last twentieth, at least one."""
    return max(1, count // 20)


@dataclass(frozen=True)
class Spike:
    """Where a training loss stood highest above its lowest level before, past a twentieth of a run; nats per token.

    Attributes:
        step: where.
        level_before: the lowest level before it.
        loss: there.
        came_back: at the end the level is no higher than before, and the last loss has not risen again.
    """

    step: int
    level_before: float
    loss: float
    came_back: bool = True


@dataclass(frozen=True)
class Metrics:
    """What one run logged, one entry a step; losses are cross-entropies in nats per token.

    Attributes:
        step_S: steps taken when the line was written.
        tokens_S: tokens seen by then.
        loss_S: training loss of the step; NaN where it had no target.
        loss_ema_S: the same, smoothed as the run's configuration says; before the first target what it is there.
        tokens_per_second_S: training speed.
        validation_step_V, validation_tokens_V, validation_loss_V: the same where held-out loss was measured.
        load_tokens_W: tokens seen where the routers' loads were noted.
        load_WE: for each router the fraction of its assignments that went to each expert.
        dropped_W: share of their assignments that the routers dropped there, their mean; NaN where it was not noted.
        noted_at_end: steps whose mean stands for a run's end in what follows; in an archive the last entry is it.
        peak_memory: most bytes that the run ever held, of the GPU or, without one, of the process; NaN if not noted.
    """

    step_S: Floats
    tokens_S: Floats
    loss_S: Floats
    loss_ema_S: Floats
    tokens_per_second_S: Floats
    validation_step_V: Floats
    validation_tokens_V: Floats
    validation_loss_V: Floats
    load_tokens_W: Floats
    load_WE: tuple[Floats, ...]
    dropped_W: Floats
    noted_at_end: int
    peak_memory: float

    @property
    def steps(self) -> int:
        """Steps taken; 0 for a run that has not begun."""
        return int(self.step_S[-1]) if self.step_S.size else 0

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return int(self.tokens_S[-1]) if self.tokens_S.size else 0

    @property
    def final_loss(self) -> float:
        """Last smoothed training loss."""
        return float(self.loss_ema_S[-1]) if self.loss_ema_S.size else float("nan")

    @property
    def final_validation_loss(self) -> float:
        """Last held-out loss; NaN if none was measured."""
        return float(self.validation_loss_V[-1]) if self.validation_loss_V.size else float("nan")

    @property
    def last_load_E(self) -> tuple[Floats, ...]:
        """For each router the share of assignments that each expert has, mean over the last twentieth of the notes."""
        return tuple(load[-count_at_end(len(load)) :].mean(0) for load in self.load_WE)

    @property
    def fullest_load(self) -> float:
        """Of the fullest expert of any router, at the end: its load over its fair share."""
        return float(max((load.max() * load.size for load in self.last_load_E), default=np.nan))

    @property
    def emptiest_load(self) -> float:
        """Of the emptiest expert of any router, at the end: its load over its fair share."""
        return float(min((load.min() * load.size for load in self.last_load_E), default=np.nan))

    @property
    def dead_experts(self) -> int:
        """Experts of all routers that no token went to at the end."""
        return sum(int((load == 0).sum()) for load in self.last_load_E)

    @property
    def final_dropped(self) -> float:
        """Share of assignments that routers dropped at the end, mean over the last twentieth of the notes."""
        size = self.dropped_W.size
        return float(np.mean(self.dropped_W[-count_at_end(size) :])) if size else float("nan")

    @property
    def spike(self) -> Spike | None:
        """Where the loss rose by more than :data:`SPIKE` and most; None in a run that stayed stable."""
        known = ~np.isnan(self.loss_S)  # NaN: a step without a target
        step_S, loss_S = self.step_S[known], self.loss_S[known]
        apart = float(np.median(np.diff(step_S))) if step_S.size > 1 else 1.0
        window = max(3, round(LEVEL / apart))
        if loss_S.size <= window:
            return None
        # The lowest level counts from the first step on: a rise may have begun in the first twentieth, and last.
        level_S = np.minimum.accumulate(_levels_before(loss_S, window))
        rise_S = np.where(step_S > self.steps / 20, loss_S - level_S, 0)
        if not (rise_S > SPIKE).any():
            return None
        worst = int(np.argmax(rise_S))
        before = float(level_S[worst])
        ends_high = loss_S[-1] > before + SPIKE  # which the level does not show yet
        came_back = bool(np.median(loss_S[-window:]) <= before and not ends_high)
        return Spike(int(step_S[worst]), before, float(loss_S[worst]), came_back)


def _levels_before(loss_S: Floats, window: int) -> Floats:
    """Return the median of the ``window`` losses before each; infinite where there are fewer."""
    levels = np.median(np.lib.stride_tricks.sliding_window_view(loss_S[:-1], window), axis=1)
    return np.concatenate([np.full(window, np.inf), levels])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``, one entry per step: a resumed run repeats steps, and the later line holds.

    A last line without its newline was being written when the run was killed; it is left out.
    """
    if not path.is_file():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        record = parse_line(line)
        if record is None:
            raise DataError(
                f"{path}, line {number}: not a record of a step; restore the file or start the run anew"
            )
        lines[record["step"]] = record
    return [lines[step] for step in sorted(lines)]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse one line of ``metrics.jsonl``; None if it is no record of a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_metrics(path: Path) -> Metrics:
    """Read a run's ``metrics.jsonl``; a missing file is a run that has not begun."""
    if not path.is_file():
        return _metrics([])
    state = path.stat()
    return _read_metrics(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=512)
def _read_metrics(path: Path, _size: int, _modified: int) -> Metrics:
    # While an experiment runs, every run's file is asked for whenever one has ended.
    return _metrics(read_lines(path))


def _metrics(records: Sequence[dict[str, Any]]) -> Metrics:
    validated = [record for record in records if record.get("validation_loss") is not None]

    def column(name: str, rows: Sequence[dict[str, Any]]) -> Floats:
        return np.array([row[name] for row in rows], dtype=np.float64)

    loaded = [record for record in records if record.get("routers")]
    loads = zip(*([router["fraction"] for router in record["routers"]] for record in loaded), strict=True)
    return Metrics(
        step_S=column("step", records),
        tokens_S=column("tokens", records),
        loss_S=column("loss", records),
        loss_ema_S=_led_in(column("loss_ema", records)),
        tokens_per_second_S=column("tokens_per_second", records),
        validation_step_V=column("step", validated),
        validation_tokens_V=column("tokens", validated),
        validation_loss_V=column("validation_loss", validated),
        load_tokens_W=column("tokens", loaded),
        load_WE=tuple(np.array(load, dtype=np.float32) for load in loads),
        dropped_W=np.array([_dropped(record["routers"]) for record in loaded], dtype=np.float64),
        noted_at_end=loaded[-1].get("noted_at_end", count_at_end(len(loaded))) if loaded else 0,
        peak_memory=float(
            max((r["peak_memory"] for r in records if r.get("peak_memory")), default=float("nan"))
        ),
    )


def _dropped(routers: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([router.get("dropped", np.nan) for router in routers]))


def _led_in(loss_S: Floats) -> Floats:
    """Put the first number in the place of the NaN before it: a curve that is compared begins where others do."""
    known = np.flatnonzero(~np.isnan(loss_S))
    if known.size:
        loss_S[: known[0]] = loss_S[known[0]]
    return loss_S


class Tail:
    """The newest line of a growing ``metrics.jsonl``, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self.line: Mapping[str, Any] | None = None
        self.validation_loss: float | None = None
        self._path = path
        self._offset = 0

    def read(self) -> None:
        """Take in what was written since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # a resumed run cut off the steps that it takes again
            file.seek(self._offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for raw in complete.splitlines():
            record = parse_line(raw)
            if record is not None:
                self.line = record
                self.validation_loss = record.get("validation_loss", self.validation_loss)


def centred(loss_S: Floats, alpha: float) -> Floats:
    """Smooth a loss to both sides: each step weighs (1 − α) to the power of its distance, normalised.

    At the last step this is the trailing, bias-corrected average that ``loss_ema`` is; but where the loss falls, that
    one lies above it, and this one does not. A step without a loss (NaN: no target counted) weighs nothing.
    """

    def decayed(values: Floats) -> Floats:
        return np.fromiter(accumulate(values, lambda sum_, value: (1 - alpha) * sum_ + value), np.float64)

    def both_ways(values: Floats) -> Floats:
        return decayed(values) + decayed(values[::-1])[::-1] - values  # the step itself is in both sums

    has_loss_S = ~np.isnan(loss_S)
    smoothed: Floats = both_ways(np.where(has_loss_S, loss_S, 0)) / both_ways(has_loss_S.astype(np.float64))
    return smoothed


def tokens_to_reach(tokens_S: Floats, loss_S: Floats, levels: Floats) -> Floats:
    """Tokens after which the curve first lies at or below each level, linear between steps; NaN where it never does."""
    falling_S = -np.minimum.accumulate(loss_S)
    first = np.searchsorted(falling_S, -levels, side="left")
    reached = first < loss_S.size
    after = np.minimum(first, loss_S.size - 1)
    before = np.maximum(after - 1, 0)
    rise = falling_S[after] - falling_S[before]
    share = np.where(rise > 0, (-levels - falling_S[before]) / np.where(rise > 0, rise, 1), 0.0)
    return np.where(reached, tokens_S[before] + share * (tokens_S[after] - tokens_S[before]), np.nan)


@dataclass(frozen=True)
class Speedup:
    """Speedup over a baseline at falling levels of loss.

    Attributes:
        level: losses in nats, from high to low; the last is the lowest that both curves reach.
        ratio: tokens the baseline needs to reach it / tokens this curve needs; above 1 is better than it.
    """

    level: Floats
    ratio: Floats

    @property
    def final(self) -> float:
        """Speedup at the lowest loss that both reach."""
        return float(self.ratio[-1])


def speedup(
    baseline: tuple[Floats, Floats], curve: tuple[Floats, Floats], *, skip: float = 0.05, points: int = 200
) -> Speedup:
    """Speedup of ``curve`` over ``baseline``, both (tokens, loss).

    Args:
        baseline: tokens and smoothed loss of the baseline.
        curve: the same of the model.
        skip: share of the tokens at the beginning that is left out: the curves fall too steeply there to compare.
        points: number of levels.
    """
    start = min(np.interp(skip * tokens_S[-1], tokens_S, loss_S) for tokens_S, loss_S in (baseline, curve))
    lowest = max(loss_S.min() for _, loss_S in (baseline, curve))
    level = np.linspace(max(start, lowest), lowest, points)
    return Speedup(level=level, ratio=tokens_to_reach(*baseline, level) / tokens_to_reach(*curve, level))
