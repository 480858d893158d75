"""Every arm of experiment files as a training step on a GPU: captured against launch by launch, speed, memory.

    python -m benchmarks.gpu_variants experiments/moe-mamba/*.toml experiments/routing/routers-25m.toml
    python -m benchmarks.gpu_variants experiments/moe-mamba/ratio.toml --arms ratio-4-2,ratio-5-1 --out runs/ratios.json

The captured step must have the losses of the launched one, bit for bit. Where it has not in a model with attention,
both are taken once more with attention as matrix products, and must have them then: the backward pass of its fused
kernels adds up in whichever order blocks end, so two launched runs differ as well.
Batches are random tokens; arms that train the same model are measured once.
"""

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from switchmamba.data.sampler import Batch
from switchmamba.experiments.runner import resolve_run
from switchmamba.experiments.spec import read_experiment
from switchmamba.models.accounting import account
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.balance import changes_with_steps
from switchmamba.training.config import RunConfig, resolve
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.parts import freeze
from switchmamba.training.step_graph import StepGraph
from switchmamba.training.train_step import launch_step

STEPS_BEFORE, STEPS = 6, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="experiment files")
    parser.add_argument("--arms", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    wanted = options.arms.split(",") if options.arms else None
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for file in options.files:
        experiment = read_experiment(file)
        for arm in experiment.arms:
            config = resolve_run(experiment.candidates(arm)[0])
            identity = json.dumps([config.model.model_dump(mode="json"), relevant(config)])
            if identity in seen or (wanted is not None and arm not in wanted):
                continue
            seen.add(identity)
            found.append({"arm": f"{experiment.name}/{arm}"} | measure(config))
            print(line(found[-1]), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(
                    json.dumps({"gpu": torch.cuda.get_device_name(), "arms": found}, indent=1)
                )
    wrong = [row["arm"] for row in found if not row["right"]]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)


def relevant(config: RunConfig) -> list[Any]:
    """Return what of a run, besides its model, changes the step that is measured."""
    training = config.training.model_dump(mode="json")
    names = [
        name
        for name in training
        if name.startswith(("load_balance", "router", "capacity", "expert", "freeze", "batch"))
    ]
    return [config.data.context_length, *(training[name] for name in names)]


def measure(config: RunConfig) -> dict[str, Any]:
    """Take some steps launch by launch and the same ones as a graph; ``right``: the losses are finite and alike."""
    config = resolve(config, config.model.vocab_size, "cuda")
    counts = account(config.model)
    launched, captured = take(config, graph=False), take(config, graph=True)
    apart = distance(launched["losses"], captured["losses"])
    again = distance(launched["losses"], take(config, graph=False)["losses"]) if apart else 0.0
    attends = any(layer.kind == "attention" for layer in config.model.layers.values())
    unfused = apart_in_matrix_products(config) if apart and attends and captured["captured"] else apart
    return {
        "parameters": counts.parameters,
        "active_parameters": counts.active_parameters,
        "tokens_per_second": captured["speed"],
        "tokens_per_second_launched": launched["speed"],
        "captured": captured["captured"],
        "peak_gb": captured["peak_gb"],
        "losses": [captured["losses"][0], captured["losses"][-1]],
        "largest_difference": apart,
        "launched_again": again,
        "largest_difference_without_fused_attention": unfused,
        "right": all(map(math.isfinite, captured["losses"])) and (unfused == 0 or not captured["captured"]),
    }


def apart_in_matrix_products(config: RunConfig) -> float:
    """Return how far the losses of the captured and the launched step are apart without fused attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return distance(*(take(config, graph=graph)["losses"] for graph in (False, True)))


def distance(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def take(config: RunConfig, *, graph: bool) -> dict[str, Any]:
    """Train a fresh model for a few steps on one batch of random tokens."""
    gc.collect()
    torch.cuda.empty_cache()
    training = config.training
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LanguageModel(config.model)
    freeze(model, training.freeze)
    optimizer = build_optimizer(model, training)
    shape = (training.batch_size, config.data.context_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)
    step_graph = StepGraph(model, optimizer, training) if graph and not changes_with_steps(training) else None
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        if step_graph is not None:
            return step_graph.launch(batch, training.learning_rate).result().loss
        return launch_step(model, optimizer, batch, training, training.learning_rate).result().loss

    losses = [step() for _ in range(STEPS_BEFORE)]
    start = time.perf_counter()
    losses += [step() for _ in range(STEPS)]
    seconds = (time.perf_counter() - start) / STEPS
    return {
        "losses": losses,
        "speed": training.batch_size * config.data.context_length / seconds,
        "captured": step_graph is not None and step_graph.captured,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def line(row: dict[str, Any]) -> str:
    how = "captured" if row["captured"] else "launch by launch"
    return (
        f"{row['arm']:44} {row['parameters'] / 1e6:8.1f}M {row['active_parameters'] / 1e6:6.2f}M "
        f"{row['tokens_per_second']:11,.0f} tok/s, launched {row['tokens_per_second_launched']:9,.0f} "
        f"{row['peak_gb']:6.1f} GB  loss {row['losses'][0]:.3f} → {row['losses'][1]:.3f}  {how}, "
        f"apart {row['largest_difference']:.1e}, launched again {row['launched_again']:.1e}, "
        f"without fused attention {row['largest_difference_without_fused_attention']:.1e}  "
        f"{'ok' if row['right'] else 'WRONG'}"
    )


if __name__ == "__main__":
    main()
