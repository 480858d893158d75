"""What the commands that run a checkpoint have in common: which one, where, on how many threads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchmamba.errors import ConfigError

if TYPE_CHECKING:
    from switchmamba.models.loading import Loaded

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="A run (its newest valid checkpoint) or a checkpoint.", show_default=False
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, … or auto, a GPU if there is one.", metavar="NAME"
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; all cores by default.", show_default=False)
]
AllowNonCausal = Annotated[bool, typer.Option("--allow-non-causal", help="Accept a model that looks ahead.")]
AllowBatchDependence = Annotated[
    bool, typer.Option("--allow-batch-dependence", help="Accept a model whose rows change each other.")
]


def require_checkpoint(path: Path) -> None:
    """Refuse at once, without torch and without reading weights, what is no checkpoint."""
    if not path.is_dir() or not any(path.iterdir()):
        from switchmamba.checkpoint import verify_directory

        verify_directory(path)  # says why


def load_checkpoint(path: Path, device: str, threads: int | None) -> "Loaded":
    """Load a model and its tokenizer; :class:`ConfigError` for a device that is not there."""
    import torch

    from switchmamba.models.loading import load

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in names or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"--device {device} is not here; choose auto, {', '.join(n for n in names if n != 'cuda')}"
        )
    return load(path, device)
