"""An experiment without its weights: what reports need and what shows which runs are finished, small enough to commit.

Curves are thinned: of a run's steps those that were validated and at most :data:`LINES` others stay, of the routers'
loads at most :data:`LOADS`, to four decimals. Everything that is read from ``metrics.jsonl`` elsewhere works on it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from switchmamba.experiments.curves import read_lines
from switchmamba.experiments.results import (
    RECORD,
    RunResult,
    analysis_path,
    due_runs,
    is_analysed,
    log_path,
    read_results,
    read_run,
    run_directory,
    write_whole,
)

LINES = 250
"""Steps of a run that stay: as many as a plot can show."""

LOADS = 12
"""Steps whose routers' loads stay."""

_KEPT = ("step", "tokens", "loss", "loss_ema", "tokens_per_second", "peak_memory", "validation_loss")
_DIGITS = 6


def archive(directory: Path, out: Path) -> tuple[list[str], list[str]]:
    """Write ``out`` from the experiment in ``directory``; return the names of the runs it took, and of those left out.

    Left out are runs that have not diverged and have not finished, or were not analysed: without weights only its
    analysis says that a run is whole. What ``out`` already holds of them stays.
    """
    results = read_results(directory)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / RECORD, out / RECORD)
    taken, left_out = [], []
    for result in [read_run(directory, run) for run in due_runs(results.experiment, directory)]:
        if result.diverged or (result.finished and is_analysed(directory, result.run)):
            _archive_run(result, directory, out)
            taken.append(result.run.name)
        else:
            left_out.append(result.run.name)
    return taken, left_out


def _archive_run(result: RunResult, directory: Path, out: Path) -> None:
    place = run_directory(out, result.run)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(result.directory / "config.json", place / "config.json")
    lines = thinned(read_lines(result.directory / "metrics.jsonl"))
    write_whole(place / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if result.diverged:
        shutil.copyfile(log_path(directory, result.run), log_path(out, result.run))
    analysis = analysis_path(directory, result.run)
    if analysis.is_file():
        path = analysis_path(out, result.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(analysis, path)


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the lines of every so-manieth step, those with a held-out loss and the last, and of them what is read.

    Which steps stay depends on the last one alone: what is thin already stays as it is.
    """
    last = lines[-1]["step"] if lines else 0
    every, every_load = max(1, -(-last // LINES)), max(1, -(-last // LOADS))
    kept = []
    for line in lines:
        step = line["step"]
        load = step % every_load == 0 or step == last
        if not (load or step % every == 0 or line.get("validation_loss") is not None):
            continue
        short: dict[str, Any] = {name: _short(line[name]) for name in _KEPT if line.get(name) is not None}
        if load and line.get("routers"):
            short["routers"] = [{"fraction": [round(f, 4) for f in r["fraction"]]} for r in line["routers"]]
        kept.append(short)
    return kept


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
