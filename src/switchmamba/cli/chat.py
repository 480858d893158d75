"""``switchmamba chat``: talk with a checkpoint that was fine-tuned on conversations."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from switchmamba.cli.model_options import (
    AllowNonCausal,
    Checkpoint,
    Device,
    Greedy,
    MinP,
    Quantization,
    Temperature,
    Threads,
    TopK,
    TopP,
    load_checkpoint,
    require_checkpoint,
)
from switchmamba.errors import CheckpointError, ConfigError, DataError, SwitchMambaError

if TYPE_CHECKING:
    from switchmamba.data.chat import ChatTemplate
    from switchmamba.generation.chat import Chat

logger = logging.getLogger("switchmamba")

COMMANDS = """\
/reset         forget the conversation
/system TEXT   forget it, and begin the next one with these instructions; without TEXT with none
/save DIR      write conversation and state, to go on at another time
/load DIR      go on with what /save wrote; nothing is read again
/help          this
/exit          leave; so does Ctrl-D"""


def chat(
    checkpoint: Checkpoint,
    system: Annotated[
        str | None, typer.Option(help="Instructions that every conversation begins with.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one answer.")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    greedy: Greedy = False,
    seed: Annotated[int | None, typer.Option(help="Default: a new one.", show_default=False)] = None,
    template: Annotated[
        Path | None,
        typer.Option("--chat-template", help="In place of the checkpoint's own.", show_default=False),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quantization: Quantization = None,
    allow_non_causal: AllowNonCausal = False,
) -> None:
    """Talk with a model: a line is a message, and the answer appears as it is written. /help lists the commands.

    \b
      switchmamba chat runs/tuned --temperature 0.7 --top-p 0.9
      echo "What is a mamba?" | switchmamba chat runs/tuned --greedy

    The model reads each message once; its state stays between turns, so a long conversation costs no more per turn than
    a short one. Ctrl-C ends an answer, Ctrl-D the conversation. Without a terminal, stdin has a message a line and
    stdout the answers.
    """
    from switchmamba.cli.generate import sampling_settings

    settings = sampling_settings(temperature, top_k, top_p, min_p, greedy, seed)
    require_checkpoint(checkpoint)
    own = None if template is None else _read_template(template)
    loaded = load_checkpoint(checkpoint, device, threads, quantization)
    from switchmamba.generation.chat import Chat

    talk = Chat(
        loaded.model,
        loaded.tokenizer,
        own or _template_of(loaded.path),
        settings,
        max_tokens=max_tokens,
        system=system,
        allow_non_causal=allow_non_causal,
    )
    if sys.stdin.isatty():
        logger.info("%s: a line is a message; /help lists the commands, Ctrl-D leaves", loaded.path)
    for line in _lines():
        if line.startswith("/"):
            if not _obey(talk, line):
                return
        elif line:
            _answer(talk, line)


def _read_template(path: Path) -> "ChatTemplate":
    from switchmamba.data.chat import ChatTemplate

    return ChatTemplate.from_file(path)


def _template_of(directory: Path) -> "ChatTemplate":
    from switchmamba.data.chat import CHAT_TEMPLATE, ChatTemplate
    from switchmamba.models.loading import read_chat_template

    source = read_chat_template(directory)
    if source is None:
        raise CheckpointError(
            f"{directory}: has no {CHAT_TEMPLATE}: it was not trained on conversations; `switchmamba finetune` it on "
            "what `data prepare --chat` makes, or name a template with --chat-template"
        )
    try:
        return ChatTemplate(source, str(directory / CHAT_TEMPLATE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _lines() -> Iterator[str]:
    """Yield what is typed, line by line, until its end; Ctrl-C at the prompt begins the line anew."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  gives input() a history and editing keys
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                typer.echo()
            return
        except KeyboardInterrupt as interruption:
            if not interactive or type(interruption) is not KeyboardInterrupt:  # SIGTERM is one of its kind
                raise
            typer.echo("  (Ctrl-D leaves)", err=True)
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: not UTF-8 at byte {error.start} of a line") from None
        yield line.strip()


def _answer(talk: "Chat", text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends it, and what was written counts."""
    try:
        with _interrupting(talk):
            for piece in talk.answer(text):
                typer.echo(piece, nl=False)
    except DataError as error:
        _complain(error)
        return
    typer.echo()
    assert talk.completion is not None
    if talk.completion.finish_reason == "length":
        logger.info("(the answer was cut at --max-tokens)")


@contextmanager
def _interrupting(talk: "Chat") -> Iterator[None]:
    """In a terminal let the first SIGINT end the answer at its next token, and a second one the program."""
    if not sys.stdin.isatty() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        talk.interrupt()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(talk: "Chat", line: str) -> bool:
    """Do what a line that begins with a slash says; False to leave."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/exit" | "/quit":
            return False
        case "/reset":
            talk.reset()
        case "/system":
            talk.system = rest or None
            talk.reset()
        case "/save" | "/load":
            _keep(talk, command, rest)
        case "/help":
            typer.echo(COMMANDS, err=True)
        case _:
            _complain(ConfigError(f"{command} is no command; /help lists them"))
    return True


def _keep(talk: "Chat", command: str, name: str) -> None:
    try:
        if not name:
            raise ConfigError(f"{command} needs the name of a directory")
        if command == "/save":
            talk.save(Path(name))
        else:
            talk.load(Path(name))
    except SwitchMambaError as error:
        _complain(error)


def _complain(error: SwitchMambaError) -> None:
    """Say what is wrong and go on; without a terminal, where nobody could mend it, end with the error's code."""
    if not sys.stdin.isatty():
        raise error
    with suppress(OSError):
        typer.echo(f"error: {error}", err=True)
