"""A row's continuation as a directory on disk: a text that was read once can be continued in another process.

A verified directory (:mod:`switchmamba.checkpoint`) with ``state.safetensors``: the model's state and the state of
the row's random numbers. The manifest holds the last token and a fingerprint of the model, so that the state
of another model is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.checkpoint import read_tensors, verify_directory, write_directory
from switchmamba.errors import CheckpointError
from switchmamba.generation.generate import Continuation
from switchmamba.models.language_model import LanguageModel

TENSORS = "state.safetensors"
GENERATOR = "generator"
KIND = "generation state"


def save_state(
    path: Path, model: LanguageModel, continuation: Continuation, more: Mapping[str, Any] | None = None
) -> None:
    """Write ``continuation`` as the new directory ``path``, atomically; ``more`` are JSON values to be kept with it.

    Raises:
        CheckpointError: ``path`` exists already.
        SwitchMambaError: it cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in continuation.state.tensors().items()}
    tensors[GENERATOR] = continuation.generator.get_state()

    def write_tensors(file: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, file)

    own = {"kind": KIND, "model": fingerprint(model), "token": continuation.token}
    extra = {**(more or {}), **own}
    write_directory(path, {TENSORS: write_tensors}, extra)


def load_state(path: Path, model: LanguageModel) -> Continuation:
    """Read what :func:`save_state` wrote, for the same model; continuing equals never having stopped.

    Raises:
        CheckpointError: damaged, no generation state, or another model's.
    """
    extra = verify_directory(path).extra
    if extra.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a generation state; make one with generate --save-state")
    if extra.get("model") != fingerprint(model):
        raise CheckpointError(
            f"{path}: the state of another model; load the checkpoint that it was saved with"
        )
    token = extra.get("token")
    if type(token) is not int or not 0 <= token < model.config.vocab_size:
        raise CheckpointError(
            f"{path}: token {token!r} is not in the vocabulary of {model.config.vocab_size}"
        )
    tensors = read_tensors(path / TENSORS)
    generator_state = tensors.pop(GENERATOR, torch.empty(0))
    _check_shapes(path / TENSORS, tensors, model)
    generator = torch.Generator()
    try:
        generator.set_state(generator_state)
    except (TypeError, RuntimeError):
        raise CheckpointError(
            f"{path / TENSORS}: {GENERATOR} is not the state of a random generator"
        ) from None
    state = model.state_from_tensors(tensors).to(model.device)
    return Continuation(state, token, generator)


@torch.inference_mode()
def _check_shapes(file: Path, tensors: dict[str, Tensor], model: LanguageModel) -> None:
    """Hold the tensors against the states of one and of two tokens: sizes that differ there (a cache) are free."""
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    one = model.hidden_states(token_11).state.tensors()
    two = model.hidden_states(token_11.expand(1, 2)).state.tensors()
    if tensors.keys() != one.keys():
        name = min(tensors.keys() ^ one.keys())
        raise CheckpointError(f"{file}: {name} is {'unknown' if name in tensors else 'missing'}")
    cache_lengths = set()
    for name, tensor in tensors.items():
        first, second = one[name], two[name]
        fits = tensor.dtype == first.dtype and tensor.dim() == first.dim()
        for size, after_one, after_two in zip(tensor.shape, first.shape, second.shape, strict=False):
            if after_one != after_two:
                cache_lengths.add(size)
            elif size != after_one:
                fits = False
        if not fits:
            shape = tuple(tensor.shape)
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} {shape}, the model has {tuple(first.shape)}"
            )
    if len(cache_lengths) > 1:
        raise CheckpointError(f"{file}: caches of different lengths {sorted(cache_lengths)}")


def fingerprint(model: LanguageModel) -> str:
    """Return a sha256 over the configuration and every weight; about a second per GB."""
    digest = hashlib.sha256(json.dumps(model.config.model_dump(mode="json"), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
