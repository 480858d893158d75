"""``switchmamba data prepare`` and ``switchmamba data show``: text to token shards, and what shards hold."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchmamba.cli.model_options import counted, directory_name
from switchmamba.data.defaults import (
    MAX_RECORD_BYTES,
    SHARD_TOKENS,
    TOKENIZER_SAMPLE_BYTES,
    VALIDATION_FRACTION,
)

if TYPE_CHECKING:
    from switchmamba.data.index import Index
    from switchmamba.data.prepare import Progress

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
            help="A tokenizer.json, or bpe:8000 to train one with 8,000 entries on the text.",
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
    validation_fraction: Annotated[
        float,
        typer.Option(help="Share of documents to hold out, chosen by a hash of their content; 0 for none."),
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
    """
    from switchmamba.data.prepare import prepare as prepare_data

    with _progress_bar() as report:
        summary = prepare_data(
            inputs,
            tokenizer,
            out,
            field=field,
            text_suffixes=text_suffix or (),
            validation_fraction=validation_fraction,
            validation_inputs=validation_input or (),
            seed=seed,
            shard_tokens=shard_tokens,
            max_record_bytes=max_record_bytes,
            tokenizer_sample_bytes=tokenizer_sample_bytes,
            skip_bad=skip_bad,
            progress=report,
        )
    if summary.first_skipped is not None:
        logger.warning(
            "%s skipped; the first: %s",
            counted(summary.index.source.skipped, "record"),
            summary.first_skipped,
        )
    logger.info("%.1f s, %.0f tokens/s", summary.seconds, summary.tokens / summary.seconds)
    _print(out, summary.index, as_json)


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


def _print(directory: Path, index: "Index", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(index.model_dump(mode="json"), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "split", title=f"{directory}: {index.vocab_size:,} token ids in {index.dtype}", title_justify="left"
    )
    for name in ("documents", "tokens", "bytes of text", "bytes per token", "files"):
        table.add_column(name, justify="right")
    for split, record in index.splits.items():
        table.add_row(
            split,
            f"{record.documents:,}",
            f"{record.tokens:,}",
            f"{record.text_bytes:,}",
            f"{record.text_bytes / record.tokens:.2f}",
            str(len(record.shards)),
        )
    console = Console()
    console.print(table)
    held_out = {
        "content": f"by content, {index.source.validation_fraction:.3%} of documents, seed {index.source.seed}",
        "tail": f"the last {index.source.validation_fraction:.3%} of the text",
        "input": f"from {', '.join(index.source.validation_inputs)}",
        "none": "nothing",
    }
    console.print(f"held out: {held_out[index.source.split_by]}", soft_wrap=True, highlight=False)
    console.print(f"tokenizer: sha256 {index.tokenizer_sha256}", soft_wrap=True, highlight=False)
    if index.source.skipped:
        skipped = counted(index.source.skipped, "record")
        console.print(f"skipped: {skipped} that could not be used", soft_wrap=True)


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
