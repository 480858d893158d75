"""``switchmamba finetune``: train a checkpoint further on other data, whole or by an adapter."""

import json
import logging
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchmamba.cli.model_options import Checkpoint, directory_name, require_checkpoint
from switchmamba.cli.train import check_room, run
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.extras import require

if TYPE_CHECKING:
    from switchmamba.data.shards import TokenShards
    from switchmamba.training.config import RunConfig

logger = logging.getLogger("switchmamba")

FULL_SHARE = 0.1
"""Of the learning rate that CKPT was trained with, so that little is forgotten; an adapter, which is new, takes all."""

EPOCHS, WARMUP = 3.0, 0.03
"""Passes through the data; share of the steps that warm up."""

CONTEXT_LENGTH, LEARNING_RATE = 1024, 1e-3
"""Of a checkpoint that does not say with what it was trained."""


def finetune(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Annotated[
        Path,
        typer.Option(
            help="Directory of `switchmamba data prepare`, with --chat or without.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name,
            metavar="RUN",
            help="Directory of the run; must be new or an empty directory, unless --resume.",
            show_default=False,
        ),
    ],
    epochs: Annotated[
        float | None,
        typer.Option(min=0, help="How often to go through the data; 3 unless --steps.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Instead of --epochs: optimizer steps.", show_default=False)
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", min=1, help="Train an adapter of this rank instead.", show_default=False
        ),
    ] = None,
    lora_alpha: Annotated[
        int | None,
        typer.Option(min=1, help="The adapter's scale times RANK; 2 · RANK by default.", show_default=False),
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What to adapt: kinds of layers, experts, embedding, head; by default all but the last two.",
            show_default=False,
        ),
    ] = None,
    freeze_router: Annotated[
        bool | None,
        typer.Option(
            "--freeze-router/--train-router",
            help="Whether experts go on being chosen as they are; frozen by default.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest valid checkpoint, if there is one.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.", show_default=False)
    ] = None,
) -> None:
    """Train CKPT further on data of its own tokenizer, such as conversations; only unmasked tokens are targets.

    \b
      switchmamba data prepare --chat --input talks.jsonl --tokenizer runs/mine --out talks
      switchmamba finetune runs/mine --data talks --out runs/tuned
      switchmamba finetune runs/mine --data talks --out runs/adapted --lora 8
      switchmamba chat runs/tuned

    It is `train --from CKPT` with CKPT's model and context length and with defaults that suit: a tenth of CKPT's
    learning rate, or all of it with --lora, a short warm-up, no weight decay, frozen routers. Every key can be set, as
    in --training.learning_rate 3e-4 or --data.context_length 512.

    A checkpoint of an adapter's run holds the merged weights, as any other, and beside them the adapter in peft's
    format. docs/finetuning.md says more. SIGTERM, Ctrl-C and --resume are as for train.
    """
    from switchmamba.data.index import read_index
    from switchmamba.training.stop import stop_on_signals

    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())  # before torch, whose import takes seconds
        settings = _lora(lora, lora_alpha, lora_targets, freeze_router)
        if steps is not None and epochs is not None:
            raise ConfigError("--steps and --epochs exclude each other")
        if epochs == 0:
            raise ConfigError("--epochs 0 trains nothing; name a number above 0, such as 0.5")
        check_room(out, resume)
        read_index(data)  # what is missing is said before torch is imported
        begun = _begun(out) if resume else None
        if begun is None:
            require_checkpoint(checkpoint)
        own = {"initial_checkpoint": str(checkpoint), "lora": settings, "steps": steps}
        overrides = _overrides(context.args, own)
        if begun is None:
            config = _configure(_tables_of(checkpoint), overrides, data, epochs or EPOCHS, freeze_router)
        else:
            config = _continue(begun, overrides, data, epochs, freeze_router)
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        run(config, data, out, resume, config.model.vocab_size, stop)


def _lora(
    rank: int | None, alpha: int | None, targets: str | None, freeze_router: bool | None
) -> dict[str, Any] | None:
    """Return the table training.lora, None without --lora; refuse what needs it or does not go with it."""
    if rank is None:
        for name, value in (("--lora-alpha", alpha), ("--lora-targets", targets)):
            if value is not None:
                raise ConfigError(f"{name} has no meaning without --lora RANK")
        return None
    if freeze_router is False:
        raise ConfigError(
            "--train-router does not go with --lora: an adapter holds no router; leave out one of them"
        )
    require("peft", "lora", "--lora")
    names = None if targets is None else [name.strip() for name in targets.split(",")]
    return {"rank": rank, "alpha": alpha, "targets": names}


def _begun(out: Path) -> dict[str, Any] | None:
    """Return the configuration of a run that has a checkpoint of its own: the one it began with may be gone."""
    from switchmamba.checkpoint import step_directories

    if not step_directories(out / "checkpoints"):
        return None
    try:
        tables: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out / 'config.json'}: cannot be read: {error}") from None
    return tables


def _tables_of(checkpoint: Path) -> dict[str, Any]:
    from switchmamba.checkpoint import newest_valid, read_json

    return read_json(newest_valid(checkpoint) / "config.json")


def _overrides(arguments: list[str], own: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return what is typed as dotted keys, and behind it ``own``, what options say of training, where they say it."""
    from switchmamba.config import parse_overrides

    return parse_overrides(arguments) + [
        (f"training.{key}", value) for key, value in own.items() if value is not None
    ]


def _continue(
    tables: dict[str, Any],
    overrides: list[tuple[str, Any]],
    data: Path,
    epochs: float | None,
    freeze_router: bool | None,
) -> "RunConfig":
    """Return what the run was begun with, what is typed on top of it."""
    from switchmamba.config import apply_overrides, validate
    from switchmamba.data.shards import TokenShards
    from switchmamba.training.config import RunConfig

    begun = {"device": "auto"} | ({} if freeze_router is None else {"freeze": ["router"] * freeze_router})
    tables = {**tables, "training": {**tables["training"], **begun}}
    config = validate(RunConfig, apply_overrides(tables, overrides), source="finetune")
    if epochs is not None and not _typed("steps", overrides):
        steps = [("training.steps", _steps(config, TokenShards.open(data), epochs))]
        config = validate(RunConfig, apply_overrides(tables, overrides + steps), source="finetune")
    logger.info("--resume: %s", _described(config))
    return config


def _described(config: "RunConfig") -> str:
    """Say what a run trains that it may have been begun with and not been told again."""
    training = config.training
    if training.lora is None:
        what = f"all weights but {', '.join(training.freeze)}" if training.freeze else "all weights"
    else:
        where = ", ".join(training.lora.targets or ["all layers and experts"])
        what = f"an adapter of rank {training.lora.rank} on {where}"
    return (
        f"as the run was begun, but for what is typed: {what}, {training.steps} steps, learning rate "
        f"{training.learning_rate:g}, from {training.initial_checkpoint}"
    )


def _steps(config: "RunConfig", shards: "TokenShards", epochs: float) -> int:
    """Return how many optimizer steps so many passes through the data take."""
    windows = (shards.num_tokens - 1) // config.data.context_length
    return max(1, ceil(epochs * windows / config.training.batch_size))


def _configure(
    tables: dict[str, Any],
    overrides: list[tuple[str, Any]],
    data: Path,
    epochs: float,
    freeze_router: bool | None,
) -> "RunConfig":
    """Return CKPT's model and cut with a training that suits, what is typed on top of it."""
    from switchmamba.config import apply_overrides, validate
    from switchmamba.data.shards import TokenShards
    from switchmamba.layers.feed_forward.moe import mixtures
    from switchmamba.training.config import RunConfig

    shards = TokenShards.open(data)
    cut = tables.get("data") or {"context_length": CONTEXT_LENGTH}
    rate = (tables.get("training") or {}).get("learning_rate", LEARNING_RATE)
    cut = {"context_length": min(cut["context_length"], shards.num_tokens - 1), "reset_state": True}
    tables = {"model": tables.get("model", {}), "data": cut, "training": {}}
    config = validate(
        RunConfig, apply_overrides(tables, overrides), source="finetune"
    )  # what is typed is right

    lora, routed = config.training.lora, any(mixtures(config.model))
    if freeze_router and not routed:
        raise ConfigError("--freeze-router: the model has no router; leave it out")
    frozen = routed and lora is None and freeze_router is not False
    steps = config.training.steps if _typed("steps", overrides) else _steps(config, shards, epochs)
    tables["training"] = {
        "steps": steps,
        "warmup_steps": ceil(WARMUP * steps),
        "learning_rate": rate if lora is not None else FULL_SHARE * rate,
        "weight_decay": 0.0,
        "freeze": ["router"] if frozen else [],
        # A router that does not move cannot answer to a loss that would balance it.
        "load_balance_coef": 0.0 if frozen or lora is not None else config.training.load_balance_coef,
        "validate_every": max(1, steps // 10) if "validation" in shards.index.splits else 0,
    }
    return validate(RunConfig, apply_overrides(tables, overrides), source="finetune")


def _typed(name: str, overrides: list[tuple[str, Any]]) -> bool:
    return f"training.{name}" in {given for given, _ in overrides}
