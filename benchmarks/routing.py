"""The table of docs/routing.md that runs fill: loss, balance and speed of every arm of an experiment.

    python -m benchmarks.routing runs/routers-small

Loss is the last held-out one. Balance is the mean over the last quarter of the steps and over routers: load of the
fullest expert over the mean load, entropy of the router's distribution over that of a uniform one, and experts without
a token; dropped is the share of assignments over capacity, of expert choice the share of tokens that no expert took.
Speed is measured anew, one thread, a training step of every arm in turn, the median of 15 rounds: so that what else the
machine does falls on all arms alike.
"""

import json
import sys
from math import log
from pathlib import Path
from statistics import mean, median
from time import perf_counter

import torch

from switchmamba.config import validate
from switchmamba.experiments.results import Results, read_results
from switchmamba.models.accounting import account
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import RunConfig
from switchmamba.training.inputs import Inputs
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.parts import freeze
from switchmamba.training.train_step import train_step


def main(directory: Path) -> None:
    print("| arm | held-out loss | largest load | entropy | dead | dropped | active parameters | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    results = read_results(directory)
    speeds = measure(results)
    for arm in results.arms:
        for result in arm.runs:
            lines = [
                json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()
            ]
            config = validate(RunConfig, result.config or {}, str(result.directory))
            routers = [router for line in lines[-len(lines) // 4 :] for router in line["routers"]]
            uniform = log(len(routers[0]["fraction"]))
            cells = (
                arm.label,
                f"{result.metrics.final_validation_loss:.3f}",
                f"{mean(router['largest_load'] for router in routers):.2f}",
                f"{mean(router['entropy'] for router in routers) / uniform:.2f}",
                f"{mean(router['dead'] for router in routers):.2f}",
                f"{100 * mean(router['dropped'] for router in routers):.1f} %",
                f"{account(config.model).active_parameters:,}",
                f"{speeds[arm.name]:,.0f}",
            )
            print(f"| {' | '.join(cells)} |")


def measure(results: Results) -> dict[str, float]:
    """Return the tokens per second that each arm trains at, by its name."""
    torch.set_num_threads(1)
    steps, seconds = {}, {arm.name: [] for arm in results.arms}
    for arm in results.arms:
        config = validate(RunConfig, arm.runs[0].config or {}, arm.name)
        model = LanguageModel(config.model)
        freeze(model, config.training.freeze)
        batch = Inputs.open(Path(results.record.data), config).batch(0, config)
        steps[arm.name] = (model, build_optimizer(model, config.training), batch, config.training)
    for _ in range(15):
        for name, (model, optimizer, batch, training) in steps.items():
            start = perf_counter()
            train_step(model, optimizer, batch, training, training.learning_rate)
            seconds[name].append(perf_counter() - start)
    tokens = batch.tokens_BL.numel()
    return {name: tokens / median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
