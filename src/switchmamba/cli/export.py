"""``switchmamba export``: write a checkpoint in another program's format."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from switchmamba.cli.model_options import Checkpoint, ComparisonSeed, directory_name, require_checkpoint


def export(
    checkpoint: Checkpoint,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="The format; docs/export.md has them all.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name, metavar="DIR", help="Directory to be written.", show_default=False
        ),
    ],
    file_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="Of gguf's matrices; f32 by default.", show_default=False),
    ] = None,
    seed: ComparisonSeed = 0,
) -> None:
    """Write a checkpoint in another program's format, with a model card.

    \b
      hf      Hugging Face, this project's own classes: any model
      jamba   Hugging Face's JambaForCausalLM: models such as the preset jamba-compat
      mamba   Hugging Face's MambaForCausalLM and Mamba2ForCausalLM
      gguf    llama.cpp's file: what jamba or mamba can hold, tokenizer included

    The logits of the result are compared with the model's own before anything is kept. A model that a format cannot
    express is refused, with every reason.

    \b
      switchmamba export runs/mine --to jamba --out mine-jamba

    docs/export.md says what each format can hold and how to load the result.
    """
    from switchmamba.errors import ConfigError
    from switchmamba.interop import format_named

    format_named(to, importing=False)
    if file_type is not None and to != "gguf":
        raise ConfigError(f"--file-type has no meaning with --to {to}, which keeps fp32; leave it out")
    if out.exists():
        raise ConfigError(f"--out {out} exists; nothing is overwritten: choose another")
    require_checkpoint(checkpoint)

    from switchmamba.interop.conversion import export_checkpoint

    options: dict[str, str] = {} if file_type is None else {"file_type": file_type}
    exported = export_checkpoint(checkpoint, to, out, options, seed)
    typer.echo(
        f"{out}: {to}, logits equal the native model's (relative difference {exported.agreement.relative:.1e})"
    )
    for deviation in exported.deviations:
        typer.echo(f"  {deviation}")
