"""AdamW (arXiv 1711.05101) with the right parameters decayed, and its state by parameter name.

A layer marks what no decay may touch with ``parameter._no_weight_decay = True`` (A_log, D, dt bias, as
upstream Mamba does); besides, vectors and scalars (biases, norms) and embeddings are spared.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from switchmamba.errors import CheckpointError
from switchmamba.ops.gpu import needs_triton
from switchmamba.training.config import TrainingConfig
from switchmamba.training.parts import part_names

_SMALL = 1 << 22
"""Numbers below which a tensor is updated together with others."""


class DeviceAdamW(AdamW):
    """AdamW that on a GPU reads and writes each number of a large tensor once, by a kernel of its own where that runs.

    It obeys the same two optional attributes as torch's fused kernel, both () fp32 on the device: gradients are divided
    by ``grad_scale``, and nothing happens where ``found_inf`` is 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is not None or not all(_kernel_serves(p) for p in parameters):
            return super().step(closure)  # type: ignore[no-any-return]
        from switchmamba.training.adamw_triton import update_

        for group in self.param_groups:
            # Parameters, gradients, means, squares, largest squares (of amsgrad: none) and step counts.
            lists: tuple[list[Tensor], ...] = tuple([] for _ in range(6))
            self._init_group(group, *lists)  # type: ignore[no-untyped-call]
            tensors = list(zip(*lists[:4], lists[5], strict=True))
            if not tensors:
                continue
            one = lists[5][0]
            stopped, divisor = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
            stopped = torch.zeros_like(one) if stopped is None else stopped
            divisor = torch.ones_like(one) if divisor is None else divisor
            rate = group["lr"]  # a tensor where a CUDA graph is to read each step's own
            rate = rate if isinstance(rate, Tensor) else torch.full_like(one, rate)
            small = [tensor for tensor in tensors if tensor[0].numel() < _SMALL]
            if small:
                update_together(small, group, rate, divisor, stopped)
            large = [tensor for tensor in tensors if tensor[0].numel() >= _SMALL]
            settings = rate, group["weight_decay"], group["betas"], group["eps"]
            for parameter, gradient, mean, square, step in large:
                update_(parameter, gradient.contiguous(), mean, square, step, divisor, stopped, *settings)
            steps = [step for *_, step in large]
            if steps:  # a single tensor to add would pass through the host
                torch._foreach_add_(steps, [1 - stopped] * len(steps))
        return None


def update_together(
    tensors: Sequence[tuple[Tensor, ...]],
    group: Mapping[str, Any],
    rate: Tensor,
    divisor: Tensor,
    stopped: Tensor,
) -> None:
    """Update small tensors (parameter, gradient, mean, square, step) by torch's kernel, many in one launch."""
    parameters, gradients, means, squares, steps = (list(column) for column in zip(*tensors, strict=True))
    adamw(
        parameters,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=True,
        grad_scale=divisor,
        found_inf=stopped,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=rate,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _kernel_serves(parameter: Tensor) -> bool:
    return (
        parameter.is_cuda
        and parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and needs_triton(parameter.device, parameter.dtype) is None
    )


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Build AdamW over all parameters of ``model`` that learn, in a group for each weight decay and learning rate.

    A group's ``learning_rate_ratio`` is what a step multiplies its learning rate by.
    """
    decayed = decayed_names(model, config)
    ratios = {
        name: ratio
        for part, ratio in config.learning_rate_ratios.items()
        for name in part_names(model, [part])
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if name in decayed else 0.0
            groups.setdefault((decay, ratios.get(name, 1.0)), []).append(parameter)
    return DeviceAdamW(
        [
            {"params": parameters, "weight_decay": decay, "learning_rate_ratio": ratio}
            for (decay, ratio), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def decayed_names(model: nn.Module, config: TrainingConfig) -> set[str]:
    """Return the names of the parameters that weight decay pulls towards zero."""
    if config.weight_decay_scope == "all":
        return {name for name, _ in model.named_parameters()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and id(parameter) not in embeddings
        and not getattr(parameter, "_no_weight_decay", False)
    }


def state_tensors(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return the state as ``<parameter name>.<exp_avg | exp_avg_sq | step>``; empty before the first step."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: AdamW,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    frozen_before: Collection[str] = (),
) -> None:
    """Put :func:`state_tensors` back; CheckpointError names ``source`` and a tensor that does not fit.

    A parameter that does not learn any more loses its state; one of ``frozen_before`` begins without.
    """
    remaining = dict(tensors)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                remaining.pop(f"{name}.{key}", None)
            continue
        if name in frozen_before:
            continue
        state: dict[str, Tensor] = {}
        for key, shape in (
            ("step", torch.Size([])),
            ("exp_avg", parameter.shape),
            ("exp_avg_sq", parameter.shape),
        ):
            tensor = remaining.pop(f"{name}.{key}", None)
            if tensor is None or tensor.shape != shape or tensor.dtype != torch.float32:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{source}: {name}.{key} is {found}, not torch.float32 {list(shape)}")
            state[key] = tensor.to(parameter.device)
        optimizer.state[parameter] = state
    if remaining:
        raise CheckpointError(f"{source}: unknown tensor {min(remaining)}; it belongs to another model")
