"""``switchmamba quantize``: a checkpoint in eight bits, for inference."""

from pathlib import Path
from typing import Annotated

import typer

from switchmamba.cli.model_options import Checkpoint, directory_name, require_checkpoint


def quantize(
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name, metavar="CKPT", help="Directory of the new checkpoint.", show_default=False
        ),
    ],
) -> None:
    """Write a checkpoint whose projections, head and experts are stored in eight bits.

    \b
      switchmamba quantize runs/mine --out small
      switchmamba generate small --prompt "Once upon a time"

    It is about a quarter as large and loads as it is, for generate, evaluate and chat; it is not for training or
    export. `--quantization int8` of those commands does the same to a checkpoint that they load. The price is in
    docs/quantization.md.
    """
    from switchmamba.checkpoint import newest_valid, read_json
    from switchmamba.errors import ConfigError

    if out.exists():
        raise ConfigError(f"--out {out} exists; name a directory that does not")
    require_checkpoint(checkpoint)

    from switchmamba.models.loading import (
        CONFIG,
        WEIGHTS,
        load_verified,
        read_chat_template,
        refuse_quantized,
        save_model,
    )
    from switchmamba.models.quantization import quantize as quantized

    source = newest_valid(checkpoint)
    model, tokenizer = load_verified(source)
    refuse_quantized(model, source)
    tables = {name: table for name, table in read_json(source / CONFIG).items() if name != "model"}
    save_model(out, quantized(model), tokenizer, tables, read_chat_template(source))
    before, after = (path.stat().st_size for path in (source / WEIGHTS, out / WEIGHTS))
    typer.echo(f"{out}: {after / 1e6:,.1f} MB of weights, {source} has {before / 1e6:,.1f}")
