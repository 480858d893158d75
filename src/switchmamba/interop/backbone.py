"""The naming that state-spaces/mamba and Hugging Face's Mamba share, and its translation to ours.

    backbone.embedding.weight (Hugging Face: embeddings)     embedding.weight
    backbone.layers.N.norm.weight                            layers.N.norm.weight
    backbone.layers.N.mixer.*                                layers.N.mamba.*
    backbone.norm_f.weight                                   final_norm.weight
    lm_head.weight                                           head.weight

Inside a mixer our parameters bear upstream's names, so nothing is renamed or reshaped there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.config import validate
from switchmamba.errors import ConfigError
from switchmamba.interop.foreign_weights import Tensors, with_biases
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel

LAYER = "mamba"
"""The name of the one layer of these models, Mamba-2's too."""


def translations(config: ModelConfig, embedding: str) -> Iterator[tuple[str, str]]:
    """Yield the name here and the name there of every parameter, a tied head excepted."""
    for name in _parameter_names(config):
        if name.startswith("embedding."):
            yield name, f"backbone.{embedding}.weight"
        elif name.startswith("head."):
            yield name, "lm_head.weight"
        elif name.startswith("final_norm."):
            yield name, name.replace("final_norm", "backbone.norm_f")
        else:
            number, module, parameter = name.removeprefix("layers.").split(".", 2)
            yield name, f"backbone.layers.{number}.{'norm' if module == 'norm' else 'mixer'}.{parameter}"


def _parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in LanguageModel(config).named_parameters()]


def read_backbone(
    weights: dict[str, Tensor], config: ModelConfig, embedding: str, source: Path
) -> LanguageModel:
    """Build the native model from tensors of that naming; CheckpointError for tensors that are missing or left over.

    A convolution without a bias becomes one with a bias of 0.
    """
    model = LanguageModel(config).eval()
    left = Tensors(with_biases(weights), source)
    with torch.no_grad():
        for (_, there), parameter in zip(translations(config, embedding), model.parameters(), strict=True):
            parameter.copy_(left.take(there, tuple(parameter.shape)))
    if config.tie_embeddings:
        left.take_tied_head("lm_head.weight", model.embedding.weight)
    left.finish()
    return model


def write_backbone(model: LanguageModel, embedding: str) -> dict[str, Tensor]:
    """Return the model's tensors by that naming; a tied head is left out."""
    pairs = zip(translations(model.config, embedding), model.parameters(), strict=True)
    return {there: parameter.detach().contiguous() for (_, there), parameter in pairs}


def native_config(source: str, **fields: Any) -> ModelConfig:
    """Return the configuration of a stack of one layer; ``fields`` are those of ``model``, ``layer`` its layer's."""
    layer = fields.pop("layer")
    tables = fields | {"pattern": [LAYER], "layers": {LAYER: layer}, "final_norm": True}
    try:
        return validate(ModelConfig, tables, source=source)
    except ConfigError as error:
        raise ConfigError(f"{error}; this model cannot be imported") from None


def refuse(source: Path, reasons: list[str]) -> None:
    """Raise ConfigError with all reasons why a model cannot be expressed here, if there are any."""
    if reasons:
        raise ConfigError(f"{source}: cannot be imported: {'; '.join(reasons)}")
