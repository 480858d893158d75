"""``switchmamba train``: train a preset or a configuration file on prepared data."""

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchmamba.cli.model_options import directory_name, require_checkpoint

if TYPE_CHECKING:
    from switchmamba.training.config import RunConfig
    from switchmamba.training.progress import Observer
    from switchmamba.training.stop import StopRequest

logger = logging.getLogger("switchmamba")


def train(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CONFIG_OR_PRESET", help="A preset or a TOML file.")],
    data: Annotated[Path, typer.Option(help="Directory written by `switchmamba data prepare`.")],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name,
            metavar="RUN",
            help="Directory of the run; must be new or an empty directory, unless --resume.",
        ),
    ],
    steps: Annotated[int | None, typer.Option(min=1, help="Short for --training.steps.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=0, help="Short for --training.checkpoint_every; 0: at the end only.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CKPT",
            help="Start from the weights of a run or checkpoint of the same model; short for "
            "--training.initial_checkpoint.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest valid checkpoint, if there is one.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")] = None,
) -> None:
    """Train a model; every configuration key can be set, as in --training.learning_rate 1e-3.

    docs/configuration.md lists the keys; a wrong one is answered with the nearest right one.

    SIGTERM and Ctrl-C finish the step, save and exit with 0; the same command with --resume goes on from there.

    A line of progress ends with the load of the experts: a bar for each (a full block is twice an even share), and the
    largest load over the mean one, as in 1.5×.

    --from starts a new run from the weights of another, or of what `switchmamba upcycle` wrote. Model and tokenizer
    must be the same; optimizer, schedule and data begin anew (another --training.seed reads the data in another order).

    \b
      switchmamba train moe-mamba-tiny --data data --out run --steps 300
      switchmamba train moe-mamba-tiny --data data --out further --from run --training.seed 1
      switchmamba train mine.toml --data data --out run --model.layers.moe.num_experts 16 --training.seed 1
    """
    from switchmamba.data.index import read_index
    from switchmamba.training.stop import stop_on_signals

    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())  # before torch, whose import takes seconds
        shorthands = {"steps": steps, "checkpoint_every": checkpoint_every, "initial_checkpoint": start}
        tables = _read_tables(source, context.args, shorthands)
        check_room(out, resume)
        _check_start(tables, out)
        tables, vocab_size = _with_vocabulary(tables, read_index(data).vocab_size)

        import torch

        from switchmamba.config import validate
        from switchmamba.training.config import RunConfig

        config = validate(RunConfig, tables, source=source)
        if threads is not None:
            torch.set_num_threads(threads)
        run(config, data, out, resume, vocab_size, stop)


def run(
    config: "RunConfig", data: Path, out: Path, resume: bool, vocab_size: int | None, stop: "StopRequest"
) -> None:
    """Train, show how it goes, and say on stdout how it ended."""
    from switchmamba.training.trainer import train as run_training

    with _observer(out.name, config.training.log_every) as observer:
        result = run_training(
            config, data, out, resume=resume, vocab_size=vocab_size, observer=observer, stop=stop
        )
    if result.step > config.training.steps:
        typer.echo(
            f"{out}: at step {result.step} already; training.steps = {config.training.steps} asks no more"
        )
    else:
        done = "finished" if result.finished else "stopped"
        typer.echo(f"{out}: {done} at step {result.step} of {config.training.steps}")


def _read_tables(
    source: str, arguments: list[str], shorthands: dict[str, int | str | None]
) -> dict[str, Any]:
    from switchmamba.config import apply_overrides, parse_overrides
    from switchmamba.models.presets import presets, read_tables

    tables = read_tables(source)
    if source in presets:
        del tables["model"]["vocab_size"]  # a default for looking at the preset; nobody has asked for it
    overrides = parse_overrides(arguments)
    overrides += [(f"training.{name}", value) for name, value in shorthands.items() if value is not None]
    return apply_overrides(tables, overrides)


def _with_vocabulary(tables: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], int | None]:
    """Return the tables with the data's vocabulary, which need not be named, and the one that is named."""
    model = tables.get("model", {})
    if not isinstance(model, dict):
        return tables, None
    return {**tables, "model": {"vocab_size": vocab_size, **model}}, model.get("vocab_size")


def check_room(out: Path, resume: bool) -> None:
    """Refuse a run that exists, before torch is imported."""
    from switchmamba.errors import ConfigError

    if out.exists() and not resume and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ConfigError(f"--out {out} exists; --resume continues it, or choose another")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a directory; choose another")


def _check_start(tables: dict[str, Any], out: Path) -> None:
    """Refuse what is no checkpoint to start from, before torch is imported; a run that has its own needs none."""
    from switchmamba.checkpoint import step_directories

    training = tables.get("training")
    start = training.get("initial_checkpoint") if isinstance(training, dict) else None
    if isinstance(start, str) and start and not step_directories(out / "checkpoints"):
        require_checkpoint(Path(start))


def _observer(label: str, log_every: int) -> "AbstractContextManager[Observer]":
    from rich.console import Console

    from switchmamba.training.progress import PlainProgress, TerminalProgress

    console = Console(stderr=True)
    if console.is_terminal and logger.isEnabledFor(logging.INFO):
        return TerminalProgress(console, label)
    return nullcontext(PlainProgress(log_every))
