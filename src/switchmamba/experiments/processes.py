"""The processes that an experiment runs in: which command each is, where it may run, and how it ends.

A run is ``python -m switchmamba train PRESET --data DATA --out DIR --resume …``, what it is asked afterwards is
``python -m switchmamba experiment analyse DIR --run NAME``; so what an experiment does can be done by hand. The
processes are watched through the files they write.
"""

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from switchmamba.experiments.environment import available_cores
from switchmamba.experiments.results import read_run
from switchmamba.experiments.run_files import is_analysed, last_error, log_path, run_directory
from switchmamba.experiments.spec import Run

logger = logging.getLogger("switchmamba")

GRACE_SECONDS = 60
"""How long a run may take to save itself when it is asked to stop."""

Work = Literal["train", "analyse"]


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time: some threads, or a GPU.

    Attributes:
        environment: what the run's process sees besides our own environment.
        threads: CPU threads of the process.
        gpu: a GPU's: a finished run is analysed there while the next one starts, which keeps the host busy and not it.
    """

    environment: Mapping[str, str]
    threads: int
    gpu: bool = False


@dataclass(frozen=True)
class Place:
    """One run of one experiment: where that lives, the data it is run on, the run."""

    directory: Path
    data: str
    run: Run

    @property
    def path(self) -> Path:
        """The run's own directory, a name for the place too."""
        return run_directory(self.directory, self.run)


def train_arguments(run: Run, data: str, out: str, threads: int) -> list[str]:
    """Return the arguments of ``switchmamba`` that train a run, or continue it."""
    places = ["--data", data, "--out", out, "--threads", str(threads), "--resume"]
    return ["train", run.preset, *places, *run.arguments()]


def train_command(run: Run, data: str, out: str, threads: int) -> str:
    """Return the same as a line for a shell."""
    return shlex.join(["switchmamba", *train_arguments(run, data, out, threads)])


SLEEPING_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Lets torch's threads sleep while they wait: spinning, they take cores from the scan's own and from neighbours."""


def cpu_slots(count: int, threads: int) -> list[Slot]:
    """Return ``count`` slots of ``threads`` CPU threads each."""
    return [Slot(SLEEPING_THREADS, threads)] * count


def gpu_slots(devices: Iterable[int], threads: int) -> list[Slot]:
    """Return one slot for each GPU that is named, by its number among those that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else None
    return [
        Slot({"CUDA_VISIBLE_DEVICES": str(d) if names is None else names[d].strip()}, threads, gpu=True)
        for d in devices
    ]


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


@dataclass
class _Child:
    place: Place
    work: Work
    slot: int
    process: subprocess.Popen[bytes]


@dataclass
class Processes:
    """Those that run now; leaving the context asks them to save and end, then ends them.

    Attributes:
        program: the command line of this project.
        slots: room; one process in each.
        running: by the path of their run.
        trained, analysed: paths of runs whose process has ended, however it did.
    """

    program: Sequence[str]
    slots: Sequence[Slot]
    running: dict[Path, _Child] = field(default_factory=dict)
    trained: set[Path] = field(default_factory=set)
    analysed: set[Path] = field(default_factory=set)
    _stopping: bool = False

    def has_room(self, work: Work) -> bool:
        """Tell whether one more may start now."""
        return bool(self._free(work))

    def _free(self, work: Work) -> list[int]:
        """Return the slots that such a process may take: on a GPU one of each kind, elsewhere one of any."""
        taken = {c.slot for c in self.running.values() if c.work == work or not self.slots[c.slot].gpu}
        return [number for number in range(len(self.slots)) if number not in taken]

    def start(self, place: Place, work: Work) -> None:
        """Start or resume a run, or ask a finished one, in a free slot."""
        assert place.path not in self.running
        number = self._free(work)[0]
        slot = self.slots[number]
        log = log_path(place.directory, place.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        if work == "train":
            arguments = train_arguments(place.run, place.data, str(place.path), slot.threads)
        else:
            arguments = ["experiment", "analyse", str(place.directory), "--run", place.run.name]
            arguments += ["--threads", str(slot.threads)]
        with log.open("wb" if work == "train" else "ab") as output:
            process = subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | slot.environment,
                start_new_session=True,  # Ctrl-C on our terminal is ours to pass on
            )
        logger.debug("started to %s %s as process %d", work, place.path, process.pid)
        self.running[place.path] = _Child(place, work, number, process)

    def collect(self) -> list[tuple[Place, Work]]:
        """Take note of the processes that have ended, and return what they were."""
        gone = [child for child in self.running.values() if child.process.poll() is not None]
        for child in gone:
            del self.running[child.place.path]
            if child.work == "train":
                self.trained.add(child.place.path)
                finished = read_run(child.place.directory, child.place.run).finished
                _note_silent_end(child, finished, self._stopping)
            elif not self._stopping:  # asked to stop it has not failed: it is asked again another time
                self.analysed.add(child.place.path)
                analysed = is_analysed(child.place.directory, child.place.run)
                _note_silent_end(child, analysed, self._stopping)
        return [(child.place, child.work) for child in gone]

    def stop(self) -> None:
        """Ask all to save and end; once."""
        if not self._stopping:
            for child in self.running.values():
                child.process.send_signal(signal.SIGTERM)
        self._stopping = True

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
    """Leave an error line in the log of a process that ended early without one: killed, or stopped by somebody else."""
    log = log_path(child.place.directory, child.place.run)
    if finished or asked or last_error(log) is not None:
        return
    code = child.process.returncode
    what = "step" if child.work == "train" else "answer"
    reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} before its last {what}"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\nerror: {reason}; run the experiment again with --resume\n")
