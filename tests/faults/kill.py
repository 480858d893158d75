"""SIGKILL at random moments of training and saving, then resume: the end must equal an uninterrupted run bit for bit.

    python -m tests.faults.kill --kills 1000
    python -m tests.faults.kill --kills 200 --gently

Each trainer is a fresh process, forked from a server that has torch imported. It is killed after a random time, counted
from its start, so that loading is hit, from its first step, or from the beginning of a save; the next one
resumes. A run that gets to its end is compared with the reference, and a new one begins. With ``--gently``
the signal is SIGTERM, and the trainer must exit with 0 and a checkpoint of the last step it logged.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from switchmamba.checkpoint import newest_valid
from switchmamba.config import Tables, validate
from tests.training.tiny_run import assert_same_run, prepare_tiny_data, read_lines, tiny_tables

SETTINGS = (("training.checkpoint_every", 1), ("training.steps", 24))
"""Saving after every step, so that many of the kills fall into it."""

PRELOADED = ["switchmamba.training.trainer", "torch._dynamo"]
"""What every trainer would spend seconds importing (torch's optimizers import the second)."""


class Announce:
    """An observer that tells the parent when training begins."""

    def __init__(self, began: Connection) -> None:
        self.began = began

    def start(self, step: int, steps: int) -> None:
        """Send where training begins and ends."""
        self.began.send((step, steps))

    def show(self, line: Mapping[str, Any]) -> None:
        """Ignore the step."""


def run_training(tables: Tables, data: Path, out: Path, began: Connection) -> None:
    """Train or resume in this process; bits depend on the number of threads, so it is one."""
    import torch

    from switchmamba.training.config import RunConfig
    from switchmamba.training.trainer import train

    torch.set_num_threads(1)
    train(validate(RunConfig, tables, "tiny"), data, out, resume=True, observer=Announce(began))


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: trainers that were killed or stopped before their end.
        while_saving: of the killed ones, how many left a partial directory behind.
        kills_per_run: kills survived by each run that came to its end, equal to the reference.
    """

    kills: int = 0
    while_saving: int = 0
    kills_per_run: list[int] = field(default_factory=list)


class Executioner:
    """Starts trainers of one run and kills them.

    Args:
        directory: where data and runs are put.
        seed: of the moments of death.
        settings: changes to the configuration that must not change the result.
    """

    def __init__(self, directory: Path, seed: int, *settings: tuple[str, Any]) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._generator = random.Random(seed)
        self._tables = tiny_tables(*SETTINGS, *settings)
        self._data = prepare_tiny_data(directory)
        self._reference = directory / "reference"
        self._run = directory / "run"
        self._older: set[str] = set()
        self.tally = Tally()
        self._loading, self._training = self._measure(directory / "warm-up")
        self._loading, self._training = self._measure(self._reference)

    def _start(self, out: Path) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run_training, args=(self._tables, self._data, out, theirs))
        process.start()
        theirs.close()
        return process, ours

    def _measure(self, out: Path) -> tuple[float, float]:
        start = perf_counter()
        process, began = self._start(out)
        began.recv()
        loaded = perf_counter()
        process.join()
        assert process.exitcode == 0
        return loaded - start, perf_counter() - loaded

    def kill(self, kills: int) -> Tally:
        """Kill until ``kills`` have died; then let the last run end."""
        while self.tally.kills < kills or self._run.exists():
            self._live_and_die(mercy=self.tally.kills >= kills)
        return self.tally

    def stop(self, stops: int) -> Tally:
        """Ask trainers to stop, ``stops`` times; then let the last run end."""
        while self.tally.kills < stops or self._run.exists():
            process, began = self._start(self._run)
            began.recv()
            if self.tally.kills < stops:
                process.join(self._generator.uniform(0, self._training / 8))
                process.terminate()
            process.join()
            assert process.exitcode == 0, f"a trainer answered SIGTERM with {process.exitcode}"
            steps = [line["step"] for line in read_lines(self._run)]
            newest = newest_valid(self._run)
            assert newest.name == f"step-{len(steps)}", f"logged {len(steps)} steps, saved {newest.name}"
            if len(steps) == self._tables["training"]["steps"]:
                self._compare()
            else:
                self.tally.kills += 1
        return self.tally

    def _live_and_die(self, mercy: bool) -> None:
        self._older = self._leftovers()
        process, began = self._start(self._run)
        if mercy:
            process.join()
        else:
            self._await_moment(process, began)
        process.kill()
        process.join()
        began.close()
        if process.exitcode == 0:
            self._compare()
        else:
            assert process.exitcode == -9, f"a trainer failed with {process.exitcode}"
            self.tally.kills += 1
            self.tally.while_saving += self._is_saving()

    def _await_moment(self, process: Any, began: Connection) -> None:
        """Return at a random moment of loading, of training, or of a save."""
        moment = self._generator.choices(("loading", "training", "saving"), weights=(1, 2, 2))[0]
        if moment == "loading":
            process.join(self._generator.uniform(0, self._loading))
            return
        began.poll(60)
        # Squared: many kills survive a whole run only if most come early.
        process.join(self._generator.random() ** 2 * self._training)
        if moment == "saving":
            while process.is_alive() and not self._is_saving():
                sleep(0.0005)
            process.join(self._generator.uniform(0, 0.01))

    def _is_saving(self) -> bool:
        """Say whether there is a partial directory that no earlier trainer left."""
        return not self._leftovers().issubset(self._older)

    def _leftovers(self) -> set[str]:
        return {path.name for path in (self._run / "checkpoints").glob("*.tmp-*")}

    def _compare(self) -> None:
        damaged = list((self._run / "checkpoints").glob("*.damaged-*"))
        assert not damaged, f"a kill damaged {damaged}, which was published"
        assert_same_run(self._run, self._reference)
        self.tally.kills_per_run.append(self.tally.kills - sum(self.tally.kills_per_run))
        shutil.rmtree(self._run)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--gently", action="store_true", help="SIGTERM instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            setting = ("training.asynchronous_checkpoints", asynchronous)
            executioner = Executioner(Path(directory), arguments.seed, setting)
            end = executioner.stop if arguments.gently else executioner.kill
            tally = end(arguments.kills // 2)
        mode = "asynchronous" if asynchronous else "synchronous"
        sys.stdout.write(
            f"{mode} checkpoints: {tally.kills} kills, {tally.while_saving} of them while saving; "
            f"{len(tally.kills_per_run)} runs came to their end, each equal to the uninterrupted one\n"
        )


if __name__ == "__main__":
    main()
