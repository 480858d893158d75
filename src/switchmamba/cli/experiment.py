"""``switchmamba experiment``: run experiments that a file describes, and report on them."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchmamba.cli.model_options import counted, progress_bar

if TYPE_CHECKING:
    from switchmamba.experiments.spec import Experiment, Run

logger = logging.getLogger("switchmamba")


def run(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Experiments, TOML files.")],
    data: Annotated[
        Path | None, typer.Option(help="Directory written by `switchmamba data prepare`.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for runs and report; of several experiments, each in its own inside."),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time; default: one per GPU, else one per --threads cores."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a run; default 1, or cores / parallel.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in --out.")] = False,
    small: Annotated[
        bool,
        typer.Option("--small", help="The file's own version for a laptop: smaller models, fewer steps."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build every run on the meta device, print its parameters, and stop."),
    ] = False,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Train these arms alone, such as mamba,e8; the others any time later, with --resume."
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the file's, such as 0,1.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change every run, such as training.steps=100; repeatable."),
    ] = None,
    discard_checkpoints: Annotated[
        bool,
        typer.Option(
            "--discard-checkpoints",
            help="Remove a run's weights once it was evaluated; keeps disks from filling.",
        ),
    ] = False,
) -> None:
    """Run or resume experiments: the search of every arm, then further seeds at what it chose, then the report.

    Each finished run is evaluated at once: loss on all held-out text, what its experts specialise in. A run that two
    of the experiments share is trained once.

    \b
      switchmamba experiment run experiments/moe-mamba/beats-mamba-small.toml --dry-run
      switchmamba experiment run FILE --data data/books --out runs/books --parallel 8
      switchmamba experiment run experiments/moe-mamba/experts.toml --small --data data/books --out runs/experts
    """
    from switchmamba.errors import ConfigError
    from switchmamba.experiments.spec import read_experiment, restrict, shrink

    read = [read_experiment(file) for file in files]
    sized = [shrink(experiment) if small else experiment for experiment in read]
    experiments = [restrict(experiment, _seeds(seeds), _changes(changes or [])) for experiment in sized]
    for file, experiment in zip(files, experiments, strict=True):
        _require_presets(file, experiment)
    wanted = _arms(arms, files, experiments)
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise ConfigError(f"two of the files have the same name = {sorted(names)}; rename one")
    if dry_run:
        for experiment in experiments:
            _print_counts(experiment, wanted)
        return
    if data is None or out is None:
        raise ConfigError(f"--{'data' if data is None else 'out'} is missing; only --dry-run does without")

    from switchmamba.experiments import environment
    from switchmamba.experiments.processes import default_slots
    from switchmamba.experiments.results import ExperimentRecord, require_room
    from switchmamba.experiments.runner import require_choices, run_experiments

    places = [out if len(names) == 1 else out / name for name in names]
    for place in places:
        require_room(place, resume)
    corpus, corpus_sha256 = environment.corpus(data), environment.corpus_sha256(data)
    slots = default_slots(parallel, threads)
    hardware, software = environment.hardware(), environment.software()
    records = [
        ExperimentRecord(
            experiment=experiment,
            data=str(data),
            corpus=f"Text: {corpus}",
            corpus_sha256=corpus_sha256,
            hardware=hardware,
            software=software,
            threads=slots[0].threads,
            command=_command([file], data, place, parallel, threads, small, seeds, changes or []),
        )
        for experiment, file, place in zip(experiments, files, places, strict=True)
    ]

    from rich.console import Console

    from switchmamba.experiments.progress import LiveRuns

    with LiveRuns(Console(stderr=True)) as live:
        finished = run_experiments(
            list(zip(records, places, strict=True)),
            slots,
            observe=live.observe,
            arms=wanted,
            analyse=True,
            discard_checkpoints=discard_checkpoints,
        )
    if not finished:
        given = _command(files, data, out, parallel, threads, small, seeds, changes or [])
        more = f" --arms {shlex.quote(arms)}" if arms else ""
        more += " --discard-checkpoints" if discard_checkpoints else ""
        typer.echo(f"stopped; every run saved itself; continue with: {given}{more} --resume", err=True)
        return
    for place in places:
        _report(place, None)
    for place in places:
        require_choices(place)


def analyse(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `switchmamba experiment run --out` wrote.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME", help="This run alone, named as its directory below DIR/runs."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
) -> None:
    """Evaluate an experiment's finished runs; `run` and `report` do so by themselves.

    Writes DIR/analysis/NAME.json: loss and accuracy on all held-out text, what the experts specialise in.

    \b
      switchmamba experiment analyse runs/books
      switchmamba experiment analyse runs/books --run moe-mamba/learning_rate=0.001/seed=0
    """
    _share_cores()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from switchmamba.experiments.analysis import analyse

    analyse(directory, name, _evaluating)


def archive(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `switchmamba experiment run --out` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to create, or to bring up to date.")],
) -> None:
    """Copy what a report needs, without weights and with thinned curves: small enough to commit.

    `switchmamba experiment report ARCHIVE` writes the report anew from it, and `run --resume` goes on from it with the
    runs that are missing.

    \b
      switchmamba experiment archive runs/experts --out experiments/moe-mamba/results/experts
    """
    from switchmamba.experiments.archive import archive

    taken, left_out = archive(directory, out)
    typer.echo(f"archived {counted(len(taken), 'run')} in {out}")
    if left_out:
        names = ", ".join(left_out)
        logger.warning(
            "left out, for want of an end or an analysis: %s; `experiment run --resume` makes both", names
        )


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `switchmamba experiment run --out` wrote.")
    ],
    markdown: Annotated[
        Path | None,
        typer.Option(help="Also write Markdown to this .md file, its plots into a folder beside it."),
    ] = None,
) -> None:
    """Write DIR/report.html and DIR/summary.json from what the runs left; unfinished ones are named.

    \b
      switchmamba experiment report runs/books
      switchmamba experiment report runs/books --markdown docs/books.md
    """
    _share_cores()
    _report(directory, markdown)


def _share_cores() -> None:
    """Let torch's threads sleep while they wait, unless told otherwise; it reads this when it is imported."""
    from switchmamba.experiments.processes import SLEEPING_THREADS

    for name, value in SLEEPING_THREADS.items():
        os.environ.setdefault(name, value)


@contextmanager
def _evaluating(run: "Run") -> Iterator[Callable[[int, int | None], None]]:
    """Say which run is evaluated, and on a terminal how far that is."""
    typer.echo(f"evaluating {run.name}", err=True)
    with progress_bar("tokens") as progress:
        yield progress


def _report(directory: Path, markdown: Path | None) -> None:
    from switchmamba.errors import ConfigError

    if markdown is not None and markdown.suffix != ".md":
        raise ConfigError(f"--markdown {markdown} must name a .md file")

    from switchmamba.experiments.analysis import analyse
    from switchmamba.experiments.report import Report
    from switchmamba.experiments.results import read_results

    analyse(directory, watch=_evaluating)
    results = read_results(directory)
    written = Report(results)
    path = directory / "report.html"
    written.write(path)
    if markdown is not None:
        written.document().write_markdown(markdown)
        typer.echo(f"wrote {markdown}", err=True)
    for verdict in results.verdicts():
        typer.echo(verdict.sentence)
    typer.echo(f"report: {path.resolve().as_uri()}")


def _command(
    files: Sequence[Path],
    data: Path,
    out: Path,
    parallel: int | None,
    threads: int | None,
    small: bool,
    seeds: str | None,
    changes: Sequence[str],
) -> str:
    """Write the command that makes the same experiment afresh."""
    options = {"--data": data, "--out": out, "--parallel": parallel, "--threads": threads, "--seeds": seeds}
    given = [str(part) for pair in options.items() if pair[1] is not None for part in pair]
    sets = [part for change in changes for part in ("--set", change)]
    flags = ["--small"] if small else []
    return shlex.join(["switchmamba", "experiment", "run", *map(str, files), *flags, *given, *sets])


def _seeds(text: str | None) -> list[int] | None:
    from switchmamba.errors import ConfigError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ConfigError(f"--seeds {text!r} must be whole numbers joined by commas, such as 0,1,2")
    return [int(part) for part in parts]


def _require_presets(file: Path, experiment: "Experiment") -> None:
    from switchmamba.errors import ConfigError
    from switchmamba.models.presets import read_tables

    for name, arm in experiment.arms.items():
        try:
            read_tables(arm.preset)
        except ConfigError as error:
            raise ConfigError(f"{file}: arm {name}: {error}") from None


def _arms(text: str | None, files: Sequence[Path], experiments: Sequence["Experiment"]) -> list[str] | None:
    from switchmamba.config import nearest
    from switchmamba.errors import ConfigError

    if text is None:
        return None
    named = [part.strip() for part in text.split(",")]
    known = sorted({arm for experiment in experiments for arm in experiment.arms})
    for name in named:
        if name not in known:
            where = ", ".join(map(str, files))
            raise ConfigError(f"--arms {text!r}: {where}: no arm {name!r}{nearest(name, known)}")
    for file, experiment in zip(files, experiments, strict=True):
        if not set(named) & set(experiment.arms):
            raise ConfigError(
                f"--arms {text!r} names no arm of {file} ({', '.join(experiment.arms)}); leave this file out"
            )
    return named


def _changes(texts: Sequence[str]) -> list[tuple[str, object]]:
    from switchmamba.config import parse_overrides
    from switchmamba.errors import ConfigError

    for text in texts:
        if "=" not in text:
            raise ConfigError(f"--set {text!r} must look like training.steps=100")
    return parse_overrides([f"--{text}" for text in texts])


def _print_counts(experiment: "Experiment", arms: Sequence[str] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from switchmamba.experiments.dry_run import build_runs

    table = Table(
        f"run of {experiment.name}",
        "parameters",
        "active",
        "steps",
        "tokens",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for planned in build_runs(experiment, arms):
        counts, training = planned.account, planned.config.training
        tokens = training.steps * training.batch_size * planned.config.data.context_length
        numbers = (counts.parameters, counts.active_parameters, training.steps, tokens)
        table.add_row(planned.run.name, *(f"{number:,}" for number in numbers))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # a pipe has no width
    console.print(table)
    console.print(
        "Parameters leave out embedding and head; the vocabulary is the preset's, training takes the data's.",
        style="dim",
    )
    further = len(experiment.seeds) - 1
    if further:
        seeds = f"{further} further seed{'s' if further > 1 else ''}"
        console.print(f"And, for each arm, {seeds} at the point that its search chooses.", style="dim")
