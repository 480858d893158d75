"""Steps of training launched one by one, and as a captured graph, to be compared."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from switchmamba.data.sampler import Batch
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import RunConfig, TrainingConfig
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.parts import freeze
from switchmamba.training.step_graph import StepGraph
from switchmamba.training.train_step import StepResult, launch_step


def skip_if_not_captured_here(model: LanguageModel, training: TrainingConfig) -> None:
    """Skip a test of captured steps on a GPU that is no Hopper, if the model's step cannot be captured there."""
    reason = model.why_not_capturable(torch.bfloat16 if training.precision == "bf16" else torch.float32)
    if reason is not None and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(f"a step is not captured on this GPU: {reason}")


def take(
    config: RunConfig,
    batches: Sequence[Batch],
    device: torch.device,
    *,
    graph: bool,
    prepare: Callable[[LanguageModel], None] = lambda model: None,
) -> tuple[list[StepResult], set[str], set[str]]:
    """Train a fresh model on the batches.

    Args:
        config: of the run, resolved.
        batches: of one shape.
        device: where.
        graph: capture a step; asserts that this came about. On a CPU nothing can be captured: steps are launched.
            Experts are captured on a Hopper GPU in bf16 alone: on an older one the test is skipped.
        prepare: changes the model before its optimizer is built.

    Returns what each step measured, and the names of the parameters that moved and of those that stayed.
    """
    training = config.training
    torch.manual_seed(0)
    model = LanguageModel(config.model).to(device)
    prepare(model)
    freeze(model, training.freeze)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, training)
    results = []
    if graph and device.type == "cuda":
        skip_if_not_captured_here(model, training)
        step_graph = StepGraph(model, optimizer, training)
        for batch in batches:
            results.append(step_graph.launch(batch, training.learning_rate).result())
        assert step_graph.captured
    else:
        for batch in batches:
            results.append(launch_step(model, optimizer, batch, training, training.learning_rate).result())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return results, moved, before.keys() - moved
