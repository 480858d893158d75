"""Directories of experiments whose curves are known formulas, as the runner and the trainer would leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from switchmamba.evaluation.perplexity import Evaluation
from switchmamba.evaluation.specialisation import ExpertProfile, LayerProfile, TokenLift
from switchmamba.experiments.analysis import RunAnalysis
from switchmamba.experiments.results import RECORD, ExperimentRecord, due_runs, read_results
from switchmamba.experiments.run_files import analysis_path, run_directory
from switchmamba.experiments.spec import Experiment, Run
from switchmamba.models.presets import presets

Loss = Callable[[np.ndarray, Run], np.ndarray]
"""(steps (S,), run) → loss in nats (S,)."""


def power_law(steps: np.ndarray, run: Run) -> np.ndarray:
    """Mamba falls as 2.5 + 20/√tokens'; MoE-Mamba is the same curve with tokens counted 1.5 times."""
    rate = 1.5 if run.arm == "moe-mamba" else 1.0
    distance = sum(np.log(value / 1e-3) ** 2 for _, value in run.point)
    return 2.5 + 20 / np.sqrt(rate * steps + 8) + 0.03 * distance + 0.004 * run.seed


def comparison(**changes: Any) -> Experiment:
    """The claim of the paper on the demo's presets."""
    tables = {
        "name": "beats-mamba",
        "claim": "At equal steps and active parameters MoE-Mamba reaches a lower loss than Mamba.",
        "expect": ["moe-mamba < mamba"],
        "baseline": "mamba",
        "arms": {
            "mamba": {"preset": "mamba-demo", "label": "Mamba"},
            "moe-mamba": {"preset": "moe-mamba-demo", "label": "MoE-Mamba"},
        },
        "sweep": {"training.learning_rate": [5e-4, 1e-3, 2e-3]},
        "seeds": [0, 1, 2],
    }
    return Experiment.model_validate(tables | changes)


def write_run(
    directory: Path, run: Run, loss: Loss, *, steps: int, taken: int | None = None, noise: float = 0.0
) -> None:
    """Write a run that took ``taken`` of ``steps`` steps; its checkpoint is an empty directory."""
    place = run_directory(directory, run)
    taken = steps if taken is None else taken
    (place / "checkpoints" / f"step-{taken}").mkdir(parents=True)
    config = json.loads(json.dumps(presets[run.preset]))
    config["training"] |= {
        "steps": steps,
        "learning_rate": dict(run.point).get("training.learning_rate", 1e-3),
    }
    config["training"] |= {"seed": run.seed, "loss_ema_alpha": 0.02}
    (place / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(run.seed)
    step_S = np.arange(1, taken + 1)
    smooth_S = loss(step_S, run)
    raw_S = smooth_S + noise * random.standard_normal(taken)
    load = _load(random, taken) if "moe" in run.arm else None
    with (place / "metrics.jsonl").open("w") as file:
        for i, step in enumerate(step_S.tolist()):
            line = {
                "step": step,
                "tokens": step * 2048,
                "loss": float(raw_S[i]),
                "loss_ema": float(smooth_S[i]),
            }
            line |= {"tokens_per_second": 5000.0, "learning_rate": 1e-3, "routers": []}
            if load is not None:
                line["routers"] = [
                    {
                        "fraction": f.tolist(),
                        "dropped": 0.25 - 0.1 * i / taken,
                        "largest_load": float(f.max() * f.size),
                    }
                    for f in load[i]
                ]
            if step % 25 == 0 or step == steps:
                line["validation_loss"] = float(smooth_S[i]) + 0.1
            file.write(json.dumps(line) + "\n")


def write_experiment(
    directory: Path, experiment: Experiment, loss: Loss = power_law, *, steps: int = 400, noise: float = 0.0
) -> None:
    """Write an experiment with all of its runs finished."""
    directory.mkdir(parents=True, exist_ok=True)
    record = ExperimentRecord(
        experiment=experiment,
        data="data",
        corpus="Synthetic curves.",
        hardware="a formula, 1 core",
        software="switchmamba 0",
        threads=1,
        command="switchmamba experiment run beats-mamba.toml --data data --out out",
    )
    (directory / RECORD).write_text(record.model_dump_json())
    for _ in range(2):  # the search first, then what it chose
        for run in due_runs(experiment, directory):
            if not run_directory(directory, run).exists():
                write_run(directory, run, loss, steps=steps, noise=noise)


def write_analyses(directory: Path, step: int) -> None:
    """Evaluation of seed s: loss 3 + s/10; experts of which the third of each layer loves three odd tokens."""
    for run in due_runs(read_results(directory).experiment, directory):
        loss = 3 + run.seed / 10
        evaluation = Evaluation(loss, float(np.exp(loss)), loss / 2, 0.4, 1000, 3000, 12)
        profiles = layers() if run.arm == "moe-mamba" and run.seed == 0 else []
        answers = RunAnalysis(step=step, evaluation=evaluation, specialisation=profiles)
        path = analysis_path(directory, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(answers.model_dump_json())


def layers() -> list[LayerProfile]:
    """Return four layers of eight experts."""
    odd = [TokenLift(text=text, lift=7.5, count=30) for text in ("`a|b`", "<td>\n", "  return")]
    experts = [
        ExpertProfile(
            share=1 / 8, class_shares={"word": e / 28, "number": 1 / 8}, tokens=odd if e == 2 else []
        )
        for e in range(8)
    ]
    return [LayerProfile(layer=y, assignments=5000, information=0.25, experts=experts) for y in range(4)]


def _load(random: np.random.Generator, steps: int) -> np.ndarray:
    """(S, 4, 8): starts uneven, evens out."""
    start = random.dirichlet(np.full(8, 0.8), size=4)
    settle = np.exp(-np.arange(steps) / (steps / 5))[:, None, None]
    load = start * settle + (1 - settle) / 8 + 0.01 * random.random((steps, 4, 8))
    return load / load.sum(-1, keepdims=True)
