"""The command line: one command a file, and what becomes of errors.

A command's file parses, calls the library and prints; it imports the library inside the command, so that
``--help`` and a refused argument answer at once. Results go to stdout; logs, progress and errors to stderr.
Exit codes:

    0    done
    1    failed while running (disk full, non-finite loss); with a traceback only if the fault is ours
    2    what the user typed or configured
    3    data or a checkpoint that cannot be used
    130  interrupted from the keyboard
    141  the reader of stdout went away
    143  terminated by SIGTERM, after removing what was half-written

``train``, and ``experiment run`` and ``demo`` while their runs train, take SIGTERM and Ctrl-C for a request to save and
end, and exit with 0. ``docs/runs.md`` tells users.
"""

import importlib
import io
import keyword
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from switchmamba.errors import SwitchMambaError

COMMANDS = (
    "train",
    "finetune",
    "upcycle",
    "generate",
    "chat",
    "evaluate",
    "quantize",
    "export",
    "import",
    "info",
    "doctor",
    "demo",
)
"""Command ``x`` is the function ``x`` of ``cli/x.py``; ``import``, a keyword, is ``import_``."""

GROUPS = {
    "data": (
        "Turn text or generated tasks into token shards, and look into them.",
        ("prepare", "example", "synthetic", "show"),
    ),
    "experiment": (
        "Run experiments that are described by a file, and report on them.",
        ("run", "report", "analyse", "archive"),
    ),
}
"""Command ``x y`` is the function ``y`` of ``cli/x.py``."""

WITH_OVERRIDES = frozenset({"train", "finetune", "upcycle", "info"})
"""Commands that read dotted overrides such as ``--training.steps 100`` from the context's ``args``."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed while running; 2 what was typed or configured; 3 data or a checkpoint that cannot be "
    "used; 130 interrupted; 141 the reader of stdout went away; 143 terminated."
)
EPILOGUES = {
    "train": f"{EXIT_CODES} Stopped by Ctrl-C or SIGTERM, train saves and exits with 0: the last line of stdout says "
    "whether it finished or stopped.",
    "finetune": f"{EXIT_CODES} Stopped by Ctrl-C or SIGTERM, finetune saves and exits with 0, as train does.",
    "demo": f"{EXIT_CODES} Stopped by Ctrl-C or SIGTERM while it trains, the demo saves and exits with 0; the same "
    "command goes on.",
}
"""What stands below a command's options."""

logger = logging.getLogger("switchmamba")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text of a model must not break a Latin-1 terminal
    try:
        with _unwinding_on_sigterm():
            code = _run(words or ["--help"])
            sys.stdout.flush()
    except SwitchMambaError as error:
        return _refuse(str(error), error.exit_code)
    except _Terminated:
        return _refuse("terminated", 143)
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except BrokenPipeError:
        # Whatever is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _refuse(f"{place}{error.strerror or error}", 1)
    return code


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: an interruption, but not from the keyboard."""


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that whoever writes a file can remove its half.

    A process that is told to ignore SIGTERM goes on ignoring it; a second SIGTERM does not disturb the first.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(words: list[str]) -> int:
    command = typer.main.get_command(build_app())
    # Not command.main(): it turns errors into several lines and takes KeyboardInterrupt and BrokenPipeError
    # for itself.
    try:
        with command.make_context("switchmamba", words) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return _refuse("interrupted", 130)
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "switchmamba"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        return _refuse(f"{message}; see {where} --help", error.exit_code)
    return 0


# The base of typer's usage errors has moved between typer's releases; BadParameter is its public child.
_UsageError: Any = typer.BadParameter.__mro__[1]


def _refuse(message: str, code: int) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    logger.debug("where the error came from", exc_info=True)
    return code


def build_app() -> typer.Typer:
    """Return the application with every command registered."""
    app = typer.Typer(
        name="switchmamba",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=EXIT_CODES)(_options)
    for name in COMMANDS:
        settings = (
            {"allow_extra_args": True, "ignore_unknown_options": True} if name in WITH_OVERRIDES else None
        )
        app.command(name, context_settings=settings, epilog=EPILOGUES.get(name))(_function(name, name))
    for group_name, (summary, names) in GROUPS.items():
        group = typer.Typer(rich_markup_mode=None, help=summary)
        for name in names:
            group.command(name)(_function(group_name, name))
        app.add_typer(group, name=group_name)
    return app


def _function(module: str, name: str) -> Callable[..., None]:
    if keyword.iskeyword(name):
        module, name = f"{module}_", f"{name}_"
    function: Callable[..., None] = getattr(importlib.import_module(f"switchmamba.cli.{module}"), name)
    return function


def _show_version(requested: bool) -> None:
    if requested:
        from switchmamba import __version__

        typer.echo(f"switchmamba {__version__}")
        raise typer.Exit


def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log details, and tracebacks of errors.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train, evaluate and run MoE-Mamba and its relatives on text of your own.

    \b
    A first model, from text to sample:
      switchmamba data prepare --input books/ --tokenizer bpe:8000 --out data
      switchmamba train moe-mamba-tiny --data data --out run --steps 300
      switchmamba evaluate run --data data
      switchmamba generate run --prompt "Once upon a time"

    `switchmamba COMMAND --help` explains a command.
    """
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other")
    logger.handlers = [_PlainHandler()]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


class _PlainHandler(logging.Handler):
    """Write messages to whatever ``sys.stderr`` is now: a progress bar replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; warnings and errors say what they are."""
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        typer.echo(f"{label}{self.format(record)}", err=True)
