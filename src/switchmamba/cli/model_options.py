"""What commands have in common: paths, counts, and which checkpoint is run where, on how many threads."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from switchmamba.errors import ConfigError

if TYPE_CHECKING:
    from switchmamba.data.tokenizer import Tokenizer
    from switchmamba.models.language_model import LanguageModel

logger = logging.getLogger("switchmamba")

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
Quantization = Annotated[
    Literal["int8"] | None,
    typer.Option(
        "--quantization",
        help="Store projections, head and experts in eight bits: less memory; docs/quantization.md has the price.",
        show_default=False,
    ),
]
Temperature = Annotated[float | None, typer.Option(help="Default 1; 0 is --greedy.", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.", show_default=False)]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens that hold this share.")]
MinP = Annotated[
    float, typer.Option(help="Draw from tokens that have at least this share of the first one's.")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="Take the most probable token.")]
AllowNonCausal = Annotated[bool, typer.Option("--allow-non-causal", help="Accept a model that looks ahead.")]
AllowBatchDependence = Annotated[
    bool, typer.Option("--allow-batch-dependence", help="Accept a model whose rows change each other.")
]

ComparisonSeed = Annotated[int, typer.Option(min=0, help="Of the tokens that the logits are compared on.")]


def directory_name(text: str) -> Path:
    """Read the value of an option; the empty one, which ``Path`` takes for the current directory, is refused."""
    if not text:
        raise typer.BadParameter("is empty; name a directory")
    return Path(text)


def counted(number: int, noun: str) -> str:
    """Return ``1 token`` or ``2,000 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def require_checkpoint(path: Path) -> None:
    """Refuse at once, without torch and without reading weights, what is no checkpoint."""
    if not path.is_dir() or not any(path.iterdir()):
        from switchmamba.checkpoint import newest_valid

        newest_valid(path)  # says why


class LoadedCheckpoint(NamedTuple):
    """A model in ``eval()`` mode, its tokenizer, the directory they came from and the step it was saved after.

    The step is None for a model that was not saved by ``train``.
    """

    model: "LanguageModel"
    tokenizer: "Tokenizer"
    path: Path
    step: int | None

    def source(self) -> dict[str, str | int | None]:
        """Say which checkpoint this is, for JSON."""
        return {"checkpoint": str(self.path), "step": self.step}


def load_checkpoint(
    path: Path, device: str, threads: int | None, quantization: Literal["int8"] | None = None
) -> LoadedCheckpoint:
    """Load a model and its tokenizer; :class:`ConfigError` for a device that is not there."""
    import torch

    from switchmamba.checkpoint import newest_valid, saved_step
    from switchmamba.models.loading import load_verified

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in names or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"--device {device} is not here; choose auto, {', '.join(n for n in names if n != 'cuda')}"
        )
    directory = newest_valid(path)
    return LoadedCheckpoint(*load_verified(directory, device, quantization), directory, saved_step(directory))


@contextmanager
def progress_bar(noun: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a callback for what is done, and all of it, that draws a bar of ``noun`` on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(noun), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = console.is_terminal and logger.isEnabledFor(logging.INFO)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(noun, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
