"""An optimizer step as a CUDA graph: the host replays it in one call instead of making some 900 launches.

What a step needs from the host lies in fixed places that are filled before each replay: the batch and the learning
rate. The first steps run launch by launch, so that every kernel is compiled and the optimizer has its state.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

from switchmamba.data.sampler import Batch
from switchmamba.layers.interface import RouterStats
from switchmamba.models.language_model import LanguageModel
from switchmamba.ops.cuda_graph import CannotCaptureError, capture
from switchmamba.training.config import TrainingConfig
from switchmamba.training.train_step import (
    LaunchedStep,
    count_targets,
    guarded_update,
    launch_step,
    on_device,
    pinned,
)

logger = logging.getLogger("switchmamba")

_STEPS_BEFORE = 3


class _Captured(NamedTuple):
    """The graph and its fixed places."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    learning_rate: Tensor
    measured: Tensor
    router_stats: tuple[RouterStats, ...]


class StepGraph:
    """Launches the steps of one run; every batch must have the same shape.

    The graph keeps the activations of a step for itself, beside the memory that validation uses.
    """

    def __init__(self, model: LanguageModel, optimizer: AdamW, config: TrainingConfig) -> None:
        self._model, self._optimizer, self._config = model, optimizer, config
        self._captured: _Captured | None = None
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        reason = model.why_not_capturable(dtype)
        if reason is not None:
            logger.warning(
                "training.cuda_graph: a step is not captured, it runs launch by launch: %s", reason
            )
        self._possible = reason is None and not (config.activation_recompute or config.compile)
        self._taken = 0
        # The first steps run beside the default stream, because a capture refuses what was done on that.
        self._stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]

    @property
    def captured(self) -> bool:
        """The graph exists."""
        return self._captured is not None

    def launch(self, batch: Batch, learning_rate: float) -> LaunchedStep:
        """Queue a step, as :func:`switchmamba.training.train_step.launch_step` does."""
        self._taken += 1
        if self._captured is None and self._possible and self._taken > _STEPS_BEFORE:
            self._try_to_capture(batch)
        captured = self._captured
        if captured is None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step = launch_step(self._model, self._optimizer, batch, self._config, learning_rate)
            torch.cuda.current_stream().wait_stream(self._stream)
            return step
        for place, tensor in zip(_tensors(captured.batch), _tensors(batch), strict=True):
            place.copy_(pinned(tensor), non_blocking=True)
        captured.learning_rate.fill_(learning_rate)
        captured.graph.replay()
        return LaunchedStep(
            self._model, self._optimizer, batch, self._config, captured.measured, captured.router_stats
        )

    def _try_to_capture(self, batch: Batch) -> None:
        try:
            self._captured = self._capture(batch)
        except CannotCaptureError as reason:
            self._possible = False
            logger.warning(
                "training.cuda_graph: a step cannot be captured, it runs launch by launch: %s", reason
            )

    def _capture(self, batch: Batch) -> _Captured:
        device = self._model.device
        # In fp64, so that what a group multiplies it by gives the bits that launching gives.
        learning_rate = torch.zeros((), dtype=torch.float64, device=device)
        place = on_device(batch, device)
        self._optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the first steps used: the graph has memory of its own
        graph, (measured, router_stats) = capture(
            lambda: guarded_update(
                self._model, self._optimizer, place, self._config, learning_rate, count_targets(place)
            ),
            device,
            self._stream,
        )
        return _Captured(graph, place, learning_rate, measured, router_stats)


def _tensors(batch: Batch) -> list[Tensor]:
    ids = batch.document_ids_BL
    return [batch.tokens_BL, batch.targets_BL, *([] if ids is None else [ids])]
