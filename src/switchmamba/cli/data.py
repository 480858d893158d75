"""``switchmamba data``: text or tasks to token shards, and what shards hold."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from switchmamba.cli.model_options import counted, directory_name
from switchmamba.data.defaults import (
    MAX_RECORD_BYTES,
    SHARD_TOKENS,
    TOKENIZER_SAMPLE_BYTES,
    VALIDATION_FRACTION,
)

if TYPE_CHECKING:
    from switchmamba.data.chat import ChatTemplate
    from switchmamba.data.index import Index, SourceRecord, SyntheticRecord
    from switchmamba.data.prepare import PreparedSummary, Progress

logger = logging.getLogger("switchmamba")


def prepare(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="TEXT",
            help="File (.txt, .jsonl, also .gz, .xz, .zst), directory or quoted glob; repeatable.",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="PATH|bpe:N",
            help="A tokenizer.json, a run or checkpoint to take it from, or bpe:8000 to train one with 8,000 entries "
            "on the text.",
        ),
    ],
    out: Annotated[Path, typer.Option(parser=directory_name, metavar="DIR", help="Directory to create.")],
    field: Annotated[
        str, typer.Option(metavar="NAME", help="Field of .jsonl records that holds the text.")
    ] = "text",
    text_suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUFFIX",
            help="Another suffix to read like .txt, such as .md; repeatable.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Records are conversations; only the assistant's tokens are targets."),
    ] = False,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --chat: a Jinja template; by default the checkpoint's that --tokenizer names, or our own.",
            show_default=False,
        ),
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            help="Share of documents to hold out, chosen by a hash of their content, or, where that chooses none, the "
            "last of the text; 0 for none."
        ),
    ] = VALIDATION_FRACTION,
    validation_input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Held-out text, in place of --validation-fraction; repeatable.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of held-out documents.")] = 0,
    shard_tokens: Annotated[int, typer.Option(help="Largest number of tokens in a file.")] = SHARD_TOKENS,
    max_record_bytes: Annotated[
        int, typer.Option(help="Largest .txt file or .jsonl line, decompressed.")
    ] = MAX_RECORD_BYTES,
    tokenizer_sample_bytes: Annotated[
        int, typer.Option(help="How much text bpe:N learns from, taken from all files.")
    ] = TOKENIZER_SAMPLE_BYTES,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip and count what cannot be used instead of stopping.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Turn text into a directory of token shards for training and evaluation.

    \b
      switchmamba data prepare --input books/ --tokenizer bpe:8000 --out data
      switchmamba data prepare --input "web/*.jsonl.zst" --field content --tokenizer tokenizer.json --out data

    A .txt file is one document, a line of a .jsonl file is one. The directory appears whole or not at all.

    \b
    Conversations, to fine-tune a trained model on (docs/finetuning.md):
      switchmamba data prepare --chat --input talks.jsonl --tokenizer runs/mine --out talks

    With --chat a line is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, with
    any number of turns, or {"prompt": "…", "completion": "…"}. The template is kept with the data.
    """
    from switchmamba.data.prepare import prepare as prepare_data

    kept: Path | None = None
    if Path(tokenizer).is_dir():
        from switchmamba.checkpoint import newest_valid

        directory = newest_valid(Path(tokenizer))
        tokenizer, kept = str(directory / "tokenizer.json"), directory / "chat_template.jinja"
    template = _chat_template(chat, chat_template, kept, bool(text_suffix) or field != "text")
    with _progress_bar() as report:
        summary = prepare_data(
            inputs,
            tokenizer,
            out,
            field=field,
            text_suffixes=text_suffix or (),
            chat_template=template,
            validation_fraction=validation_fraction,
            validation_inputs=validation_input or (),
            seed=seed,
            shard_tokens=shard_tokens,
            max_record_bytes=max_record_bytes,
            tokenizer_sample_bytes=tokenizer_sample_bytes,
            skip_bad=skip_bad,
            progress=report,
        )
    _tell(summary, as_json)


def example(
    out: Annotated[Path, typer.Option(parser=directory_name, metavar="DIR", help="Directory to create.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Prepare text that is on every machine, the sources of Python's standard library, to try things on.

    \b
      switchmamba data example --out data/example
      switchmamba train moe-mamba-demo --data data/example --out runs/mine --steps 100

    The demo's text: up to 8 MB of modules and help topics, a vocabulary of 4,096, whole documents held out. It differs
    between versions of Python. To be read it lies in DIR-text.
    """
    from switchmamba.experiments.library_text import prepare_library_text

    with _progress_bar() as report:
        summary = prepare_library_text(out.parent / f"{out.name}-text", out, report)
    _tell(summary, as_json)


def synthetic(
    task: Annotated[
        Literal["selective-copying", "induction-heads"],
        typer.Argument(metavar="TASK", help="selective-copying or induction-heads.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(parser=directory_name, metavar="DIR", help="Directory to create.")],
    length: Annotated[int, typer.Option(help="Tokens to remember something from.")] = 256,
    vocabulary: Annotated[int, typer.Option(help="Tokens in use, the special ones included.")] = 16,
    data_tokens: Annotated[
        int | None,
        typer.Option(help="Of selective-copying: how many to copy; 16 by default.", show_default=False),
    ] = None,
    train_examples: Annotated[int, typer.Option(help="Documents to train on; 0 for none.")] = 20_000,
    validation_examples: Annotated[int, typer.Option(help="Documents held out; 0 for none.")] = 1_000,
    validation_length: Annotated[
        int | None,
        typer.Option(
            help="Another length for those, to see whether a model generalises.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Generate a task that measures memory, as a directory of token shards.

    \b
      switchmamba data synthetic selective-copying --length 64 --data-tokens 8 --out data
      switchmamba train mamba-tiny --data data --data.context_length 74 --out run
      switchmamba evaluate run --data data
    \b
      selective-copying   . . c . . a . . . b . > c a b    data tokens among noise; behind > they come again in order
      induction-heads     h d # c f a b d g e # c          behind the second # comes what stood behind the first

    An example is a document; only its answer's tokens count, in training and evaluation. Train with the context length
    that is printed, one whole example, or a window cuts examples in two. `evaluate` reads examples of any length.
    """
    from switchmamba.config import validate
    from switchmamba.data.synthetic import TASKS, prepare_synthetic

    options = {"length": length, "vocabulary": vocabulary}
    if data_tokens is not None:
        options["data_tokens"] = data_tokens
    index = prepare_synthetic(
        validate(TASKS[task], options, task),
        out,
        train_examples=train_examples,
        validation_examples=validation_examples,
        validation_length=validation_length,
        seed=seed,
    )
    _print(out, index, as_json)


def show(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `switchmamba data prepare` wrote.", show_default=False)
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and check it against its sha256.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
) -> None:
    """Show what a directory of token shards holds.

    \b
      switchmamba data show data
      switchmamba data show data --verify --json
    """
    from switchmamba.data.index import read_index
    from switchmamba.data.shards import TokenShards

    index = read_index(directory)
    for split in index.splits:
        shards = TokenShards.open(directory, split)
        if verify:
            shards.verify()
    _print(directory, index, as_json)


def _chat_template(
    chat: bool, file: Path | None, kept: Path | None, has_field: bool
) -> "ChatTemplate | None":
    """Return the template of ``file``, else that which a checkpoint may have ``kept``, else ours; None for text."""
    from switchmamba.data.chat import ChatTemplate
    from switchmamba.errors import ConfigError

    if not chat:
        if file is not None:
            raise ConfigError(f"--chat-template {file} has no meaning without --chat")
        return None
    if has_field:
        raise ConfigError(
            "--field and --text-suffix have no meaning with --chat: records have fields of their own"
        )
    if file is None and kept is not None and kept.is_file():
        file = kept
    return ChatTemplate() if file is None else ChatTemplate.from_file(file)


def _tell(summary: "PreparedSummary", as_json: bool) -> None:
    if summary.first_skipped is not None:
        logger.warning("%s skipped; the first: %s", counted(summary.skipped, "record"), summary.first_skipped)
    logger.info("%.1f s, %.0f tokens/s", summary.seconds, summary.tokens / summary.seconds)
    _print(summary.path, summary.index, as_json)


def _print(directory: Path, index: "Index", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(index.model_dump(mode="json", exclude_none=True), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from switchmamba.data.index import SyntheticRecord

    table = Table(
        "split", title=f"{directory}: {index.vocab_size:,} token ids in {index.dtype}", title_justify="left"
    )
    for name in ("documents", "tokens", "bytes of text", "bytes per token", "files"):
        table.add_column(name, justify="right")
    masked = any(record.targets is not None for record in index.splits.values())
    if masked:
        table.add_column("targets", justify="right")
    for split, record in index.splits.items():
        table.add_row(
            split,
            f"{record.documents:,}",
            f"{record.tokens:,}",
            f"{record.text_bytes:,}",
            f"{record.text_bytes / record.tokens:.2f}",
            str(len(record.shards)),
            *([f"{record.tokens if record.targets is None else record.targets:,}"] if masked else []),
        )
    console = Console()
    console.print(table)
    source = index.source
    for line in _task(index, source) if isinstance(source, SyntheticRecord) else _held_out(source):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"tokenizer: sha256 {index.tokenizer_sha256}", soft_wrap=True, highlight=False)


def _held_out(source: "SourceRecord") -> Iterator[str]:
    what = "text" if source.chat_template_sha256 is None else "conversations"
    held_out = {
        "content": f"by content, {source.validation_fraction:.3%} of documents, seed {source.seed}",
        "tail": f"the last {source.validation_fraction:.3%} of the {what}",
        "input": f"from {', '.join(source.validation_inputs)}",
        "none": "nothing",
    }
    yield f"held out: {held_out[source.split_by]}"
    if source.chat_template_sha256 is not None:
        yield "targets: what the assistant writes, by the template in chat_template.jinja"
    if source.skipped:
        yield f"skipped: {counted(source.skipped, 'record')} that could not be used"


def _task(index: "Index", source: "SyntheticRecord") -> Iterator[str]:
    lengths = ", ".join(f"{split} {length:,}" for split, length in source.length.items())
    yield (
        f"task: {source.task}, vocabulary {source.vocabulary}, length: {lengths}, "
        f"{counted(source.answer_tokens, 'token')} to answer, seed {source.seed}"
    )
    for split, record in index.splits.items():
        yield f"one example of {split}: --data.context_length {record.tokens // record.documents}"


@contextmanager
def _progress_bar() -> Iterator[Callable[["Progress"], None]]:
    """Yield a callback that draws on stderr: bytes, documents, tokens per second, time left."""
    from rich import progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.DownloadColumn(binary_units=True),
        bar.TextColumn("{task.fields[counts]}"),
        bar.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bar.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        tasks: dict[str, bar.TaskID] = {}

        def report(state: "Progress") -> None:
            if state.stage not in tasks:
                tasks[state.stage] = display.add_task(state.stage, total=state.bytes_total, counts="")
            task = tasks[state.stage]
            elapsed = display.tasks[list(tasks).index(state.stage)].elapsed
            counts = f"{state.documents:,} documents"
            if elapsed:
                counts += f", {state.tokens / elapsed:,.0f} tokens/s"
            display.update(task, completed=state.bytes_done, counts=counts if state.documents else "")

        yield report
