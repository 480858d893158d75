"""Runs experiments: several runs at a time, started, watched, resumed and stopped here.

Several experiments share the slots, the first ones first. A run that stands in two of them, with the same
configuration and data, is trained once; the other experiment gets a copy of what it logged. A run that has
finished is asked at once what reports want to know of its model, while its checkpoint is there.
"""

import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from switchmamba.config import apply_overrides, validate
from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.experiments.curves import Tail
from switchmamba.experiments.processes import Place, Processes, Slot
from switchmamba.experiments.results import (
    RECORD,
    ExperimentRecord,
    due_runs,
    read_results,
    read_run,
    write_record,
)
from switchmamba.experiments.run_files import (
    adopt,
    is_analysed,
    last_error,
    log_path,
    remove_checkpoints,
    run_directory,
)
from switchmamba.experiments.spec import Experiment, Run
from switchmamba.models.presets import read_tables
from switchmamba.training.config import RunConfig, differences
from switchmamba.training.stop import stop_on_signals

logger = logging.getLogger("switchmamba")

POLL_SECONDS = 0.25

MOST_NAMED = 4
"""Runs that a warning names."""

AND_LATER = "; and later "
"""Stands in a record between what an experiment ran on first and what it went on with."""

State = Literal["waiting", "running", "analysing", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment.

    Attributes:
        run: which.
        name: how it is called: its name, after its experiment's where there are several.
        state: "waiting" is also a run that was stopped and can continue, or that another experiment trains.
        steps: how many it is to take.
        line: the last line of its ``metrics.jsonl``; None before the first.
        validation_loss: the last one measured.
    """

    run: Run
    name: str
    state: State
    steps: int
    line: Mapping[str, Any] | None
    validation_loss: float | None


Observe = Callable[[Sequence[RunStatus]], None]
"""Called a few times a second with all runs that can be named so far."""


def resolve_run(run: Run) -> RunConfig:
    """Return the configuration that a run asks for; ConfigError names the run and what is wrong with it."""
    tables = apply_overrides(read_tables(run.preset), run.overrides)
    return validate(RunConfig, tables, f"run {run.name} ({run.preset})")


def run_experiment(record: ExperimentRecord, directory: Path, slots: Sequence[Slot], **options: Any) -> bool:
    """Run or resume one experiment; see :func:`run_experiments`."""
    return run_experiments([(record, directory)], slots, **options)


def run_experiments(
    experiments: Sequence[tuple[ExperimentRecord, Path]],
    slots: Sequence[Slot],
    *,
    observe: Observe,
    keep_going: bool = True,
    arms: Collection[str] | None = None,
    analyse: bool = False,
    discard_checkpoints: bool = False,
    program: Sequence[str] = (sys.executable, "-m", "switchmamba"),
) -> bool:
    """Run or resume experiments until every run that their searches call for has finished.

    Args:
        experiments: each with what is to be remembered of how it was made, and where it lives; finished runs there are
            kept, half-finished ones continue.
        slots: room for runs; one runs in each.
        observe: told how things stand.
        keep_going: after a failure, whether runs that do not depend on it still start.
        arms: train these alone, by name; the others wait for another time. None: all.
        analyse: ask each finished run for what reports show of its model (``analysis.py``).
        discard_checkpoints: remove a run's checkpoints once it was asked; large models would fill the disk.
        program: the command line of this project; tests put another in its place.

    Returns False if it was stopped by SIGTERM or Ctrl-C; all running runs have then saved themselves.
    Raises :class:`SwitchMambaError` with each failed run's last error, at the end; a run that diverges is
    no failure but an outcome: see :func:`require_choices`.
    """
    for record, directory in experiments:
        _check(record, directory)
    failed: list[_Entry] = []
    with ExitStack() as stack:
        for _, directory in experiments:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_claimed(directory))
        records = {}
        for record, directory in experiments:
            _check(record, directory)  # again: another process may have ended since
            _warn_of_others(record.experiment, directory)
            records[directory] = _Record(record, directory)
        stop = stack.enter_context(stop_on_signals())
        processes = stack.enter_context(Processes(program, slots))
        board = _Board(experiments, processes, arms, analyse, discard_checkpoints)
        while True:
            if processes.collect():
                board.refresh()
            failed = [entry for entry in board.entries if entry.failed(processes)]
            halt = stop.requested or (failed and not keep_going)
            ready = [] if halt else board.ready()
            if halt:
                processes.stop()
            for entry, work in ready:
                if processes.has_room(work):
                    if work == "train":
                        records[entry.place.directory].note_where_it_runs()
                    processes.start(entry.place, work)
            observe(
                [entry.status(processes) for entry in board.entries if entry.wanted or entry.begun(processes)]
            )
            if not processes.running and not ready:
                break
            time.sleep(POLL_SECONDS)
    if failed:
        raise SwitchMambaError(_failures(failed))
    return not stop.requested


@dataclass
class _Entry:
    """A run, and how it stands on the disk."""

    place: Place
    name: str
    config: RunConfig
    tail: Tail
    wanted: bool = True
    state: State = "waiting"
    analysed: bool = False
    kept_step: int = -1

    @cached_property
    def identity(self) -> str:
        """The same for runs that would come out the same."""
        told = {"config": self.config.model_dump(mode="json"), "data": self.place.data}
        return json.dumps(told, sort_keys=True)

    def refresh(self) -> None:
        if self.state == "finished" and self.analysed:
            return
        result = read_run(self.place.directory, self.place.run)
        if result.finished:
            self.state = "finished"
        elif result.diverged:
            self.state = "diverged"
        else:
            self.state = "failed" if result.failure is not None else "waiting"
        self.analysed = is_analysed(self.place.directory, self.place.run)
        self.kept_step = result.kept_step

    def failed(self, processes: Processes) -> bool:
        """Tell whether its process has ended here without doing its work."""
        path = self.place.path
        if path in processes.analysed and not self.analysed:
            return True
        return path in processes.trained and self.state == "failed"

    def begun(self, processes: Processes) -> bool:
        """Tell whether its training was started here."""
        return self.place.path in processes.trained | processes.running.keys()

    def status(self, processes: Processes) -> RunStatus:
        self.tail.read()
        child = processes.running.get(self.place.path)
        running: State = self.state if child is None else "running" if child.work == "train" else "analysing"
        steps = self.config.training.steps
        return RunStatus(self.place.run, self.name, running, steps, self.tail.line, self.tail.validation_loss)


@dataclass
class _Board:
    """Which runs can be named now, and how they stand on the disk; read again whenever a process has ended."""

    experiments: Sequence[tuple[ExperimentRecord, Path]]
    processes: Processes
    arms: Collection[str] | None
    analyse: bool
    discard_checkpoints: bool
    entries: list[_Entry] = field(default_factory=list)
    _known: dict[Path, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Read everything again: a search that has come to its end names further runs."""
        self._read()
        owners, adopted = self._owners(), False
        for entry in self.entries:
            if entry.place.path in self.processes.running:
                continue  # its files are still in use
            owner = owners[entry.place.path]
            settled = owner.state == "diverged" or (owner.state == "finished" and owner.analysed)
            if owner is not entry and settled and entry.state not in ("finished", "diverged"):
                adopt(owner.place.directory, owner.place.run, entry.place.directory, entry.place.run)
                adopted = True
            if self.discard_checkpoints and entry.state == "finished" and entry.analysed:
                remove_checkpoints(entry.place.path)
        if adopted:
            self.refresh()  # a search may have come to its end by it

    def ready(self) -> list[tuple[_Entry, Any]]:
        """Return what is to be started, of what was not begun by this process: first what waits for a slot only."""
        owners = self._owners()
        wanted = {owners[entry.place.path].place.path for entry in self.entries if entry.wanted}
        idle = [entry for entry in self.entries if entry.place.path not in self.processes.running]
        analyses = [
            (entry, "analyse")
            for entry in idle
            if self.analyse
            and entry.state == "finished"
            and not entry.analysed
            and entry.place.path not in self.processes.analysed
        ]
        runs = [
            (entry, "train")
            for entry in idle
            if entry.place.path in wanted
            and entry.state in ("waiting", "failed")
            and entry.place.path not in self.processes.trained
            and owners[entry.place.path] is entry
        ]
        return [*analyses, *runs]

    def _read(self) -> None:
        self.entries = []
        for record, directory in self.experiments:
            for run in due_runs(record.experiment, directory):
                place = Place(directory, record.data, run)
                if place.path not in self._known:
                    name = run.name if len(self.experiments) == 1 else f"{record.experiment.name}/{run.name}"
                    tail = Tail(place.path / "metrics.jsonl")
                    wanted = self.arms is None or run.arm in self.arms
                    self._known[place.path] = _Entry(place, name, resolve_run(run), tail, wanted)
                entry = self._known[place.path]
                entry.refresh()
                self.entries.append(entry)

    def _owners(self) -> Mapping[Path, _Entry]:
        """For each run that which is trained in its stead, of those that would come out the same: one that has ended
        or was begun here, or else has come furthest, the first named of equals. Itself where runs are not analysed,
        since only its checkpoint then stands for it.
        """
        if not self.analyse:
            return {entry.place.path: entry for entry in self.entries}

        def rank(entry: _Entry) -> tuple[bool, bool, bool, int]:
            # A search that ends later may name the twin of a run that is on its way, and stand before it.
            begun = entry.begun(self.processes)
            return entry.state == "finished", entry.state == "diverged", begun, entry.kept_step

        best: dict[str, _Entry] = {}
        for entry in self.entries:
            if rank(entry) > rank(best.setdefault(entry.identity, entry)):
                best[entry.identity] = entry
        return {entry.place.path: best[entry.identity] for entry in self.entries}


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Hold an experiment's directory: a second process would start the same runs."""
    held = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{directory} is being run by another process; wait for it, or name another --out"
            ) from None
        yield
    finally:
        os.close(held)


class _Record:
    """The record in an experiment's directory; where its runs ran before stands beside where they run now."""

    def __init__(self, record: ExperimentRecord, directory: Path) -> None:
        """Write it; of another machine's runs their hardware and software stay, and what is known of their text."""
        self._record, self._directory = record, directory
        self._before = read_results(directory).record if (directory / RECORD).is_file() else None
        if self._before is not None:
            self._record = record.model_copy(update={"corpus_sha256": self._before.corpus_sha256})
        before = self._before or record
        self._write(before.hardware, before.software)

    def note_where_it_runs(self) -> None:
        """Add the hardware and software of here, because a run starts."""
        if self._before is not None:
            self._write(
                _joined(self._before.hardware, self._record.hardware),
                _joined(self._before.software, self._record.software),
            )

    def _write(self, hardware: str, software: str) -> None:
        write_record(
            self._directory, self._record.model_copy(update={"hardware": hardware, "software": software})
        )


def _joined(before: str, now: str) -> str:
    return before if now in before.split(AND_LATER) else f"{before}{AND_LATER}{now}"


def _check(record: ExperimentRecord, directory: Path) -> None:
    """Validate every run that can be named before any starts, and that those in ``directory`` are what is asked for."""
    experiment = record.experiment
    _refuse_another_experiment(record, directory)
    _refuse_other_settings(experiment, directory)
    for run in due_runs(experiment, directory):
        training = resolve_run(run).training
        if training.validate_every == 0:
            raise ConfigError(
                f"run {run.name}: training.validate_every = 0 measures no held-out loss; set it above 0"
            )
        begun = read_run(directory, run).planned_steps
        if begun not in (None, training.steps):
            raise ConfigError(
                f"run {run.name} in {directory} was begun with training.steps = {begun}, the experiment asks for "
                f"{training.steps}; give it the same, or another --out"
            )


def _refuse_another_experiment(record: ExperimentRecord, directory: Path) -> None:
    """Refuse to go on in the directory of another experiment, or of other text: its report would mix the two."""
    if not (directory / RECORD).is_file():
        return
    before = read_results(directory).record
    if before.experiment.name != record.experiment.name:
        raise ConfigError(
            f"{directory} holds experiment {before.experiment.name}, not {record.experiment.name}; give another --out"
        )
    if before.corpus != record.corpus:
        _refuse_text(
            directory, record, f"there {_without_head(before.corpus)}, here {_without_head(record.corpus)}"
        )
    if before.corpus_sha256 not in (None, record.corpus_sha256):
        _refuse_text(
            directory,
            record,
            "as much, but in another order (files are read in that of their names), in other shards, or changed",
        )


def _refuse_text(directory: Path, record: ExperimentRecord, how: str) -> NoReturn:
    raise ConfigError(
        f"the runs in {directory} read other text than --data {record.data}, which does not compare: {how}; "
        "give the same data, or another --out"
    )


def _without_head(corpus: str) -> str:
    return corpus.removeprefix("Text: ").rstrip(".")


def _warn_of_others(experiment: Experiment, directory: Path) -> None:
    """Name runs in ``directory`` that the experiment does not ask for, such as those of seeds that it no longer has."""
    root = directory / "runs"
    asked = {run_directory(directory, run) for run in due_runs(experiment, directory)}
    others = [path.parent for path in sorted(root.rglob("config.json")) if path.parent not in asked]
    if others:
        names = ", ".join(path.relative_to(root).as_posix() for path in others[:MOST_NAMED])
        logger.warning(
            "%d of the runs in %s are of arms, points or seeds that %s does not ask for now, so the report leaves "
            "them out: %s%s",
            len(others),
            directory,
            experiment.name,
            names,
            ", …" if len(others) > MOST_NAMED else "",
        )


def _refuse_other_settings(experiment: Experiment, directory: Path) -> None:
    """Refuse to go on with a run that was begun with other settings than the experiment has for it now."""
    if not (directory / RECORD).is_file():
        return
    before = read_results(directory).experiment
    begun = {
        run.name: run for run in due_runs(before, directory) if read_run(directory, run).config is not None
    }
    for run in due_runs(experiment, directory):
        if run.name not in begun:
            continue
        old, new = (resolve_run(r).model_dump(mode="json") for r in (begun[run.name], run))
        different = differences(old, new)
        if different:
            raise ConfigError(
                f"run {run.name} in {directory} was begun with other settings: {', '.join(different)}; ask for the "
                "same (--set too), or give another --out"
            )


def _failures(failed: Sequence[_Entry]) -> str:
    logs = [(entry.name, log_path(entry.place.directory, entry.place.run)) for entry in failed]
    reasons = [f"{name}: {last_error(log)} (see {log})" for name, log in logs]
    return f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed; {'; '.join(reasons)}"


def require_choices(directory: Path) -> None:
    """Raise SwitchMambaError if an arm has no result, because every run of its search diverged."""
    for arm in read_results(directory).arms:
        if not arm.runs and arm.diverged:
            raise SwitchMambaError(
                f"arm {arm.name}: every run of its search diverged, so it has no result; try lower learning rates, "
                "added to its sweep with --resume, or else in another --out"
            )
