"""One optimizer step: forward and backward over the micro-batches, check, clip, update.

The gradient is that of the mean cross-entropy over all targets of the whole batch, however it is cut into
micro-batches; the auxiliary losses of a micro-batch count by its share of the sequences. Loss and gradient are looked
at before the weights are touched: on a CPU by the host, on a GPU by the device itself, so that the host can queue the
next step meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from switchmamba.data.sampler import IGNORE_INDEX, Batch
from switchmamba.errors import NonFiniteError
from switchmamba.layers.interface import RouterStats
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.balance import follow_loads_
from switchmamba.training.config import TrainingConfig
from switchmamba.training.losses import auxiliary_loss, compute_losses


@dataclass(frozen=True)
class StepResult:
    """What one step measured.

    Attributes:
        loss: mean cross-entropy over the batch's targets, nats; None where none counts.
        grad_norm: norm of the whole gradient before clipping.
        router_stats: one per router, over the whole batch, detached.
    """

    loss: float | None
    grad_norm: float
    router_stats: tuple[RouterStats, ...]


def train_step(
    model: LanguageModel, optimizer: AdamW, batch: Batch, config: TrainingConfig, learning_rate: float
) -> StepResult:
    """Update the model on one batch, and wait for it.

    Raises:
        NonFiniteError: NaN or infinity in the loss or the gradient; names where it begins; the weights
            are as before.
    """
    if model.device.type != "cpu":
        return launch_step(model, optimizer, batch, config, learning_rate).result()
    cross_entropy, total_norm, router_stats = _measure(model, optimizer, batch, config)
    loss, grad_norm = torch.stack([cross_entropy, total_norm]).tolist()
    if not (isfinite(loss) and isfinite(grad_norm)):
        raise NonFiniteError(_explain(model, batch, config, loss, grad_norm))
    if config.gradient_clip is not None:
        clip_grads_with_norm_(_with_gradients(model), config.gradient_clip, total_norm)
    _set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    follow_loads_(model, router_stats, config.router_bias_rate)
    return StepResult(_mean_of(batch, loss), grad_norm, router_stats)


def launch_step(
    model: LanguageModel, optimizer: AdamW, batch: Batch, config: TrainingConfig, learning_rate: float
) -> "LaunchedStep":
    """Queue an update of the model on one batch and return without waiting for the device.

    The device itself looks at loss and gradient. From the first step on that is not finite it changes no weight any
    more, also in steps that are queued behind it, until :meth:`LaunchedStep.result` has raised. The gradient is clipped
    inside the optimizer's kernel.
    """
    place, num_targets = batch, None
    if model.device.type == "cuda":
        place = on_device(batch, model.device)
        num_targets = count_targets(place)
    measured, router_stats = guarded_update(model, optimizer, place, config, learning_rate, num_targets)
    return LaunchedStep(model, optimizer, batch, config, measured, router_stats)


def guarded_update(
    model: LanguageModel,
    optimizer: AdamW,
    batch: Batch,
    config: TrainingConfig,
    learning_rate: float | Tensor,
    num_targets: Tensor | None = None,
) -> tuple[Tensor, tuple[RouterStats, ...]]:
    """Do all of :func:`launch_step` that the device does; return loss and norm (2,), and the routers' sums.

    With ``num_targets`` and a batch on the device nothing passes through the host, and a CUDA graph can hold it.
    """
    cross_entropy, total_norm, router_stats = _measure(model, optimizer, batch, config, num_targets)
    measured = torch.stack([cross_entropy, total_norm])
    finite = torch.isfinite(measured).all()
    # What AdamW's fused kernel looks at: no update where found_inf is 1, and gradients are divided by grad_scale.
    if getattr(optimizer, "found_inf", None) is None:
        optimizer.found_inf = torch.zeros_like(total_norm)  # type: ignore[attr-defined]
    optimizer.found_inf.clamp_(min=(~finite).float())  # type: ignore[attr-defined]
    if config.gradient_clip is not None:
        optimizer.grad_scale = ((total_norm + 1e-6) / config.gradient_clip).clamp(min=1)  # type: ignore[attr-defined]
    _set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    follow_loads_(model, router_stats, config.router_bias_rate, optimizer.found_inf)  # type: ignore[attr-defined]
    return measured, router_stats


class LaunchedStep:
    """A step that the device may still be busy with."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamW,
        batch: Batch,
        config: TrainingConfig,
        measured: Tensor,
        router_stats: tuple[RouterStats, ...],
    ) -> None:
        self._model, self._optimizer, self._batch, self._config = model, optimizer, batch, config
        names = [f.name for f in fields(RouterStats) if f.name != "top_k"]
        tensors = [measured, *(getattr(stats, name) for stats in router_stats for name in names)]
        self._measured, *copies = _copies_on_the_host(tensors)
        own: list[dict[str, Any]] = [
            dict(zip(names, copies[i * len(names) :], strict=False)) for i in range(len(router_stats))
        ]
        self._router_stats = tuple(
            replace(stats, **values) for stats, values in zip(router_stats, own, strict=True)
        )
        self._copied = torch.cuda.Event() if measured.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def result(self) -> StepResult:
        """Wait for this step, not for those behind it, and return what it measured, on the host.

        Raises:
            NonFiniteError: as :func:`train_step`; the gradients are computed again to find where it begins.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm = self._measured.tolist()
        if not (isfinite(loss) and isfinite(grad_norm)):
            self._optimizer.found_inf.zero_()  # type: ignore[attr-defined]
            _measure(self._model, self._optimizer, self._batch, self._config)
            raise NonFiniteError(_explain(self._model, self._batch, self._config, loss, grad_norm))
        return StepResult(_mean_of(self._batch, loss), grad_norm, self._router_stats)


def _mean_of(batch: Batch, loss: float) -> float | None:
    """Return the loss, or None for the 0 of a batch in which nothing counts: that is no loss."""
    return loss if loss or batch.num_targets else None


def _copies_on_the_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Queue one transfer per dtype; the copies hold their values once the device has come that far."""
    copies = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors}:
        own = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].flatten() for i in own]).to("cpu", non_blocking=True)
        pieces = torch.split(flat, [tensors[i].numel() for i in own])
        for i, values in zip(own, pieces, strict=True):
            copies[i] = values.view(tensors[i].shape)
    return copies


def _measure(
    model: LanguageModel,
    optimizer: AdamW,
    batch: Batch,
    config: TrainingConfig,
    num_targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[RouterStats, ...]]:
    """Compute the gradients; return the mean cross-entropy (), their norm () fp32, and the routers' sums."""
    model.train()
    optimizer.zero_grad()
    try:
        cross_entropy, router_stats = _accumulate_gradients(
            model, batch, config, max(1, batch.num_targets) if num_targets is None else num_targets
        )
    except NonFiniteError as error:  # a router refuses NaN, but does not know what its layer is called
        raise NonFiniteError(_explain(model, batch, config, float("nan"), float("nan"))) from error
    gradients = [p.grad for p in _with_gradients(model) if p.grad is not None]
    return cross_entropy, get_total_norm(gradients).float(), router_stats


def _with_gradients(model: LanguageModel) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def _set_learning_rate(optimizer: AdamW, learning_rate: float | Tensor) -> None:
    for group in optimizer.param_groups:
        rate = learning_rate * group["learning_rate_ratio"]
        group["lr"] = rate.float() if isinstance(rate, Tensor) else rate


def _accumulate_gradients(
    model: LanguageModel, batch: Batch, config: TrainingConfig, num_targets: int | Tensor
) -> tuple[Tensor, tuple[RouterStats, ...]]:
    """Run forward and backward over the micro-batches; return the mean cross-entropy and the routers' sums."""
    device = model.device
    cross_entropy = torch.zeros((), device=device)
    router_stats: tuple[RouterStats, ...] = ()
    for micro_batch in split(batch, config.micro_batch_size or config.batch_size, device):
        losses = compute_losses(model, *micro_batch, config)
        objective = losses.cross_entropy_sum / num_targets
        auxiliary = auxiliary_loss(losses.router_stats, config, losses.policy_loss)
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


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a GPU, copied from pinned memory: the host need not wait."""
    tokens, targets, ids = (
        None if tensor is None else pinned(tensor).to(device, non_blocking=True)
        for tensor in (batch.tokens_BL, batch.targets_BL, batch.document_ids_BL)
    )
    assert tokens is not None and targets is not None
    return Batch(tokens, targets, ids)


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory; by numpy, because waking torch's threads takes longer than copying."""
    copy = torch.empty_like(tensor, pin_memory=True)
    np.copyto(copy.numpy(), tensor.numpy())
    return copy


def count_targets(batch: Batch) -> Tensor:
    """Return how many targets count, at least 1, as a number on the device."""
    return (batch.targets_BL != IGNORE_INDEX).sum().clamp(min=1)


def _add(total: tuple[RouterStats, ...], more: tuple[RouterStats, ...]) -> tuple[RouterStats, ...]:
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else more


def _explain(
    model: LanguageModel, batch: Batch, config: TrainingConfig, loss: float, grad_norm: float
) -> str:
    remedy = "the weights are as before this step; lower the learning rate, clip harder, or use fp32"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name} holds NaN or infinity; continue from an earlier checkpoint"
    if isfinite(loss):
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
        for micro_batch in split(batch, config.micro_batch_size or config.batch_size, model.device):
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
