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
    """
    from switchmamba.config import apply_overrides, parse_overrides, validate
    from switchmamba.models.presets import read_tables

    overrides = parse_overrides(context.args)
    tables = apply_overrides(_checkpoint_tables(Path(source)) or read_tables(source), overrides)

    from switchmamba.models.accounting import account
    from switchmamba.training.config import RunConfig

    # A file that only describes a model will do: how its data is cut changes no figure here.
    complete = {"data": {"context_length": length}} | tables
    costs = account(validate(RunConfig, complete, source=source).model)
    if as_json:
        typer.echo(json.dumps({"source": source} | costs.as_dict(batch, length), indent=2))
    else:
        _print(source, costs, batch, length)


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
    pattern = " → ".join(" + ".join([entry] if isinstance(entry, str) else entry) for entry in config.pattern)
    console.print(
        f"[bold]{source}[/]: ({pattern}) × {config.num_blocks}, "
        f"d_model {config.d_model}, vocabulary {config.vocab_size:,}"
    )

    table = Table("parameters", "total", "active per token", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("without embedding and head", f"{costs.parameters:,}", f"{costs.active_parameters:,}")
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
