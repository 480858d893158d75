"""What came out: the runs of an experiment's directory, the choice its search makes, and the verdict on its claim.

    DIR/experiment.json          the experiment, the data, the hardware (an :class:`ExperimentRecord`)

Everything here is read from that file and those of the runs (``run_files.py``); nothing is kept elsewhere.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import numpy as np

from switchmamba.config import Config, Tables, validate
from switchmamba.errors import ConfigError, DataError
from switchmamba.experiments.curves import Metrics, Speedup, Spike, read_metrics, speedup
from switchmamba.experiments.run_files import (
    analysed_step,
    last_error,
    log_path,
    run_directory,
    saved_step,
    write_whole,
)
from switchmamba.experiments.spec import Experiment, Run

RECORD = "experiment.json"

_NON_FINITE = re.compile(r"\b(NaN|nan|inf|infinity|non-finite)\b")


class ExperimentRecord(Config):
    """What the directory of an experiment says about how it was made.

    Attributes:
        experiment: the experiment as it was run.
        data: the prepared data, as given on the command line.
        corpus: what is in it, in words.
        corpus_sha256: of its tokenizer and of its files of tokens; None where the runs began before it was noted.
        hardware: processor, cores and memory, or GPU.
        software: versions.
        threads: CPU threads of each run.
        command: the command line.
    """

    experiment: Experiment
    data: str
    corpus: str
    corpus_sha256: str | None = None
    hardware: str
    software: str
    threads: int
    command: str


@dataclass(frozen=True)
class RunResult:
    """A run and what it logged so far.

    Attributes:
        run: what was asked.
        directory: its run directory.
        metrics: what it logged.
        config: its resolved configuration; None before it began.
        failure: the last error it reported, if it did not finish.
        kept_step: the newest step of which a checkpoint or, where checkpoints were discarded, an analysis stands; −1
            without any.
    """

    run: Run
    directory: Path
    metrics: Metrics
    config: Tables | None
    failure: str | None
    kept_step: int

    @property
    def planned_steps(self) -> int | None:
        """Steps it is to take; None before it began."""
        return None if self.config is None else int(self.config["training"]["steps"])

    @property
    def finished(self) -> bool:
        """All steps were taken and the last state was saved."""
        steps = self.planned_steps
        return steps is not None and self.metrics.steps >= steps and self.kept_step >= steps

    @property
    def diverged(self) -> bool:
        """It stopped at a non-finite loss or gradient: an outcome of a search, not a fault of it."""
        if self.finished:  # an error in its log is that of an analysis
            return False
        return self.failure is not None and _NON_FINITE.search(self.failure) is not None

    def selected_loss(self, selection: str) -> float:
        """Return the number that the search minimises; infinite for a run that diverged."""
        if self.diverged:
            return math.inf
        m = self.metrics
        value = m.final_validation_loss if selection == "validation_loss" else m.final_loss
        return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class ArmResult:
    """An arm's runs.

    Attributes:
        name: the arm.
        label: what plots and tables call it.
        candidates: runs of the search, first seed.
        chosen: the best of them, once all are settled.
        runs: the finished runs that count, one a seed, all at the chosen point; the first is ``chosen``.
        diverged: runs that would count and diverged: of further seeds, or the whole search.
    """

    name: str
    label: str
    candidates: tuple[RunResult, ...]
    chosen: RunResult | None
    runs: tuple[RunResult, ...]
    diverged: tuple[RunResult, ...]

    def seed(self, seed: int) -> RunResult | None:
        """Return the run that counts for a seed."""
        return next((result for result in self.runs if result.run.seed == seed), None)

    def end(self, seed: int) -> float | None:
        """Return the final held-out loss of a seed; infinite where it diverged, None where it is missing."""
        if (result := self.seed(seed)) is not None:
            return result.metrics.final_validation_loss
        return math.inf if any(result.run.seed == seed for result in self.diverged) else None

    def over_seeds(self, name: str) -> "Spread":
        """Return a property of :class:`Metrics` over the seeds."""
        return Spread(tuple(float(getattr(result.metrics, name)) for result in self.runs))

    @property
    def unstable(self) -> bool:
        """The training loss of a run that counts rose high; it may have come back."""
        return any(result.metrics.spike is not None for result in self.runs)

    @property
    def lost(self) -> bool:
        """It did, and has not come back."""
        spikes = [result.metrics.spike for result in self.runs]
        return any(spike is not None and not spike.came_back for spike in spikes)

    @property
    def noting_drops(self) -> list[Metrics]:
        """What the runs logged that noted what their routers dropped; older archives do not hold it."""
        return [result.metrics for result in self.runs if math.isfinite(result.metrics.final_dropped)]

    @property
    def peak_memory(self) -> float:
        """Most bytes that any of its runs held; NaN if none noted it."""
        return max(result.metrics.peak_memory for result in self.runs)

    @cached_property
    def mean_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and smoothed training loss, averaged over the seeds where all of them have logged."""
        shortest = min(result.metrics.tokens_S.size for result in self.runs)
        loss = np.mean([result.metrics.loss_ema_S[:shortest] for result in self.runs], axis=0)
        return self.runs[0].metrics.tokens_S[:shortest], loss


@dataclass(frozen=True)
class Spread:
    """A number measured once per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n − 1); None for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def text(self, digits: int = 3) -> str:
        """Write ``mean ± deviation``, or the value of a single seed; a dash for none."""
        if not self.values:
            return "–"
        error = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


@dataclass(frozen=True)
class Verdict:
    """What became of one expected order of two arms.

    Attributes:
        lower: the arm expected to end lower; ``higher``: the other one.
        gaps: final validation loss of ``higher`` − that of ``lower``, nats per token, for each seed that both have.
        below: for each seed of which it is known, whether ``lower`` ended below; what diverged ended above all else.
        speedup: of ``lower`` over ``higher`` at the lowest training loss both reach, on the mean curves.
    """

    lower: ArmResult
    higher: ArmResult
    gaps: Spread
    below: tuple[bool, ...]
    speedup: float

    @property
    def outcome(self) -> str:
        """``"holds"``, ``"fails"``, ``"undecided"`` (seeds disagree), or ``"open"`` (runs are missing)."""
        if not self.below or not all(math.isfinite(gap) for gap in self.gaps.values):
            return "open"
        if all(self.below):
            return "holds"
        return "undecided" if any(self.below) else "fails"

    @property
    def sentence(self) -> str:
        """The verdict in words and numbers, in whichever direction it came out."""
        lower, higher, gaps = self.lower.label, self.higher.label, self.gaps
        if self.outcome == "open":
            return f"{lower} against {higher}: open, because runs are missing."
        if not gaps.values:
            return (
                f"{lower} ends below {higher}, which diverged."
                if all(self.below)
                else f"{lower} diverged, {higher} did not."
            )
        count = len(self.below)
        undecided = self.outcome == "undecided"
        size = Spread(tuple(-gap if undecided else abs(gap) for gap in gaps.values)).text().replace("-", "−")
        seeds = (
            "one seed, so its spread is unknown"
            if count == 1
            else f"{sum(self.below)} of {count} seeds below"
        )
        arms = (self.lower, self.higher)
        seeds += _blown([arm for arm in arms if arm.unstable]) + _diverged(
            [arm for arm in arms if arm.diverged]
        )
        if undecided:
            return f"Undecided: {lower}'s held-out loss differs from {higher}'s by {size} nats per token ({seeds})."
        direction = "below" if self.outcome == "holds" else "above"
        faster = f"; on the training curves its speedup over {higher} is {self.speedup:.2f}"
        return (
            f"{lower} ends {size} nats per token {direction} {higher} in held-out loss ({seeds})"
            f"{'' if any(arm.lost for arm in arms) else faster}."
        )


@dataclass(frozen=True)
class Results:
    """Everything an experiment's directory holds."""

    directory: Path
    record: ExperimentRecord
    arms: tuple[ArmResult, ...]

    @property
    def experiment(self) -> Experiment:
        """The experiment as it was run."""
        return self.record.experiment

    def arm(self, name: str) -> ArmResult:
        """Return an arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def baseline(self) -> ArmResult:
        """The arm that speedups and differences are taken against."""
        return self.arm(self.experiment.baseline)

    @property
    def unfinished(self) -> list[RunResult]:
        """Runs that can be named and have neither finished nor diverged."""
        return [result for result in self._due() if not (result.finished or result.diverged)]

    @property
    def diverged(self) -> list[RunResult]:
        """Runs that would count and diverged, of all arms."""
        return [result for arm in self.arms for result in arm.diverged]

    @property
    def unstable(self) -> list[tuple[RunResult, Spike]]:
        """Finished runs whose training loss has risen high, each with its worst rise; most come back."""
        finished = [result for result in self._due() if result.finished]
        return [(result, spike) for result in finished if (spike := result.metrics.spike) is not None]

    def _due(self) -> list[RunResult]:
        return [read_run(self.directory, run) for run in due_runs(self.experiment, self.directory)]

    def speedup(self, arm: ArmResult) -> Speedup:
        """Speedup of an arm over the baseline, on the mean curves over seeds."""
        return speedup(self.baseline.mean_curve, arm.mean_curve)

    def seed_speedups(self, arm: ArmResult) -> Spread:
        """Final speedup of an arm over the baseline, seed by seed."""
        pairs = [(self.baseline.seed(result.run.seed), result) for result in arm.runs]
        return Spread(
            tuple(speedup(_curve(base), _curve(result)).final for base, result in pairs if base is not None)
        )

    def gaps_to_baseline(self, arm: ArmResult) -> Spread:
        """Final held-out loss of an arm minus the baseline's, seed by seed; minus its mean where a seed is missing."""
        base = self.baseline.over_seeds("final_validation_loss")
        gaps = []
        for result in arm.runs:
            same = self.baseline.seed(result.run.seed)
            reference = base.mean if same is None else same.metrics.final_validation_loss
            gaps.append(result.metrics.final_validation_loss - reference)
        return Spread(tuple(gaps))

    def verdicts(self) -> list[Verdict]:
        """Return what became of each order that the experiment expects."""
        return [
            self._verdict(self.arm(low), self.arm(high)) for low, high in self.experiment.expected_orders()
        ]

    def _verdict(self, lower: ArmResult, higher: ArmResult) -> Verdict:
        both = [(lower.end(seed), higher.end(seed)) for seed in self.experiment.seeds]
        ends = [(own, other) for own, other in both if own is not None and other is not None]
        gaps = tuple(other - own for own, other in ends if math.inf not in (own, other))
        below = tuple(own < other for own, other in ends if not own == other == math.inf)
        ratio = speedup(higher.mean_curve, lower.mean_curve).final if gaps else math.nan
        return Verdict(lower, higher, Spread(gaps), below, ratio)


def _blown(unstable: Sequence[ArmResult]) -> str:
    """Say which arms blew up, for the end of a parenthesis."""
    back = [arm.label for arm in unstable if not arm.lost]
    lost = [arm.label for arm in unstable if arm.lost]
    said = f"; {' and '.join(back)} blew up on the way and came back" if back else ""
    return said + (f"; {' and '.join(lost)} blew up and did not come back" if lost else "")


def _diverged(arms: Sequence[ArmResult]) -> str:
    """Say of which arms runs diverged, likewise."""
    return "".join(
        f"; {arm.label} diverged in {len(arm.diverged)} of {len(arm.diverged) + len(arm.runs)}"
        for arm in arms
    )


def _curve(result: RunResult) -> tuple[np.ndarray, np.ndarray]:
    return result.metrics.tokens_S, result.metrics.loss_ema_S


def read_run(directory: Path, run: Run) -> RunResult:
    """Read what a run has left so far; never fails for a run that has not begun."""
    place = run_directory(directory, run)
    config_path = place / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else None
    return RunResult(
        run,
        place,
        read_metrics(place / "metrics.jsonl"),
        config,
        last_error(log_path(directory, run)),
        max(saved_step(place), analysed_step(directory, run)),
    )


def choose(candidates: Sequence[RunResult], selection: str) -> RunResult | None:
    """Return the candidate with the lowest loss once all have finished or diverged; None before, or if all diverged."""
    if not all(result.finished or result.diverged for result in candidates):
        return None
    best = min(candidates, key=lambda result: result.selected_loss(selection))
    return best if math.isfinite(best.selected_loss(selection)) else None


def due_runs(experiment: Experiment, directory: Path) -> list[Run]:
    """Return all runs that can be named now: every search, and further seeds where a search is settled."""
    due: list[Run] = []
    for arm in experiment.arms:
        due.extend(experiment.candidates(arm))
    for arm in experiment.arms:
        chosen = choose(
            [read_run(directory, run) for run in experiment.candidates(arm)], experiment.selection
        )
        if chosen is not None:
            due.extend(experiment.repetitions(chosen.run))
    return due


def read_arm(experiment: Experiment, directory: Path, name: str) -> ArmResult:
    """Read an arm's search, its choice, and the runs that count."""
    candidates = tuple(read_run(directory, run) for run in experiment.candidates(name))
    chosen = choose(candidates, experiment.selection)
    repeated = [] if chosen is None else [read_run(directory, r) for r in experiment.repetitions(chosen.run)]
    runs = () if chosen is None else (chosen, *(result for result in repeated if result.finished))
    all_diverged = all(result.diverged for result in candidates)
    diverged = candidates if all_diverged else tuple(result for result in repeated if result.diverged)
    return ArmResult(name, experiment.label(name), candidates, chosen, runs, diverged)


def write_record(directory: Path, record: "ExperimentRecord") -> None:
    """Write the record of an experiment into its directory."""
    write_whole(directory / RECORD, record.model_dump_json(indent=2) + "\n")


def read_results(directory: Path) -> Results:
    """Read an experiment's directory; DataError if it is none."""
    path = directory / RECORD
    if not path.is_file():
        raise DataError(
            f"{directory}: holds no {RECORD}; name a directory that `switchmamba experiment run` wrote"
        )
    try:
        record: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON: {error}; restore it from a copy") from None
    try:
        valid = validate(ExperimentRecord, record, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; it is damaged or of another version: restore it from a copy") from None
    arms = tuple(read_arm(valid.experiment, directory, name) for name in valid.experiment.arms)
    return Results(directory, valid, arms)


def require_room(directory: Path, resume: bool) -> None:
    """Refuse a directory that is in use, unless the experiment in it is to be continued."""
    if directory.is_dir() and any(directory.iterdir()):
        if not resume:
            raise ConfigError(
                f"{directory} is not empty; continue it with --resume, or name another directory"
            )
        if not (directory / RECORD).is_file():
            raise ConfigError(f"{directory} is not empty and holds no experiment; name another directory")
    elif directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; name another one")
