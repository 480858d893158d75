"""``switchmamba upcycle``: turn a trained model into a mixture of experts to be trained on."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from switchmamba.cli.model_options import Checkpoint, counted, directory_name, require_checkpoint

if TYPE_CHECKING:
    from switchmamba.models.config import ModelConfig
    from switchmamba.models.upcycling import StepOrigin


def upcycle(
    context: typer.Context,
    checkpoint: Checkpoint,
    to: Annotated[
        str,
        typer.Option(
            metavar="CONFIG_OR_PRESET",
            help="The model to become: a preset or a TOML file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name, metavar="CKPT", help="Directory of the new checkpoint.", show_default=False
        ),
    ],
    experts: Annotated[
        Literal["copy", "fresh"],
        typer.Option(help="What becomes of an mlp that a moe replaces: a copy in each expert, or nothing."),
    ] = "copy",
    seed: Annotated[int, typer.Option(min=0, help="Of the fresh weights.")] = 0,
) -> None:
    """Turn a trained model into a mixture of experts, to be trained on from there (sparse upcycling).

    The layers of CKPT are taken over in order. An mlp may become a moe, each of whose experts starts as a copy of it
    behind a fresh router; moe layers that CKPT lacks may stand anywhere, and add 0 at first. So the new model starts
    about as good as CKPT, or exactly so. Whatever else does not fit is refused by name. --model.KEY VALUE changes the
    configuration or preset, here and then in train alike.

    \b
    A Mamba of eight layers gets a moe behind each, and is trained on:
      switchmamba upcycle runs/mamba --to moe-mamba-demo --model.num_blocks 8 --out grown
      switchmamba train moe-mamba-demo --model.num_blocks 8 --from grown --data data --out on

    \b
    A Transformer's mlp becomes eight experts:
      switchmamba upcycle runs/transformer --to transformer-moe-demo --out sparse

    docs/upcycling.md says what the experts start from and what it is worth.
    """
    from switchmamba.checkpoint import newest_valid, saved_step
    from switchmamba.config import apply_overrides, parse_overrides, validate
    from switchmamba.errors import ConfigError
    from switchmamba.models.presets import presets, read_tables

    tables = read_tables(to)
    if to in presets:
        del tables["model"]["vocab_size"]  # a default for looking at the preset; the checkpoint has its own
    overrides = parse_overrides(context.args)
    for name, _ in overrides:
        if not name.startswith("model."):
            raise ConfigError(
                f"--{name}: nothing is trained here; set only keys of model, and give train the rest"
            )
    tables = apply_overrides(tables, overrides)
    if out.exists():
        raise ConfigError(f"--out {out} exists; checkpoints are never overwritten: choose another")
    require_checkpoint(checkpoint)

    import torch

    from switchmamba.models.config import ModelConfig
    from switchmamba.models.loading import (
        load_verified,
        read_chat_template,
        read_model_config,
        refuse_quantized,
        save_model,
    )
    from switchmamba.models.upcycling import plan
    from switchmamba.models.upcycling import upcycle as upcycle_model

    directory = newest_valid(checkpoint)
    old = read_model_config(directory)
    config = validate(ModelConfig, _with_vocabulary(tables, old.vocab_size), source=to)
    origins = plan(old, config, experts)  # what does not fit is refused before the weights are read
    model, tokenizer = load_verified(directory)
    refuse_quantized(model, directory)
    torch.manual_seed(seed)
    grown = upcycle_model(model, config, experts)
    step = saved_step(directory)
    origin = {"checkpoint": str(directory), "step": step, "experts": experts, "seed": seed}
    save_model(out, grown, tokenizer, {"upcycled_from": origin}, read_chat_template(directory))
    typer.echo(f"{out}: ({config.written_pattern}) × {config.num_blocks} from {directory}")
    for line, count in _origins(old, config, origins, experts).items():
        typer.echo(f"  {count:>3} × {line}")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, grown))
    typer.echo(f"  {counted(before, 'parameter')} → {after:,}")


def _with_vocabulary(tables: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = tables.get("model", {})
    return {"vocab_size": vocab_size, **model} if isinstance(model, dict) else model


def _origins(
    source: "ModelConfig", target: "ModelConfig", origins: "list[StepOrigin]", experts: str
) -> Counter[str]:
    """Count what became of the layers, in the order of the model."""
    lines: Counter[str] = Counter()
    for new, old in (branch for step in origins for branch in step.branches):
        if old is None:
            lines[f"{new}: new, its output 0"] += 1
        elif source.layers[old].kind == target.layers[new].kind:
            lines[f"{new}: copied"] += 1
        else:
            how = "fresh experts, their output 0" if experts == "fresh" else _inherited(target, new, old)
            lines[f"{new}: {how}, in place of {old}"] += 1
    return lines


def _inherited(target: "ModelConfig", new: str, old: str) -> str:
    from switchmamba.layers.feed_forward.moe import MoEConfig

    layer = target.layers[new]
    assert isinstance(layer, MoEConfig)
    if layer.num_shared_experts:
        return f"shared experts as {old}, fresh ones beside them with an output of 0"
    return f"{layer.num_experts} experts, each a copy"
