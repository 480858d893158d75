"""``switchmamba evaluate``: loss, perplexity, bits per byte and accuracy of a checkpoint on text."""

import json
import logging
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from switchmamba.cli.model_options import (
    AllowBatchDependence,
    AllowNonCausal,
    Checkpoint,
    Device,
    LoadedCheckpoint,
    Threads,
    counted,
    load_checkpoint,
    require_checkpoint,
)

if TYPE_CHECKING:
    from switchmamba.evaluation.perplexity import Evaluation

logger = logging.getLogger("switchmamba")


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str,
        typer.Option(
            help="A prepared directory, or text: .txt, .jsonl, compressed or not, a directory, a glob."
        ),
    ],
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which part of a prepared directory.")
    ] = "validation",
    field: Annotated[str, typer.Option(help="Field of .jsonl records that holds the text.")] = "text",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens; all by default.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once; changes time and memory only.")] = 8,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per row at once; likewise.")] = 1024,
    device: Device = "auto",
    threads: Threads = None,
    allow_non_causal: AllowNonCausal = False,
    allow_batch_dependence: AllowBatchDependence = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how well a checkpoint predicts held-out documents.

    \b
      switchmamba evaluate runs/mine --data data
      switchmamba evaluate runs/mine --data "books/*.txt" --max-tokens 100000 --json

    Each document is predicted from its own past alone; the end of text that closes it counts as a token. No expert
    drops a token. Bits per byte compare models with different tokenizers.
    """
    from switchmamba.evaluation.documents import open_documents

    require_checkpoint(checkpoint)
    open_documents(data, split, field)  # a missing file is refused before torch is imported
    loaded = load_checkpoint(checkpoint, device, threads)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from switchmamba.evaluation import perplexity

    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = console.is_terminal and logger.isEnabledFor(logging.INFO)
    started = perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("tokens", total=None)
        result = perplexity.evaluate(
            loaded.model,
            loaded.tokenizer,
            data,
            split=split,
            field=field,
            max_tokens=max_tokens,
            batch_size=batch_size,
            chunk_size=chunk_size,
            allow_non_causal=allow_non_causal,
            allow_batch_dependence=allow_batch_dependence,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = perf_counter() - started
    if as_json:
        typer.echo(json.dumps(loaded.source() | asdict(result), indent=2))
    else:
        _print(loaded, result)
    logger.info("%s, %.0f tok/s", counted(result.tokens, "token"), result.tokens / seconds)


def _print(loaded: LoadedCheckpoint, result: "Evaluation") -> None:
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    for name, value in (
        ("checkpoint", f"{loaded.path}{step}"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:,.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("accuracy", f"{100 * result.accuracy:.2f} %"),
        (
            "tokens",
            f"{result.tokens:,} in {counted(result.documents, 'document')}, {counted(result.bytes, 'byte')}",
        ),
    ):
        typer.echo(f"{name:<14}{value}")
