"""AdamW (arXiv 1711.05101) with the right parameters decayed, and its state by parameter name.

A layer marks what no decay may touch with ``parameter._no_weight_decay = True`` (A_log, D, dt bias, as
upstream Mamba does); besides, vectors and scalars (biases, norms) and embeddings are spared.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from switchmamba.errors import CheckpointError
from switchmamba.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Build AdamW over all parameters of ``model``, in a decayed and a spared group."""
    decayed = [p for name, p in model.named_parameters() if name in decayed_names(model, config)]
    spared = [p for name, p in model.named_parameters() if name not in decayed_names(model, config)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
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
    optimizer: AdamW, model: nn.Module, tensors: Mapping[str, Tensor], source: str
) -> None:
    """Put :func:`state_tensors` back; CheckpointError names ``source`` and a tensor that does not fit."""
    remaining = dict(tensors)
    for name, parameter in model.named_parameters():
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
