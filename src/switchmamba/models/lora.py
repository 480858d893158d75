"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through peft: where they belong, in and out of a model.

    W' = W + (alpha / rank) · B A         A (rank, in) random, B (out, rank) 0 at first; only A and B learn

peft wraps projections (``target_modules``) and the experts' 3-D weights (``target_parameters``: one A and B for each
expert). :func:`lora_targets` computes both lists from a model. They leave out what would go past a wrapper:
convolutions, whose weights kernels take, and routers, which are refused (``layers/wrapping.py``).

A merged model is the plain model again: checkpoints hold merged weights under the plain names, so that whoever loads
them needs no peft; the adapter by itself lies beside them in peft's own format.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from switchmamba.checkpoint import read_tensors
from switchmamba.config import Config, nearest
from switchmamba.errors import CheckpointError, ConfigError
from switchmamba.extras import require
from switchmamba.layers.feed_forward.moe import MoE
from switchmamba.layers.routing import Router
from switchmamba.models.backbone import Backbone
from switchmamba.models.language_model import LanguageModel

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's own names for the files of an adapter."""

_NAME = "default"
_PREFIX = "base_model.model."  # what peft writes before every name, and expects


class LoraSettings(Config):
    """An adapter on a model.

    Attributes:
        rank: r, of every adapted matrix, and of every expert's.
        alpha: the update is scaled by alpha / rank; None: 2 · rank.
        targets: keys of :func:`lora_targets`: kinds of layers, "experts", "embedding", "head"; None: all but these two.
    """

    rank: PositiveInt = 8
    alpha: PositiveInt | None = None
    targets: list[str] | None = None

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: list[str] | None) -> list[str] | None:
        if targets is not None and (not targets or len(set(targets)) < len(targets)):
            raise ValueError("must name at least one, and each once")
        return targets


class LoraTargets(NamedTuple):
    """Full names within the model: ``modules`` for peft's target_modules, ``parameters`` for its target_parameters."""

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def __add__(self, other: "LoraTargets") -> "LoraTargets":  # type: ignore[override]
        """Join two lists."""
        return LoraTargets(self.modules + other.modules, self.parameters + other.parameters)


def lora_targets(model: nn.Module) -> dict[str, LoraTargets]:
    """Return all that an adapter may wrap, by kind of layer (``mamba``, ``attention``, …), ``experts`` and ends.

    The projections of a layer stand under its kind, those of shared experts too; the weights of routed experts, in
    ``moe`` layers and in projections, under ``experts``; ``embedding`` and ``head`` are missing where they share a
    weight, because merging one would change the other.

    Args:
        model: a :class:`LanguageModel`, or whatever holds one or its :class:`Backbone`, without adapters; names are as
            seen from it. A head outside the backbone is what ``get_output_embeddings()`` returns, as transformers'
            models have it; of any other nothing is said.
    """
    backbone = _find(model)
    targets: dict[str, LoraTargets] = {}
    kinds = [backbone.config.layers[name].kind for step in backbone.steps() for name in step.branch_names]
    names = {id(module): name for name, module in model.named_modules()}
    for layer, kind in zip(backbone.iterate_layers(), kinds, strict=True):
        own = names[id(layer)]
        routers = {
            part for module in layer.modules() if isinstance(module, Router) for part in module.modules()
        }
        inside = [
            (f"{own}.{name}" if name else own, module)
            for name, module in layer.named_modules()
            if module not in routers
        ]
        linear = LoraTargets(modules=tuple(name for name, module in inside if isinstance(module, nn.Linear)))
        experts = LoraTargets(
            parameters=tuple(
                f"{name}.{weight}"
                for name, module in inside
                if isinstance(module, MoE)
                for weight in ("w1_EFD", "w2_EDF")
            )
        )
        for key, found in ((kind, linear), ("experts", experts)):
            if found.modules or found.parameters:
                targets[key] = targets.get(key, LoraTargets()) + found
    if not backbone.config.tie_embeddings:
        ends = {"embedding": backbone.embedding, "head": _head(model)}
        targets |= {
            end: LoraTargets(modules=(names[id(module)],))
            for end, module in ends.items()
            if module is not None
        }
    return targets


def _head(model: nn.Module) -> nn.Module | None:
    """Return the map to the vocabulary: a native model's, or what transformers calls the output embeddings."""
    for module in model.modules():
        if isinstance(module, LanguageModel):
            return module.head
        output_embeddings = getattr(module, "get_output_embeddings", None)
        head: nn.Module | None = None if output_embeddings is None else output_embeddings()
        if head is not None:
            return head
    return None


def _find(model: nn.Module) -> Backbone:
    for module in model.modules():
        if isinstance(module, Backbone):
            return module
    raise ConfigError(f"{type(model).__name__} holds no switchmamba.LanguageModel")


def select_targets(model: nn.Module, names: Sequence[str] | None) -> LoraTargets:
    """Return the targets under these keys of :func:`lora_targets`; None: all layers and experts.

    Raises ConfigError for a key that the model has not.
    """
    found = lora_targets(model)
    if names is None:
        names = [name for name in found if name not in ("embedding", "head")]
    chosen = LoraTargets()
    for name in names:
        if name not in found:
            tied = name in ("embedding", "head") and _find(model).config.tie_embeddings
            why = (
                "; embedding and head share a weight here, adapt neither"
                if tied
                else nearest(name, list(found))
            )
            raise ConfigError(f"lora.targets: {name!r} is no part of this model{why}")
        chosen += found[name]
    return chosen


def peft_config(model: nn.Module, settings: LoraSettings) -> Any:
    """Return peft's ``LoraConfig`` for ``model`` as it is without adapters."""
    require("peft", "lora", "LoRA")
    from peft import LoraConfig

    targets = select_targets(model, settings.targets)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
    )


def add_lora(model: LanguageModel, settings: LoraSettings) -> None:
    """Put an adapter into ``model``: its A is drawn from torch's global generator, its B is 0, nothing else learns.

    Raises ConfigError without peft, or for targets that the model has not.
    """
    config = peft_config(model, settings)
    from peft import inject_adapter_in_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)  # peft leaves those of wrapped experts alone
    inject_adapter_in_model(config, model, _NAME)


def has_lora(model: nn.Module) -> bool:
    """Say whether :func:`add_lora` has put an adapter into ``model``."""
    return "peft_config" in vars(model)


def plain_name(name: str) -> str:
    """Return what a parameter is called in a model without adapters."""
    return name.replace(".base_layer", "")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights without the adapter, by their plain names; a tied weight appears once."""
    return {plain_name(name): p.detach() for name, p in model.named_parameters() if ".lora_" not in name}


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights with the adapter added in, by their plain names; what it does not touch is not copied."""
    tensors = base_tensors(model)
    if not has_lora(model):
        return tensors
    with torch.no_grad():
        for name, delta in _updates(model):
            tensors[name] = tensors[name] + delta.to(tensors[name].dtype)
    return tensors


def _updates(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _NAME in {*module.lora_A, *module.lora_embedding_A}:
            weight = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield plain_name(f"{name}.{weight}"), module.get_delta_weight(_NAME)  # type: ignore[attr-defined]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return A and B under the names that peft gives them in a file."""
    from peft import get_peft_model_state_dict

    # Not "auto": it would ask the network whether the vocabulary has grown.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"{_PREFIX}{name}": tensor.detach() for name, tensor in tensors.items()}


def adapter_config(model: LanguageModel) -> bytes:
    """Return peft's adapter_config.json."""
    with TemporaryDirectory() as directory:
        model.peft_config[_NAME].save_pretrained(directory)  # type: ignore[index,union-attr]
        table = json.loads((Path(directory) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    lists = {key: sorted(value) for key, value in table.items() if key.startswith("target_") and value}
    return json.dumps(table | lists | {"inference_mode": True}, indent=2, sort_keys=True).encode()


def load_adapter(model: LanguageModel, directory: Path) -> None:
    """Fill the adapter of ``model`` from the files in a verified checkpoint; names and shapes must match exactly."""
    path = directory / ADAPTER
    tensors, expected = read_tensors(path), adapter_tensors(model)
    if tensors.keys() != expected.keys():
        name = min(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"{path}: {name} is {'unknown' if name in tensors else 'missing'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )
        expected[name].copy_(tensor)
