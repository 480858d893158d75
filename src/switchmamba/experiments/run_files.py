"""Which files a run of an experiment has, and how far they say it has come.

DIR/runs/<run name>/         a run directory, as ``switchmamba train`` writes it
DIR/runs/<run name>.log      what the run said
DIR/analysis/<run name>.json what a finished run's model was asked (``analysis.py``)
"""

import json
import shutil
from pathlib import Path

from switchmamba.checkpoint import remove_directory, remove_partial_directories
from switchmamba.errors import DataError
from switchmamba.experiments.spec import Run


def run_directory(directory: Path, run: Run) -> Path:
    """Return where a run of the experiment in ``directory`` lives."""
    return directory / "runs" / run.name


def log_path(directory: Path, run: Run) -> Path:
    """Return the file with what the run said."""
    return run_directory(directory, run).with_name(f"seed={run.seed}.log")


def analysis_path(directory: Path, run: Run) -> Path:
    """Return where the answers of a run's model are kept."""
    return directory / "analysis" / f"{run.name}.json"


def analysed_step(directory: Path, run: Run) -> int:
    """Return the step at which a run's model was asked; −1 if it was not."""
    path = analysis_path(directory, run)
    if not path.is_file():
        return -1
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not an analysis; remove it to have it made again") from None


def is_analysed(directory: Path, run: Run) -> bool:
    """Tell whether the newest of a run that stands was asked."""
    step = analysed_step(directory, run)
    saved = saved_step(run_directory(directory, run))
    return step >= 0 and saved in (-1, step)


def adopt(source: Path, run: Run, directory: Path, twin: Run) -> None:
    """Copy what a run of one experiment left, checkpoints apart, to its twin in another, as if it had run there.

    What makes the twin a settled run, log and analysis, comes last: half a copy is an unfinished run.
    """
    here, there = run_directory(source, run), run_directory(directory, twin)
    remove_checkpoints(there)  # of a part of it that ran there
    for name in ("config.json", "metrics.jsonl"):
        _copy_whole(here / name, there / name)
    for old, new in (
        (log_path(source, run), log_path(directory, twin)),
        (analysis_path(source, run), analysis_path(directory, twin)),
    ):
        if old.is_file():
            _copy_whole(old, new)


def _copy_whole(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    shutil.copyfile(source, partial)
    partial.replace(target)


def remove_checkpoints(run_directory: Path) -> None:
    """Remove a run's checkpoints; whoever kills the process leaves all of them, or none that anyone finds."""
    remove_partial_directories(run_directory, "checkpoints")
    if (run_directory / "checkpoints").is_dir():
        remove_directory(run_directory / "checkpoints")


def saved_step(run_directory: Path) -> int:
    """Return the step of the newest checkpoint that was published; −1 if there is none."""
    names = [path.name.removeprefix("step-") for path in (run_directory / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def last_error(path: Path) -> str | None:
    """Return the last line of a log that starts with ``error:``, without that word."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next(
        (line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None
    )


def write_whole(path: Path, text: str) -> None:
    """Write or replace a file; whoever kills the process leaves the old one or the new one."""
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
