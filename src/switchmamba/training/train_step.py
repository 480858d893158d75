"""One optimizer step: forward and backward over the micro-batches, check, clip, update.

The gradient is that of the mean cross-entropy over all targets of the whole batch, however it is cut into
micro-batches; the auxiliary losses of a micro-batch count by its share of the sequences. Loss and
gradient are looked at before the
weights are touched: the one moment where the host waits for the device.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from switchmamba.data.sampler import Batch
from switchmamba.errors import NonFiniteError
from switchmamba.layers.interface import RouterStats
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import TrainingConfig
from switchmamba.training.losses import auxiliary_loss, compute_losses


@dataclass(frozen=True)
class StepResult:
    """What one step measured.

    Attributes:
        loss: mean cross-entropy over the batch's targets, nats.
        grad_norm: norm of the whole gradient before clipping.
        router_stats: one per router, over the whole batch, detached.
    """

    loss: float
    grad_norm: float
    router_stats: tuple[RouterStats, ...]


def train_step(
    model: LanguageModel, optimizer: AdamW, batch: Batch, config: TrainingConfig, learning_rate: float
) -> StepResult:
    """Update the model on one batch.

    Raises:
        NonFiniteError: NaN or infinity in the loss or the gradient; names where it begins; the weights
            are as before.
    """
    model.train()
    optimizer.zero_grad()
    try:
        cross_entropy, router_stats = _accumulate_gradients(model, batch, config)
    except NonFiniteError as error:  # a router refuses NaN, but does not know what its layer is called
        raise NonFiniteError(_explain(model, batch, config, float("nan"), float("nan"))) from error

    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss, grad_norm = torch.stack([cross_entropy, total_norm.float()]).tolist()
    if not torch.isfinite(torch.tensor([loss, grad_norm])).all():
        raise NonFiniteError(_explain(model, batch, config, loss, grad_norm))
    if config.gradient_clip is not None:
        clip_grads_with_norm_(parameters, config.gradient_clip, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return StepResult(loss, grad_norm, router_stats)


def _accumulate_gradients(
    model: LanguageModel, batch: Batch, config: TrainingConfig
) -> tuple[Tensor, tuple[RouterStats, ...]]:
    """Run forward and backward over the micro-batches; return the mean cross-entropy and the routers' sums."""
    num_targets = max(1, batch.num_targets)
    device = model.head_weight.device
    cross_entropy = torch.zeros((), device=device)
    router_stats: tuple[RouterStats, ...] = ()
    for micro_batch in split(batch, config.micro_batch_size or config.batch_size, device):
        losses = compute_losses(model, *micro_batch, config)
        objective = losses.cross_entropy_sum / num_targets
        auxiliary = auxiliary_loss(losses.router_stats, config)
        if auxiliary is not None:
            objective = objective + auxiliary * (len(micro_batch[0]) / len(batch.tokens_BL))
        objective.backward()  # type: ignore[no-untyped-call]
        cross_entropy += losses.cross_entropy_sum.detach() / num_targets
        router_stats = _add(router_stats, tuple(stats.detach() for stats in losses.router_stats))
    return cross_entropy, router_stats


def split(
    batch: Batch, micro_batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Iterate over (tokens, targets, document_ids) on ``device``, ``micro_batch_size`` rows at a time."""
    for start in range(0, len(batch.tokens_BL), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        ids = batch.document_ids_BL
        yield (
            batch.tokens_BL[rows].to(device, non_blocking=True),
            batch.targets_BL[rows].to(device, non_blocking=True),
            None if ids is None else ids[rows].to(device, non_blocking=True),
        )


def _add(total: tuple[RouterStats, ...], more: tuple[RouterStats, ...]) -> tuple[RouterStats, ...]:
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else more


def _explain(
    model: LanguageModel, batch: Batch, config: TrainingConfig, loss: float, grad_norm: float
) -> str:
    remedy = "the weights are as before this step; lower the learning rate, clip harder, or use fp32"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name} holds NaN or infinity; continue from an earlier checkpoint"
    if torch.isfinite(torch.tensor(loss)):
        # A bad gradient spreads towards the input: of the bad parameters, it began at the last.
        bad = [
            name
            for name, p in model.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        where = f"first at parameter {bad[-1]}" if bad else "every part is finite, their norm overflows"
        return f"the gradient's norm is {grad_norm} ({where}); {remedy}"
    where = first_non_finite_module(model, batch, config) or "the head's cross-entropy"
    return f"the loss is {loss}: NaN or infinity comes first out of {where}; {remedy}"


@torch.no_grad()
def first_non_finite_module(model: LanguageModel, batch: Batch, config: TrainingConfig) -> str | None:
    """Run the batch again and name the first module whose output is not finite; None if all are."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        for micro_batch in split(
            batch, config.micro_batch_size or config.batch_size, model.head_weight.device
        ):
            with suppress(NonFiniteError):
                compute_losses(model, *micro_batch, config)
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
