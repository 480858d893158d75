"""An experiment without its weights: what reports need and what shows which runs are finished, small enough to commit.

Curves are thinned: of a run's steps those that were validated, that of its spike and at most :data:`LINES` others
stay, of the routers' loads at most :data:`LOADS`, to four decimals; the last of these is the mean over what reports
call the end of a run, to six. What experts specialise in stays of the runs that a report shows it of. Everything that
is read from ``metrics.jsonl`` elsewhere works on it.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from switchmamba.errors import ConfigError
from switchmamba.experiments.curves import count_at_end, read_lines
from switchmamba.experiments.results import RECORD, RunResult, due_runs, read_results, read_run, require_room
from switchmamba.experiments.run_files import analysis_path, is_analysed, log_path, run_directory, write_whole

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
    _require_its_own(out, directory, results.experiment.name)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(directory / RECORD, out / RECORD)
    shown = {arm.runs[0].run.name for arm in results.arms if arm.runs}
    taken, left_out = [], []
    for result in [read_run(directory, run) for run in due_runs(results.experiment, directory)]:
        name = result.run.name
        if result.diverged or (result.finished and is_analysed(directory, result.run)):
            _archive_run(result, directory, out, with_experts=name in shown)
            taken.append(name)
        else:
            left_out.append(name)
    return taken, left_out


def _require_its_own(out: Path, directory: Path, name: str) -> None:
    if out.resolve() == directory.resolve():
        raise ConfigError(f"--out {out} is the experiment itself; name another directory")
    require_room(out, resume=True)
    if (out / RECORD).is_file() and (other := read_results(out).experiment.name) != name:
        raise ConfigError(f"--out {out} holds experiment {other}, not {name}; name another directory")


def _archive_run(result: RunResult, directory: Path, out: Path, *, with_experts: bool) -> None:
    place = run_directory(out, result.run)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(result.directory / "config.json", place / "config.json")
    spike = result.metrics.spike
    lines = thinned(read_lines(result.directory / "metrics.jsonl"), () if spike is None else [spike.step])
    write_whole(place / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if result.diverged:
        shutil.copyfile(log_path(directory, result.run), log_path(out, result.run))
    analysis = analysis_path(directory, result.run)
    if analysis.is_file():
        path = analysis_path(out, result.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = _rounded(json.loads(analysis.read_text(encoding="utf-8")))
        if not with_experts:
            answers["specialisation"] = []
        write_whole(path, json.dumps(answers, ensure_ascii=False) + "\n")


def thinned(lines: list[dict[str, Any]], steps: Collection[int] = ()) -> list[dict[str, Any]]:
    """Keep lines at even distances, those with a held-out loss, the last and these ``steps``, and of them what is read.

    What is thin already stays as it is.
    """
    numbered = {line["step"] for line in lines if line.get("validation_loss") is not None} | set(steps)
    numbered |= _evenly([line["step"] for line in lines], LINES)
    loaded = _evenly([line["step"] for line in lines if line.get("routers")], LOADS)
    kept: list[dict[str, Any]] = []
    for line in (line for line in lines if line["step"] in numbered | loaded):
        short: dict[str, Any] = {name: _short(line[name]) for name in _KEPT if name in line}
        if line["step"] in loaded:
            short["routers"] = [_load(router) for router in line["routers"]]
        kept.append(short)
    routed = [line for line in lines if line.get("routers")]
    if routed:
        last = next(line for line in reversed(kept) if "routers" in line)
        at_end = [line["routers"] for line in routed[-count_at_end(len(routed)) :]]
        last["routers"] = [_mean(notes) for notes in zip(*at_end, strict=True)]
        last["noted_at_end"] = routed[-1].get("noted_at_end", len(at_end))
    return kept


def _mean(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over a router's notes, to six decimals: an expert that lives must not seem dead."""
    noted = [note["dropped"] for note in notes if "dropped" in note]
    dropped = {"dropped": round(fmean(noted), 6)} if noted else {}
    fractions = zip(*(note["fraction"] for note in notes), strict=True)
    return {"fraction": [round(fmean(shares), 6) for shares in fractions], **dropped}


def _load(router: dict[str, Any]) -> dict[str, Any]:
    """Keep a router's load of each expert and the share of assignments that it dropped."""
    dropped = {"dropped": _short(router["dropped"])} if "dropped" in router else {}
    return {"fraction": [round(share, 4) for share in router["fraction"]], **dropped}


def _evenly(steps: list[int], most: int) -> set[int]:
    """Choose the first step of each of ``most`` equal stretches, and the last step."""
    every = max(1, -(-steps[-1] // most)) if steps else 1
    first = {step // every: step for step in reversed(steps)}
    return {*first.values(), *steps[-1:]}


def _short(value: float | None) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else _short(value)
