"""The table of docs/routing.md that runs fill: loss, balance and speed of every arm of an experiment.

    python -m benchmarks.routing runs/routers-small

Loss is the last held-out one. Balance is the mean over the last quarter of the steps and over routers: load of the
fullest expert over the mean load, entropy of the router's distribution over that of a uniform one, and experts without
a token; dropped is the share of assignments over capacity, of expert choice the share of tokens that no expert took.
Speed is the median over the steps behind the first ten.
"""

import json
import sys
from math import log
from pathlib import Path
from statistics import mean, median

from switchmamba.config import validate
from switchmamba.experiments.results import read_results
from switchmamba.models.accounting import account
from switchmamba.training.config import RunConfig


def main(directory: Path) -> None:
    print("| arm | held-out loss | largest load | entropy | dead | dropped | active parameters | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for arm in read_results(directory).arms:
        for result in arm.runs:
            lines = [
                json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()
            ]
            config = validate(RunConfig, result.config or {}, str(result.directory))
            routers = [router for line in lines[-len(lines) // 4 :] for router in line["routers"]]
            uniform = log(len(routers[0]["fraction"]))
            speed = median(line["tokens_per_second"] for line in lines[10:])
            cells = (
                arm.label,
                f"{result.metrics.final_validation_loss:.3f}",
                f"{mean(router['largest_load'] for router in routers):.2f}",
                f"{mean(router['entropy'] for router in routers) / uniform:.2f}",
                f"{mean(router['dead'] for router in routers):.2f}",
                f"{100 * mean(router['dropped'] for router in routers):.1f} %",
                f"{account(config.model).active_parameters:,}",
                f"{speed:,.0f}",
            )
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
