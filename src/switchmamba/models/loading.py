"""Checkpoints to models and back. What a checkpoint is, on disk, is the business of :mod:`switchmamba.checkpoint`."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from switchmamba.checkpoint import Content, newest_valid, read_json, read_tensors, write_directory
from switchmamba.config import Tables, validate
from switchmamba.data.chat import CHAT_TEMPLATE
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.layers.quantized import quantize_layers
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.quantization import is_quantized, quantize

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


class Loaded(NamedTuple):
    """A model in ``eval()`` mode and its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer


Quantization = Literal["int8"]


def load(
    path: str | Path, device: torch.device | str = "cpu", quantization: Quantization | None = None
) -> Loaded:
    """Load a checkpoint: ``model, tokenizer = load("runs/mine")``.

    The model is in ``eval()`` mode: no expert drops a token. Text goes through the tokenizer and back:

        tokens = torch.tensor([tokenizer.encode("Once upon a time")])
        logits = model(tokens).logits
        text = tokenizer.decode(logits.argmax(-1)[0].tolist())

    Args:
        path: a run directory (its newest valid checkpoint is taken), or one checkpoint.
        device: where the model is put.
        quantization: "int8" stores projections, head and experts in eight bits (``models/quantization.py``).

    Raises:
        CheckpointError: nothing usable there; names the file and what is wrong with it. Nothing in it is executed.
    """
    return load_verified(newest_valid(Path(path)), device, quantization)


def load_verified(
    directory: Path, device: torch.device | str = "cpu", quantization: Quantization | None = None
) -> Loaded:
    """Load a checkpoint that :func:`~switchmamba.checkpoint.newest_valid` returned, without checking it again."""
    with torch.device("meta"):
        model = LanguageModel(read_model_config(directory)).eval()
    assign_weights(model, directory / WEIGHTS)
    if quantization is not None and not is_quantized(model):
        quantize(model)
    return Loaded(model.to(device).eval(), Tokenizer.from_file(directory / TOKENIZER))


def save_model(
    path: str | Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    tables: Tables | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a self-contained checkpoint without training state, atomically, as the new directory ``path``.

    ``tables`` are further tables of its config.json (``data``, ``training``).
    """
    write_directory(Path(path), model_files(model, tokenizer, tables or {}, chat_template), manifest_extra={})


def model_files(
    model: LanguageModel, tokenizer: Tokenizer, tables: Tables, chat_template: str | None = None
) -> dict[str, Content]:
    """Return the files that every checkpoint has, by name, and that of a chat template if there is one."""
    config = tables | {"model": model.config.model_dump(mode="json")}
    weights = unique_tensors(model)

    def write_weights(file: Path) -> None:
        from safetensors.torch import save_file

        save_file(weights, file)

    template: dict[str, Content] = {} if chat_template is None else {CHAT_TEMPLATE: chat_template.encode()}
    return template | {
        CONFIG: json.dumps(config, indent=2).encode(),
        TOKENIZER: lambda file: tokenizer.save(file),
        WEIGHTS: write_weights,
    }


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, contiguous; a tied weight appears once."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def copy_weights(model: LanguageModel, path: Path) -> None:
    """Fill ``model``, which an optimizer may hold already, from a safetensors file that must match it exactly."""
    with torch.device("meta"):
        stored = LanguageModel(model.config)
    assign_weights(stored, path)
    refuse_quantized(stored, path)
    # Copied, not assigned: a parameter's marks (no weight decay) and the optimizer's references stay.
    model.load_state_dict(stored.state_dict())


def refuse_quantized(model: LanguageModel, source: Path) -> None:
    """Raise CheckpointError if ``model``, read from ``source``, is in eight bits and cannot serve but for inference."""
    if is_quantized(model):
        raise CheckpointError(
            f"{source}: is in eight bits, for inference alone; name the checkpoint that it was made of"
        )


def read_model_config(directory: Path) -> ModelConfig:
    """Read the ``model`` table of a checkpoint's config.json."""
    try:
        return validate(
            ModelConfig, read_json(directory / CONFIG).get("model", {}), source=str(directory / CONFIG)
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def read_chat_template(directory: Path) -> str | None:
    """Read the chat template of a verified checkpoint; None if it has none."""
    path = directory / CHAT_TEMPLATE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def assign_weights(model: LanguageModel, path: Path) -> None:
    """Fill ``model`` (on any device, meta included) from a safetensors file; names and shapes must match exactly."""
    tensors = read_tensors(path)
    if any(tensor.dtype == torch.int8 for tensor in tensors.values()) and not is_quantized(model):
        quantize_layers(model)
    expected = dict(model.named_parameters())
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model has not"
        raise CheckpointError(f"{path}: {which} ({len(missing)} missing, {len(unknown)} unknown tensors)")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensors[name].shape)}, the configuration says {tuple(parameter.shape)}"
            )
    # A parameter keeps its marks, such as the one that spares it from weight decay, through its attributes.
    marks = {name: vars(parameter) for name, parameter in expected.items()}
    is_tied = model.config.tie_embeddings and not is_quantized(model)
    tied = {"head.weight": tensors["embedding.weight"]} if is_tied else {}
    model.load_state_dict(tensors | tied, assign=True)
    if is_tied:
        model.head.weight = model.embedding.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(expected[name].requires_grad)
        vars(parameter).update(marks[name])
