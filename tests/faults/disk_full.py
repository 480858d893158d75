"""A disk that fills at random moments of a run: one clear error, and every step published before stays.

    python -m tests.faults.disk_full --cases 100

The disk is a limit on the size of files (RLIMIT_FSIZE), which fails the same calls as a full one.
"""

import argparse
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchmamba.checkpoint import newest_valid, step_directories, verify_directory
from switchmamba.errors import SwitchMambaError
from switchmamba.training.trainer import train
from tests.training.tiny_run import prepare_tiny_data, tiny_config

SMALLEST, LARGEST = 500, 200_000
"""Less and more than any file of the tiny run, bytes."""


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def try_cases(directory: Path, cases: int, seed: int) -> Counter[str]:
    """Resume a run of 3 steps on disks of random size; count what ran full. Fails at the first broken promise."""
    data = prepare_tiny_data(directory)
    generator = random.Random(seed)
    base = directory / "base"
    train(tiny_config(("training.steps", 3)), data, base)
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        run = directory / f"run-{case}"
        shutil.copytree(base, run)
        asynchronous = ("training.asynchronous_checkpoints", case % 2 == 1)
        config = tiny_config(("training.steps", 6), ("training.checkpoint_every", 2), asynchronous)
        with small_disk(int(SMALLEST * (LARGEST / SMALLEST) ** generator.random())):
            try:
                train(config, data, run, resume=True)
                outcome = "were large enough"
            except SwitchMambaError as error:
                assert "File too large" in str(error), error
                outcome = f"ran full at {run_part(error, run)}"
                verify_directory(run / "checkpoints" / "step-3")
        outcomes[outcome] += 1
        assert newest_valid(run) == step_directories(run / "checkpoints")[-1]
        train(config, data, run, resume=True)  # with room again, it goes on
        assert newest_valid(run).name == "step-6"
        shutil.rmtree(run)
    return outcomes


def run_part(error: SwitchMambaError, run: Path) -> str:
    """Say which part of the run the error names."""
    for part in ("checkpoints", "metrics.jsonl", "config.json"):
        if str(run / part) in str(error):
            return part
    raise AssertionError(f"the error does not name a file: {error}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        outcomes = try_cases(Path(directory), arguments.cases, arguments.seed)
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{count} disks {outcome}\n")


if __name__ == "__main__":
    main()
