"""``switchmamba demo``: from nothing to a report on the paper's claim, in minutes."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory for everything the demo makes; continued if it is there.")
    ] = Path("runs/demo"),
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Train about this long instead, by measuring this machine's speed."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Train for exactly this many steps instead.")
    ] = None,
) -> None:
    """Train a small MoE-Mamba and the Mamba matched to it, side by side, and report what came out.

    In a training this short MoE-Mamba still ends above Mamba; docs/moe-mamba-against-mamba.md says why.

    \b
    The text is on every machine: the sources of Python's standard library. At most six minutes on two cores.
      switchmamba demo
      switchmamba demo --out runs/demo --minutes 20
    """
    from switchmamba.errors import ConfigError

    if minutes is not None and steps is not None:
        raise ConfigError("--minutes and --steps exclude each other; give one")

    from rich.console import Console

    from switchmamba.experiments.demo import DemoEvents, run_demo
    from switchmamba.experiments.progress import LiveRuns
    from switchmamba.experiments.results import read_results

    console = Console(highlight=False)

    def stage(name: str, ready: bool) -> None:
        console.print(f"[bold]{name}[/]" + (" [dim](done before, reused)[/]" if ready else ""))

    def text(piece: str) -> None:
        console.print(piece, end="", markup=False, soft_wrap=True, style="cyan")

    with LiveRuns(Console(stderr=True)) as live:
        report = run_demo(out, DemoEvents(stage, live.observe, text), minutes=minutes, steps=steps)
    if report is None:
        console.print(
            f"Stopped; every run saved itself. Continue with: switchmamba demo --out {out}", soft_wrap=True
        )
        return
    console.print("\n")
    for verdict in read_results(out).verdicts():
        console.print(f"[bold]{verdict.sentence}[/]", soft_wrap=True)
    console.print(f"Report: {report.resolve().as_uri()}", soft_wrap=True)
