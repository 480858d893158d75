"""Runs an experiment: each run a process of its own, several at a time, started, watched, resumed and stopped here.

A run is ``python -m switchmamba train PRESET --data DATA --out DIR --resume …``, so what an experiment does
can be done by hand, and a run that is interrupted continues bit for bit. The processes are watched through
the files they write.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from switchmamba.config import apply_overrides, validate
from switchmamba.errors import ConfigError, SwitchMambaError
from switchmamba.experiments.curves import parse_line
from switchmamba.experiments.environment import available_cores
from switchmamba.experiments.results import (
    ExperimentRecord,
    due_runs,
    last_error,
    log_path,
    read_run,
    run_directory,
    write_record,
)
from switchmamba.experiments.spec import Experiment, Run
from switchmamba.models.presets import read_tables
from switchmamba.training.config import RunConfig
from switchmamba.training.stop import stop_on_signals

logger = logging.getLogger("switchmamba")

POLL_SECONDS = 0.25
GRACE_SECONDS = 60
"""How long a run may take to save itself when it is asked to stop."""


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time: some threads, or a GPU.

    Attributes:
        environment: what the run's process sees besides our own environment.
        threads: CPU threads of the process.
    """

    environment: Mapping[str, str]
    threads: int


State = Literal["waiting", "running", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment.

    Attributes:
        run: which.
        state: "waiting" is also a run that was stopped and can continue.
        steps: how many it is to take.
        line: the last line of its ``metrics.jsonl``; None before the first.
        validation_loss: the last one measured.
    """

    run: Run
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


def train_arguments(run: Run, data: str, out: str, threads: int) -> list[str]:
    """Return the arguments of ``switchmamba`` that train a run, or continue it."""
    places = ["--data", data, "--out", out, "--threads", str(threads), "--resume"]
    return ["train", run.preset, *places, *run.arguments()]


def train_command(run: Run, data: str, out: str, threads: int) -> str:
    """Return the same as a line for a shell."""
    return shlex.join(["switchmamba", *train_arguments(run, data, out, threads)])


def cpu_slots(count: int, threads: int) -> list[Slot]:
    """Return ``count`` slots of ``threads`` CPU threads each."""
    # Cores are divided among the runs: an idle thread that spins would take them from a neighbour.
    return [Slot({"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}, threads)] * count


def gpu_slots(devices: Iterable[int], threads: int) -> list[Slot]:
    """Return one slot for each GPU that is named."""
    return [Slot({"CUDA_VISIBLE_DEVICES": str(device)}, threads) for device in devices]


def default_slots(parallel: int | None, threads: int | None) -> list[Slot]:
    """Return slots on the GPUs, or, without one, slots that divide this process's cores.

    Args:
        parallel: how many runs at a time; default: one for each GPU, or one for each ``threads`` cores.
        threads: CPU threads of a run; default: the cores divided by ``parallel``, 1 if neither is given.
    """
    import torch

    cores = available_cores()
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        count = parallel or devices
        return gpu_slots([i % devices for i in range(count)], threads or max(1, cores // count))
    if parallel is None:
        return cpu_slots(max(1, cores // (threads or 1)), threads or 1)
    return cpu_slots(parallel, threads or max(1, cores // parallel))


def run_experiment(
    record: ExperimentRecord,
    directory: Path,
    slots: Sequence[Slot],
    *,
    observe: Observe,
    keep_going: bool = True,
    program: Sequence[str] = (sys.executable, "-m", "switchmamba"),
) -> bool:
    """Run or resume an experiment until every run that its search calls for has finished.

    Args:
        record: the experiment and what is to be remembered of how it was made.
        directory: where it lives; finished runs in it are kept, half-finished ones continue.
        slots: room for runs; one runs in each.
        observe: told how things stand.
        keep_going: after a failure, whether runs that do not depend on it still start.
        program: the command line of this project; tests put another in its place.

    Returns False if it was stopped by SIGTERM or Ctrl-C; all running runs have then saved themselves.
    Raises :class:`SwitchMambaError` with each failed run's last error, at the end; a run that diverges is
    no failure but an outcome, unless it is all that an arm has.
    """
    experiment = record.experiment
    _check(experiment)
    directory.mkdir(parents=True, exist_ok=True)
    write_record(directory, record)
    with stop_on_signals() as stop, _Children(program, record.data, directory, slots) as children:
        board = _Board(experiment, directory)
        while True:
            if children.collect():
                board.refresh()
            failed = [
                run for run in board.due if run.name in children.ended and board.states[run.name] == "failed"
            ]
            halt = stop.requested or (failed and not keep_going)
            ready = [] if halt else board.ready(children.running.keys() | children.ended)
            if halt:
                children.stop()
            for run in ready[: children.free]:
                children.start(run)
            observe(children.statuses(board))
            if not children.running and not ready:
                break
            time.sleep(POLL_SECONDS)
    if failed:
        raise SwitchMambaError(_failures(directory, failed))
    if stop.requested:
        return False
    _require_choices(experiment, directory)
    return True


@dataclass
class _Board:
    """Which runs can be named now, and how they stand on the disk; read again whenever a run has ended."""

    experiment: Experiment
    directory: Path
    due: list[Run] = field(default_factory=list)
    states: dict[str, State] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Read everything again: a search that has come to its end names further runs."""
        self.due = due_runs(self.experiment, self.directory)
        self.states = {run.name: _state(self.directory, run) for run in self.due}
        self.steps = {run.name: resolve_run(run).training.steps for run in self.due}

    def ready(self, begun: Collection[str]) -> list[Run]:
        """Return the runs to be started, of those that were not ``begun`` by this process."""
        return [
            run
            for run in self.due
            if self.states[run.name] in ("waiting", "failed") and run.name not in begun
        ]


def _check(experiment: Experiment) -> None:
    """Validate every run of the search before any starts."""
    for run in [run for arm in experiment.arms for run in experiment.candidates(arm)]:
        if resolve_run(run).training.validate_every == 0:
            raise ConfigError(
                f"run {run.name}: training.validate_every = 0 measures no held-out loss; set it above 0"
            )


def _state(directory: Path, run: Run) -> State:
    result = read_run(directory, run)
    if result.finished:
        return "finished"
    if result.diverged:
        return "diverged"
    return "failed" if result.failure is not None else "waiting"


def _failures(directory: Path, failed: Sequence[Run]) -> str:
    reasons = [
        f"{run.name}: {last_error(log_path(directory, run))} (see {log_path(directory, run)})"
        for run in failed
    ]
    return f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed; {'; '.join(reasons)}"


def _require_choices(experiment: Experiment, directory: Path) -> None:
    for arm in experiment.arms:
        candidates = [read_run(directory, run) for run in experiment.candidates(arm)]
        if all(result.diverged for result in candidates):
            raise SwitchMambaError(
                f"arm {arm}: every run of its search diverged; lower the learning rates in the experiment's sweep"
            )


@dataclass
class _Child:
    run: Run
    place: int
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class _Children:
    """The processes; leaving the context asks those that still run to save and end, then ends them."""

    program: Sequence[str]
    data: str
    directory: Path
    slots: Sequence[Slot]
    running: dict[str, _Child] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    _tails: dict[str, "_Tail"] = field(default_factory=dict)
    _stopping: bool = False

    @property
    def free(self) -> int:
        """How many runs may start now."""
        return len(self.slots) - len(self.running)

    def start(self, run: Run) -> None:
        """Start or resume a run in a free slot."""
        taken = {child.place for child in self.running.values()}
        place = next(i for i in range(len(self.slots)) if i not in taken)
        slot = self.slots[place]
        log = log_path(self.directory, run)
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = train_arguments(run, self.data, str(run_directory(self.directory, run)), slot.threads)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | slot.environment,
                start_new_session=True,  # Ctrl-C on our terminal is ours to pass on
            )
        logger.debug("started %s as process %d", run.name, process.pid)
        self.running[run.name] = _Child(run, place, process, log)

    def collect(self) -> bool:
        """Take note of the processes that have ended; return whether there were any."""
        gone = [child for child in self.running.values() if child.process.poll() is not None]
        for child in gone:
            del self.running[child.run.name]
            self.ended.add(child.run.name)
            _note_silent_end(child, read_run(self.directory, child.run).finished, self._stopping)
        return bool(gone)

    def stop(self) -> None:
        """Ask all to save and end; once."""
        if not self._stopping:
            for child in self.running.values():
                child.process.send_signal(signal.SIGTERM)
        self._stopping = True

    def statuses(self, board: _Board) -> list[RunStatus]:
        """Describe all runs of the board."""
        return [self._status(run, board) for run in board.due]

    def _status(self, run: Run, board: _Board) -> RunStatus:
        tail = self._tails.setdefault(run.name, _Tail(run_directory(self.directory, run) / "metrics.jsonl"))
        tail.read()
        state = "running" if run.name in self.running else board.states[run.name]
        return RunStatus(run, state, board.steps[run.name], tail.line, tail.validation_loss)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in self.running.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _note_silent_end(child: _Child, finished: bool, asked: bool) -> None:
    """Leave an error line in the log of a run that ended early without one: killed, or stopped by somebody else."""
    if finished or asked or last_error(child.log) is not None:
        return
    code = child.process.returncode
    reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} before its last step"
    with child.log.open("a", encoding="utf-8") as log:
        log.write(f"\nerror: {reason}; run the experiment again with --resume\n")


class _Tail:
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
