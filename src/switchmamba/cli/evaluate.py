"""``switchmamba evaluate``: how well a checkpoint predicts text, or copies from it."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from switchmamba.cli.evaluate_tasks import check_tasks, evaluate_tasks
from switchmamba.cli.model_options import (
    AllowBatchDependence,
    AllowNonCausal,
    Checkpoint,
    Device,
    LoadedCheckpoint,
    Quantization,
    Threads,
    counted,
    load_checkpoint,
    progress_bar,
    require_checkpoint,
)

if TYPE_CHECKING:
    from switchmamba.evaluation.perplexity import Evaluation
    from switchmamba.evaluation.repeats import Repeats, Score

logger = logging.getLogger("switchmamba")


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(
            help="A prepared directory, or text: .txt, .jsonl, compressed or not, a directory, a glob.",
            show_default=False,
        ),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Run a task of the lm-evaluation-harness instead; repeatable, wildcards too.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which part of a prepared directory.")
    ] = "validation",
    field: Annotated[str, typer.Option(help="Field of .jsonl records that holds the text.")] = "text",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after this many tokens; all by default. With --repeats: of natural text, 65,536 by default.",
            show_default=False,
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read longer documents in pieces of so many tokens, each from an empty state; whole by default. Give "
            "attention the length that it was trained on: it knows no places beyond.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once; changes time and memory only.")] = 8,
    chunk_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens per row at once; likewise. With --repeats all that a row reads: gaps must fit into it.",
        ),
    ] = 1024,
    copying: Annotated[
        bool,
        typer.Option("--repeats", help="Measure instead how text that comes a second time is predicted."),
    ] = False,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="With --harness: a directory with YAML files of your own tasks.", show_default=False
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="With --harness: solved examples before each question.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="With --harness: only the first so many questions.", show_default=False),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    quantization: Quantization = None,
    allow_non_causal: AllowNonCausal = False,
    allow_batch_dependence: AllowBatchDependence = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how well a checkpoint predicts held-out documents.

    \b
      switchmamba evaluate runs/mine --data data
      switchmamba evaluate runs/mine --data "books/*.txt" --max-tokens 100000 --json
      switchmamba evaluate runs/mine --data data --repeats
      switchmamba evaluate runs/mine --harness lambada_openai --harness "arc_*"

    Each document is predicted from its own past alone; the end of text that closes it counts as a token. No expert
    drops a token. Bits per byte compare models with different tokenizers.

    Where the data has a mask, as `switchmamba data synthetic` gives it, only the tokens that it counts are measured; an
    answer, a run of them, is right if all of its tokens are.

    --repeats measures copying: spans of real text planted a second time, and n-grams that come again by themselves. All
    tokens count there, whatever a mask says.

    --harness asks the tasks of the lm-evaluation-harness, which fetches their data itself; it needs the extra eval.
    """
    from switchmamba.errors import ConfigError
    from switchmamba.evaluation.documents import open_documents

    if (data is None) == (not harness):
        raise ConfigError("evaluate takes either --data, text to predict, or --harness, tasks to solve")
    if harness:
        of_text = {
            "--repeats": copying,
            "--split": split != "validation",
            "--field": field != "text",
            "--max-tokens": max_tokens is not None,
            "--chunk-size": chunk_size != 1024,
            "--allow-non-causal": allow_non_causal,
            "--allow-batch-dependence": allow_batch_dependence,
        }
        for option, given in of_text.items():
            if given:
                raise ConfigError(f"{option} has no meaning with --harness")
        require_checkpoint(checkpoint)
        check_tasks(harness, tasks)
        loaded = load_checkpoint(checkpoint, device, threads, quantization)
        evaluate_tasks(
            loaded,
            harness,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            context_length=context_length,
            as_json=as_json,
        )
        return
    assert data is not None
    unused = {"--tasks": tasks, "--num-fewshot": num_fewshot, "--limit": limit}
    for option, value in unused.items():
        if value is not None:
            raise ConfigError(f"{option} has no meaning without --harness")
    if copying and context_length is not None:
        raise ConfigError(
            "--context-length has no meaning with --repeats, whose windows are --chunk-size long"
        )
    require_checkpoint(checkpoint)
    open_documents(data, split, field)  # a missing file is refused before torch is imported
    loaded = load_checkpoint(checkpoint, device, threads, quantization)

    from switchmamba.evaluation import perplexity
    from switchmamba.evaluation.repeats import NATURAL_TOKENS, repeats

    started = perf_counter()
    result: Evaluation | Repeats
    with progress_bar("tokens") as report:
        if copying:
            result = repeats(
                loaded.model,
                loaded.tokenizer,
                data,
                split=split,
                field=field,
                context_length=chunk_size,
                max_tokens=max_tokens or NATURAL_TOKENS,
                batch_size=batch_size,
                allow_non_causal=allow_non_causal,
                allow_batch_dependence=allow_batch_dependence,
                progress=report,
            )
        else:
            result = perplexity.evaluate(
                loaded.model,
                loaded.tokenizer,
                data,
                split=split,
                field=field,
                max_tokens=max_tokens,
                context_length=context_length,
                batch_size=batch_size,
                chunk_size=chunk_size,
                allow_non_causal=allow_non_causal,
                allow_batch_dependence=allow_batch_dependence,
                progress=report,
            )
    seconds = perf_counter() - started
    if as_json:
        values = asdict(result) if isinstance(result, perplexity.Evaluation) else result.model_dump()
        typer.echo(json.dumps(loaded.source() | values, indent=2))
    elif isinstance(result, perplexity.Evaluation):
        _print(loaded, result)
    else:
        _print_repeats(loaded, result)
    tokens = result.tokens if isinstance(result, perplexity.Evaluation) else result.tokens_read
    logger.info("%s, %.0f tok/s", counted(tokens, "token"), tokens / seconds)


def _checkpoint_line(loaded: LoadedCheckpoint) -> tuple[str, str]:
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    return "checkpoint", f"{loaded.path}{step}"


def _print(loaded: LoadedCheckpoint, result: "Evaluation") -> None:
    for name, value in (
        _checkpoint_line(loaded),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:,.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("accuracy", f"{100 * result.accuracy:.2f} %"),
        *(
            [("answers", f"{100 * result.answer_accuracy:.2f} % of {result.answers:,} right as a whole")]
            if result.answer_accuracy is not None
            else []
        ),
        (
            "tokens",
            f"{result.tokens:,} in {counted(result.documents, 'document')}, {counted(result.bytes, 'byte')}",
        ),
    ):
        typer.echo(f"{name:<14}{value}")


def _print_repeats(loaded: LoadedCheckpoint, result: "Repeats") -> None:
    name, value = _checkpoint_line(loaded)
    typer.echo(f"{name:<14}{value}")
    typer.echo(f"\nplanted: the same {result.span} tokens twice, counted from token {result.skip + 1}")
    typer.echo(
        f"{'gap':<16}{'first: loss':>12}{'accuracy':>12}{'second: loss':>14}{'accuracy':>12}{'targets':>10}"
    )
    for planted in result.planted:
        typer.echo(
            f"{planted.gap:<16,}{planted.first.loss:>12.4f}{_percent(planted.first):>12}"
            f"{planted.second.loss:>14.4f}{_percent(planted.second):>12}{planted.second.targets:>10,}"
        )
    if not result.planted:
        typer.echo("no document is long enough")
    typer.echo("\nnatural: tokens by the longest n-gram they end that occurred before")
    typer.echo(f"{'n':<16}{'loss':>12}{'accuracy':>12}{'targets':>10}")
    bounds = [ngram.at_least for ngram in result.natural]
    for ngram, above in zip(result.natural, [*bounds[1:], None], strict=True):
        highest = "or more" if above is None else "" if above == ngram.at_least + 1 else f"to {above - 1}"
        label = f"{ngram.at_least} {highest}"
        typer.echo(f"{label:<16}{ngram.loss:>12.4f}{_percent(ngram):>12}{ngram.targets:>10,}")


def _percent(score: "Score") -> str:
    return f"{100 * score.accuracy:.2f} %"
