"""``switchmamba import``: make a native checkpoint of another program's model."""

from pathlib import Path
from typing import Annotated

import typer

from switchmamba.cli.model_options import ComparisonSeed, directory_name


def import_(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A directory with config.json and weights.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=directory_name, metavar="CKPT", help="Directory of the new checkpoint.", show_default=False
        ),
    ],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FORMAT", help="The format; guessed from config.json.", show_default=False
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The model's tokenizer.json, where PATH has none.", show_default=False
        ),
    ] = None,
    seed: ComparisonSeed = 0,
) -> None:
    """Make a native checkpoint of another program's model, to be evaluated, run and trained on.

    \b
      hf            Hugging Face, this project's own classes
      jamba         Hugging Face's JambaForCausalLM
      mamba         Hugging Face's MambaForCausalLM and Mamba2ForCausalLM
      state-spaces  checkpoints of github.com/state-spaces/mamba

    The logits of both are compared before anything is kept. No code and no pickle in PATH is executed; a
    pytorch_model.bin is read as tensors only.

    \b
      switchmamba import mamba-130m --tokenizer gpt-neox-20b/tokenizer.json --out ours
      switchmamba evaluate ours --data data

    docs/export.md says what can be read.
    """
    from switchmamba.errors import ConfigError
    from switchmamba.interop import format_named

    if from_ is not None:
        format_named(from_, importing=True)
    if out.exists():
        raise ConfigError(f"--out {out} exists; checkpoints are never overwritten: choose another")

    from switchmamba.interop.conversion import import_checkpoint

    agreement = import_checkpoint(path, out, from_, tokenizer, seed)
    typer.echo(f"{out}: from {path}, logits equal (relative difference {agreement.relative:.1e})")
