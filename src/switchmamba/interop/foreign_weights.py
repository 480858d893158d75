"""Weights that other programs wrote: safetensors, in one file or in shards, or at worst a .bin file.

A .bin file is a pickle. It is read with torch's ``weights_only=True``, which builds tensors and refuses all else; no
other file of that kind is opened anywhere in this package. Convert it to safetensors where you can.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.checkpoint import read_json, read_tensors
from switchmamba.errors import CheckpointError

SAFETENSORS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a foreign checkpoint by name, floats as fp32 on the CPU.

    Raises:
        CheckpointError: no weights there, a file that is damaged, or one that holds more than tensors.
    """
    if (directory / SAFETENSORS).is_file():
        tensors = read_tensors(directory / SAFETENSORS)
    elif (directory / INDEX).is_file():
        tensors = _read_shards(directory)
    elif (directory / BIN).is_file():
        tensors = _read_bin(directory / BIN)
    else:
        raise CheckpointError(f"{directory}: holds no weights: neither {SAFETENSORS}, nor {INDEX}, nor {BIN}")
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


def _read_shards(directory: Path) -> dict[str, Tensor]:
    names: Any = read_json(directory / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{directory / INDEX}: weight_map must map tensors to files")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise CheckpointError(
                f"{directory / INDEX}: {json.dumps(file)} is not a plain file name; refused"
            )
        tensors |= read_tensors(directory / file)
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{directory}: lacks {missing[0]}, which {INDEX} lists ({len(missing)} missing)"
        )
    return tensors


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged or hostile file it raises almost anything
        reason = f"it is damaged or holds more than tensors ({type(error).__name__})"
        raise CheckpointError(f"{path}: refused, {reason}") from None
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise CheckpointError(f"{path}: does not map names to tensors; refused")
    for name, tensor in held.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; refused")
    return held


def with_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with a bias of 0 for every convolution that has none: ours always has one."""
    convolutions = [name.removesuffix("weight") for name in tensors if name.endswith(".conv1d.weight")]
    zeros = {f"{name}bias": torch.zeros(len(tensors[f"{name}weight"])) for name in convolutions}
    return zeros | tensors


class Tensors:
    """Foreign tensors that are taken one by one, so that whatever is left over is noticed."""

    def __init__(self, tensors: dict[str, Tensor], source: Path) -> None:
        self._left, self._source = dict(tensors), source

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Remove and return a tensor; CheckpointError if it is missing or of another shape."""
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"{self._source}: lacks the tensor {name}")
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{self._source}: {name} is {tuple(tensor.shape)}, the configuration says {tuple(shape)}"
            )
        return tensor

    def take_tied_head(self, name: str, embedding: Tensor) -> None:
        """Remove a head that the configuration ties to the embedding; CheckpointError if it is there and another."""
        if name in self._left and not torch.equal(self.take(name, tuple(embedding.shape)), embedding):
            raise CheckpointError(
                f"{self._source}: {name} is not the embedding, to which the configuration ties it"
            )

    def finish(self) -> None:
        """Raise CheckpointError if a tensor was not taken: the model would compute something else without it."""
        if self._left:
            raise CheckpointError(
                f"{self._source}: holds {min(self._left)}, which the model has no place for ({len(self._left)} such)"
            )
