"""``switchmamba info``: what a preset, a configuration or a checkpoint costs, before anything is built."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from switchmamba.models.accounting import Account


def info(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="X", help="A preset, a TOML file, a run or a checkpoint.")],
    batch: Annotated[
        int, typer.Option(min=1, help="Sequences per training step, for the memory figures.")
    ] = 8,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens per sequence, for memory and attention's operations.")
    ] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count parameters, operations and memory of a model from its configuration.

    \b
      switchmamba info moe-mamba-25m
      switchmamba info moe-mamba-25m --model.layers.moe.num_experts 8 --batch 64
      switchmamba info runs/mine --json

    A file need not name a vocabulary: the counts then leave out embedding and head, as the paper's do.
    """
    from switchmamba.config import apply_overrides, parse_overrides, validate

    overrides = parse_overrides(context.args)
    tables = apply_overrides(_checkpoint_tables(Path(source)) or _read(source), overrides)

    from switchmamba.models.accounting import account
    from switchmamba.training.config import RunConfig

    # A file that only describes a model will do: how its data is cut changes no figure here.
    complete = {"data": {"context_length": length}} | tables
    model = tables.get("model")
    has_vocabulary = not isinstance(model, dict) or "vocab_size" in model
    if not has_vocabulary:
        complete = apply_overrides(complete, [("model.vocab_size", 1)])
    costs = account(validate(RunConfig, complete, source=source).model, embeddings=has_vocabulary)
    if as_json:
        typer.echo(json.dumps({"source": source} | costs.as_dict(batch, length), indent=2))
    else:
        _print(source, costs, batch, length)


def _read(source: str) -> dict[str, Any]:
    from switchmamba.config import nearest
    from switchmamba.errors import ConfigError
    from switchmamba.models.presets import presets, read_tables

    if source in presets or source.endswith(".toml") or "/" in source:
        return read_tables(source)
    raise ConfigError(
        f"no run or checkpoint {source!r} here, and no preset of that name{nearest(source, list(presets))}"
    )


def _checkpoint_tables(path: Path) -> dict[str, Any] | None:
    """Return the model of a checkpoint; how it was trained is not asked, perhaps by another version."""
    if not path.is_dir():
        return None
    from switchmamba.checkpoint import newest_valid, read_json

    return {"model": read_json(newest_valid(path) / "config.json").get("model", {})}


def _print(source: str, costs: "Account", batch: int, length: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    config = costs.config
    console.print(
        f"[bold]{source}[/]: ({config.written_pattern}) × {config.num_blocks}, "
        f"d_model {config.d_model}, vocabulary {f'{config.vocab_size:,}' if costs.embeddings else 'not set'}"
    )
    if not costs.embeddings:
        console.print(
            "Embedding and head are left out of every figure: add model.vocab_size to the file or "
            "--model.vocab_size N to the command to count them; train takes the data's.",
            soft_wrap=True,
        )

    table = Table("parameters", "total", "active per token", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("without embedding and head", f"{costs.parameters:,}", f"{costs.active_parameters:,}")
    if costs.embeddings:
        table.add_row(
            "with embedding and head",
            f"{costs.parameters_with_embeddings:,}",
            f"{costs.active_parameters_with_embeddings:,}",
        )
    for (kind, total, active), count in _alike(costs).items():
        table.add_row(f"  each {kind} (× {count})", f"{total:,}", f"{active:,}")
    console.print(table)
    console.print(_operations(costs, length))
    console.print(_memory(costs, batch, length))


def _alike(costs: "Account") -> Counter[tuple[str, int, int]]:
    return Counter((layer.kind, layer.parameters, layer.active) for layer in costs.layers)


def _operations(costs: "Account", length: int) -> "Table":
    from rich.table import Table

    table = Table("operations per token (a multiply-add is 2)", "FLOPs")
    table.columns[1].justify = "right"
    table.add_row(f"training, length {length:,}", f"{costs.training_flops_per_token(length):,}")
    table.add_row(f"forward, length {length:,}", f"{costs.forward_flops_per_token(length):,}")
    table.add_row(f"decode, after {length:,} tokens", f"{costs.decode_flops_per_token(length):,}")
    return table


def _memory(costs: "Account", batch: int, length: int) -> "Table":
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(f"memory, fp32, batch {batch} × {length:,} tokens", "size")
    table.columns[1].justify = "right"
    for name, size in costs.training_memory(batch, length).items():
        table.add_row(name, decimal(size))
    table.add_row(
        f"state of one sequence after {length:,} tokens", decimal(costs.state_bytes_per_sequence(length))
    )
    return table
