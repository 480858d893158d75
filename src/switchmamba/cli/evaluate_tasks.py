"""``switchmamba evaluate --harness``: tasks of the lm-evaluation-harness."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from switchmamba.cli.model_options import LoadedCheckpoint, progress_bar
from switchmamba.extras import require

logger = logging.getLogger("switchmamba")


def check_tasks(names: Sequence[str], directory: Path | None) -> None:
    """Refuse, before a model is loaded, tasks that are not there."""
    require("lm_eval", "eval", "--harness")
    from switchmamba.evaluation.harness import open_tasks

    open_tasks(names, directory)


def evaluate_tasks(
    loaded: LoadedCheckpoint,
    names: Sequence[str],
    directory: Path | None,
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    context_length: int | None,
    as_json: bool,
) -> None:
    """Run tasks and print a table, or JSON with all that the harness returns."""
    from lm_eval.utils import handle_non_serializable

    from switchmamba.evaluation.harness import HarnessModel, open_tasks, run_tasks

    with progress_bar("answers") as report:
        model = HarnessModel(
            loaded.model,
            loaded.tokenizer,
            batch_size=batch_size,
            context_length=context_length,
            progress=report,
        )
        results = run_tasks(model, names, open_tasks(names, directory), num_fewshot=num_fewshot, limit=limit)
    if as_json:
        typer.echo(json.dumps(loaded.source() | _told(results), indent=2, default=handle_non_serializable))
        return
    typer.echo(f"checkpoint  {loaded.path}\n")
    _print({**results["results"], **results.get("groups", {})}, results["n-shot"])


def _print(results: Mapping[str, Mapping[str, Any]], shots: Mapping[str, int]) -> None:
    """Print a line for each metric of each task; the harness names a metric ``name,filter``."""
    width = max(len("task"), *map(len, results))
    typer.echo(f"{'task':<{width}}  {'shots':>5}  {'metric':<24}{'value':>10}    {'standard error':<14}")
    for task, values in results.items():
        for name, value in sorted(values.items()):
            metric, _, filter_name = name.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            error = values.get(f"{metric}_stderr,{filter_name}")
            spread = f"± {error:.4f}" if isinstance(error, float) else ""
            number = f"{value:.4f}" if isinstance(value, float) else str(value)
            typer.echo(
                f"{task:<{width}}  {shots.get(task, ''):>5}  {label:<24}{number:>10}    {spread}".rstrip()
            )


def _told(results: dict[str, Any]) -> dict[str, Any]:
    """Return what tells how well it did and on what, without the harness's description of this machine."""
    names = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better", "lm_eval_version")
    return {name: results[name] for name in names if name in results}
