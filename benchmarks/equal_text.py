"""Whether archived runs read this text in this order: how well their losses follow how hard its batches are.

    python -m benchmarks.equal_text data/english experiments/moe-mamba/results/main-25m

A batch is as hard as pairs of its tokens are rare: the mean of −log(0.7 c(a, b) / c(a) + 0.3 c(b) / N), with counts c
in the training split of N tokens (pairs hashed to 2²⁶ places, the one at hand left out). Printed is the correlation of
that with each finished run's losses after its first fifth, both minus the mean of the noted steps beside them. It is
near 0 for another text or order, and for a run that blew up, whose loss follows nothing.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from switchmamba.data.sampler import Sampler
from switchmamba.data.shards import TokenShards
from switchmamba.experiments.results import due_runs, read_results, read_run
from switchmamba.training.config import RunConfig

PLACES = 2**26
MOST_STEPS = 90


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="prepared text")
    parser.add_argument("archives", type=Path, nargs="+", help="directories of experiments")
    options = parser.parse_args()
    shards = TokenShards.open(options.data, "train")
    hardness = measure_of(shards)

    @cache
    def of_batch(seed: int, length: int, size: int, step: int) -> float:
        batch = sampler(seed, length).batch((step - 1) * size, size)
        return hardness(batch.tokens_BL.numpy(), batch.targets_BL.numpy())

    @cache
    def sampler(seed: int, length: int) -> Sampler:
        return Sampler(shards, length, seed, reset_state=False)

    for archive in options.archives:
        for run in due_runs(read_results(archive).experiment, archive):
            result = read_run(archive, run)
            if not result.finished:
                continue
            config = RunConfig.model_validate(result.config)
            late = np.flatnonzero(result.metrics.step_S > result.metrics.steps / 5)[:MOST_STEPS]
            of_run = (config.training.seed, config.data.context_length, config.training.batch_size)
            hard_S = np.array(
                [of_batch(*of_run, step) for step in result.metrics.step_S[late].astype(int).tolist()]
            )
            together = np.corrcoef(apart(hard_S), apart(result.metrics.loss_S[late]))[0, 1]
            blew_up = "" if result.metrics.spike is None else "  blew up"
            print(f"{together:+.2f}  {archive.name}/{run.name}{blew_up}", flush=True)


def measure_of(shards: TokenShards) -> Callable[[Any, Any], float]:
    """Return what says how hard tokens (B, L) and their targets (B, L) are, in nats."""
    tokens = np.concatenate([shards.document(i) for i in range(shards.num_documents)])
    count = np.bincount(tokens, minlength=shards.vocab_size)
    pairs = np.bincount(place(tokens[:-1], tokens[1:], shards.vocab_size), minlength=PLACES)

    def hardness(before: Any, after: Any) -> float:
        seen = np.maximum(pairs[place(before, after, shards.vocab_size)] - 1, 0)
        return float(-np.log(0.7 * seen / count[before] + 0.3 * count[after] / len(tokens)).mean())

    return hardness


def place(before: Any, after: Any, vocab_size: int) -> Any:
    """Return where pairs of tokens are counted."""
    return (before.astype(np.int64) * vocab_size + after) % PLACES


def apart(values_S: Any) -> Any:
    """Return values minus the mean of their neighbours, the first and last left out."""
    return values_S[1:-1] - (values_S[:-2] + values_S[2:]) / 2


if __name__ == "__main__":
    main()
