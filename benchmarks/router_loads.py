"""How even the loads of a run's routers are, and whether they settle, from its ``metrics.jsonl`` or an archive's.

    python -m benchmarks.router_loads 'experiments/moe-mamba/results/main-25m/runs/moe-mamba/learning_rate=0.004/seed=0'

For each noted step, over the routers: the share of tokens above capacity 1.0 (Σ max(0, f − 1/E)), the load of the
fullest expert over its fair share, and the correlation of the experts' loads with those at the noted step before.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from switchmamba.experiments.curves import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a run")
    metrics = read_metrics(parser.parse_args().run / "metrics.jsonl")
    if not metrics.load_WE:
        parser.error("the run has no routers, or has not noted their loads")
    load_RWE = np.stack(metrics.load_WE)
    fair = 1 / load_RWE.shape[2]
    over_RW = np.maximum(load_RWE - fair, 0).sum(2)
    fullest_RW = load_RWE.max(2) / fair
    alike_RW = np.array([[np.corrcoef(a, b)[0, 1] for a, b in pairwise(x)] for x in load_RWE])
    print("million tokens  above capacity 1.0   fullest expert   correlation")
    for i, tokens in enumerate(metrics.load_tokens_W):
        text = f"{tokens / 1e6:14.1f}  {over_RW[:, i].min():7.1%} to {over_RW[:, i].max():6.1%}"
        text += f"   {fullest_RW[:, i].min():4.2f} to {fullest_RW[:, i].max():5.2f}"
        if i:
            text += f"   {alike_RW[:, i - 1].min():+.2f} to {alike_RW[:, i - 1].max():+.2f}"
        print(text)
    print(
        f"correlations: {alike_RW.min():+.2f} to {alike_RW.max():+.2f}, {(abs(alike_RW) <= 0.2).mean():.0%} within ±0.2"
    )


if __name__ == "__main__":
    main()
