"""Which of llama.cpp's architectures a model is, its keys there, and its tensors by the names that gguf's tables know.

    architecture   models
    jamba          interleaved with feed-forwards or experts (``jamba_shape``)
    mamba          nothing but mamba layers      (what ``--to mamba`` can express)
    mamba2         nothing but mamba2 layers     (the same)

Names are those of transformers' checkpoints, from which llama.cpp's converters (conversion/jamba.py, mamba.py) begin;
the gguf package's tables map them. What the converters reshape is reshaped here: experts are stacked, A = −exp(A_log),
the convolution loses its middle dimension; of Mamba-2 A and D are columns and the norm has a row for each group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.interop.backbone import read_backbone, write_backbone
from switchmamba.interop.conversion import Native
from switchmamba.interop.jamba import ADDED_LAYER, MAX_POSITIONS, from_jamba, to_jamba
from switchmamba.interop.jamba_shape import JambaShape, jamba_shape
from switchmamba.interop.mamba import mamba_config
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config
from switchmamba.models.language_model import LanguageModel

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """A model as one of llama.cpp's architectures.

    Attributes:
        tensors: by the names of transformers' checkpoints, the vocabulary cut to the tokenizer's.
        arrays: the same as the file shall hold them, before rounding.
        add_keys: adds the architecture's keys to a GGUFWriter.
        build: makes the native model of such tensors.
        deviations: from the native model.
    """

    architecture: str
    num_layers: int
    tensors: dict[str, Tensor]
    arrays: dict[str, Array]
    add_keys: Callable[[Any], None]
    build: Callable[[dict[str, Tensor]], LanguageModel]
    deviations: tuple[str, ...] = ()


def layout_of(native: Native, source: Path) -> Layout:
    """Return the layout of a model; ConfigError if llama.cpp cannot express it. ``source`` is named in errors."""
    layers = list(native.model.config.layers.values())
    of_one_kind = len(layers) == 1 and isinstance(layers[0], MambaConfig | Mamba2Config)
    return _mamba(native, source) if of_one_kind else _jamba(native, source)


def _jamba(native: Native, source: Path) -> Layout:
    shape = jamba_shape(native.model.config)
    _require_expand_2(shape.expand)
    entries = native.tokenizer.vocab_size
    tensors = _cut(to_jamba(native.model, shape), "model.embed_tokens.weight", entries)

    def build(tensors: dict[str, Tensor]) -> LanguageModel:
        return from_jamba(tensors, shape.with_vocabulary(entries), False, source)

    def add_keys(writer: Any) -> None:
        writer.add_feed_forward_length(shape.d_ff)
        writer.add_head_count(shape.num_heads)
        heads = [shape.num_kv_heads if mixer == "attention" else 0 for mixer, _ in shape.all_layers]
        writer.add_head_count_kv(heads)
        _add_sizes(writer, shape.d_model, shape.num_layers, entries, shape.norm_eps)
        _add_recurrence(writer, shape.d_conv, shape.expand * shape.d_model, shape.d_state, shape.dt_rank)
        if shape.num_experts > 1:
            writer.add_expert_count(shape.num_experts)
            writer.add_expert_used_count(shape.top_k)

    deviations = (ADDED_LAYER,) if shape.adds_attention else ()
    arrays = _with_stacked_experts(tensors, shape)
    return Layout("jamba", shape.num_layers, tensors, _reshaped(arrays, 1), add_keys, build, deviations)


def _mamba(native: Native, source: Path) -> Layout:
    config = native.model.config
    mamba_config(config)  # refuses what it cannot express
    (layer,) = config.layers.values()
    assert isinstance(layer, MambaConfig | Mamba2Config)
    if isinstance(layer, MambaConfig):
        _require_expand_2(int(layer.expand))
    entries, inner = native.tokenizer.vocab_size, layer.d_inner(config.d_model)
    whole = write_backbone(native.model, "embeddings")
    whole.setdefault("lm_head.weight", whole["backbone.embeddings.weight"].clone())
    tensors = _cut(whole, "backbone.embeddings.weight", entries)
    untied = config.model_copy(update={"vocab_size": entries, "tie_embeddings": False})

    def build(tensors: dict[str, Tensor]) -> LanguageModel:
        return read_backbone(tensors, untied, "embeddings", source)

    def add_keys(writer: Any) -> None:
        writer.add_feed_forward_length(0)  # without meaning here, but asked for
        writer.add_head_count(0)
        _add_sizes(writer, config.d_model, len(config.steps), entries, config.norm_eps)
        if isinstance(layer, MambaConfig):
            _add_recurrence(writer, layer.d_conv, inner, layer.d_state, layer.rank(config.d_model))
        else:
            _add_recurrence(writer, layer.d_conv, inner, layer.d_state, layer.num_heads(config.d_model))
            writer.add_ssm_group_count(layer.num_groups)

    groups = layer.num_groups if isinstance(layer, Mamba2Config) else 1
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Layout(layer.kind, len(config.steps), tensors, _reshaped(arrays, groups), add_keys, build)


def _require_expand_2(expand: int) -> None:
    if expand != 2:
        raise ConfigError(f"mamba has expand = {expand}; llama.cpp runs such models with expand = 2 only")


def _cut(tensors: dict[str, Tensor], embedding: str, entries: int) -> dict[str, Tensor]:
    return tensors | {name: tensors[name][:entries] for name in (embedding, "lm_head.weight")}


def _add_sizes(writer: Any, d_model: int, num_layers: int, entries: int, norm_eps: float) -> None:
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(d_model)
    writer.add_block_count(num_layers)
    writer.add_vocab_size(entries)
    writer.add_layer_norm_rms_eps(norm_eps)


def _add_recurrence(writer: Any, d_conv: int, d_inner: int, d_state: int, rank: int) -> None:
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(rank)


def _with_stacked_experts(tensors: dict[str, Tensor], shape: JambaShape) -> dict[str, Array]:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items() if ".experts." not in name}
    for i, (_, feed_forward) in enumerate(shape.all_layers):
        if feed_forward == "moe":
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                experts = (
                    tensors[f"model.layers.{i}.feed_forward.experts.{expert}.{matrix}.weight"]
                    for expert in range(shape.num_experts)
                )
                arrays[stack_name(i, matrix)] = torch.stack(list(experts)).numpy()
    return arrays


def stack_name(layer: int | str, matrix: str) -> str:
    """Return the name by which gguf's tables know the stack of a layer's experts."""
    return f"model.layers.{layer}.mlp.experts.{matrix}.weight"


def _reshaped(arrays: dict[str, Array], groups: int) -> dict[str, Array]:
    reshaped = {}
    for name, array in arrays.items():
        if name.endswith(".A_log"):
            array = -np.exp(array)
            reshaped[name] = array[:, None] if array.ndim == 1 else array
        elif name.endswith(".conv1d.weight"):
            reshaped[name] = array.squeeze(1)
        elif name.endswith(".mixer.norm.weight"):
            reshaped[name] = array.reshape(groups, -1)
        elif name.endswith(".mixer.D") and name.replace(".D", ".dt_bias") in arrays:
            reshaped[name] = array[:, None]
        elif name.endswith(".dt_bias"):
            reshaped[name.replace(".dt_bias", ".dt_proj.bias")] = array
        else:
            reshaped[name] = array
    return reshaped
