"""Held-out loss during training: mean cross-entropy in nats per target, dropless (``eval()``)."""

from collections.abc import Iterable
from math import isfinite

import torch

from switchmamba.data.sampler import Batch
from switchmamba.errors import DataError, NonFiniteError
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import TrainingConfig
from switchmamba.training.losses import compute_losses
from switchmamba.training.train_step import split


@torch.no_grad()
def validate(model: LanguageModel, batches: Iterable[Batch], config: TrainingConfig) -> float:
    """Return the mean cross-entropy over all targets of ``batches``.

    Raises:
        DataError: the batches have no target that counts.
        NonFiniteError: the loss is no number.
    """
    model.eval()
    device = model.device
    total, num_targets = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        num_targets += batch.num_targets
        for micro_batch in split(batch, config.micro_batch_size or config.batch_size, device):
            total += compute_losses(model, *micro_batch, config).cross_entropy_sum.cpu()
    if not num_targets:
        raise DataError(
            "no target of the held-out batches counts; raise training.validation_batches, set data.context_length to a "
            "whole example, or hold out more text"
        )
    loss = float(total) / num_targets
    if not isfinite(loss):
        raise NonFiniteError(
            f"the validation loss is {loss}: the model overflows on held-out text; "
            "continue from an earlier checkpoint, or use fp32"
        )
    return loss
