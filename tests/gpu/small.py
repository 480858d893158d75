"""Small models and batches, of few shapes: most of the time of these tests is that of compiling kernels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from switchmamba.config import apply_overrides, validate
from switchmamba.data.sampler import IGNORE_INDEX, Batch
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.presets import read_tables
from switchmamba.training.config import RunConfig, resolve

VOCAB = 512
BATCH, LENGTH, STEPS = 4, 256, 8

Overrides = Iterable[tuple[str, Any]]


def model_of(preset: str, device: torch.device, overrides: Overrides = ()) -> LanguageModel:
    """Return the preset's model in fp32 and ``eval()`` mode, the same at every call."""
    tables = apply_overrides(read_tables(preset), [*overrides, ("model.vocab_size", VOCAB)])
    torch.manual_seed(0)
    return LanguageModel(validate(RunConfig, tables, preset).model).to(device).eval()


def run_config(preset: str, device: torch.device, *overrides: tuple[str, Any]) -> RunConfig:
    """Return a run of :data:`STEPS` steps in bf16, unless overridden."""
    settings = [
        ("data.context_length", LENGTH),
        ("training.batch_size", BATCH),
        ("training.steps", STEPS),
        ("training.warmup_steps", 0),
        ("training.learning_rate", 1e-3),
        ("training.precision", "bf16"),
    ]
    tables = apply_overrides(read_tables(preset), [*settings, *overrides])
    return resolve(validate(RunConfig, tables, preset), VOCAB, "cuda" if device.type == "cuda" else "cpu")


def tokens(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


def masked_batches() -> list[Batch]:
    """Return a batch a step, each of two documents a row and with another number of targets; one row has none."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(STEPS):
        rows = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        targets = rows[:, 1:].clone()
        targets[:, : 20 * step] = IGNORE_INDEX
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORE_INDEX
        targets[step % BATCH] = IGNORE_INDEX
        ids = (torch.arange(LENGTH) // (LENGTH // 2)).expand(BATCH, -1).contiguous()
        batches.append(Batch(rows[:, :-1].contiguous(), targets, ids))
    return batches


def relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference by that of ``b``, wherever the two are."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


@torch.inference_mode()
def decoded(model: LanguageModel, tokens_BL: Tensor) -> Tensor:
    """Return the logits (B, L-1, V) behind all tokens but the first, which are read one by one, in place."""
    state = model(tokens_BL[:, :1]).state
    state = model.state_from_tensors({name: tensor.clone() for name, tensor in state.tensors().items()})
    return torch.stack([model.decode_(tokens_BL[:, t], state) for t in range(1, tokens_BL.shape[1])], 1)


@torch.inference_mode()
def logits(model: LanguageModel, tokens_BL: Tensor) -> Tensor:
    return model(tokens_BL).logits
