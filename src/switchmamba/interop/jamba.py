"""Hugging Face's JambaForCausalLM: config.json, model.safetensors with one tensor per expert, tokenizer.

    ours                                        theirs
    layers.2i.norm, layers.(2i+1).norm          model.layers.i.input_layernorm, pre_ff_layernorm
    layers.2i.mamba.*                           model.layers.i.mamba.*
    layers.2i.attention.*                       model.layers.i.self_attn.*
    layers.(2i+1).mlp.up_proj, down_proj        model.layers.i.feed_forward.gate_proj and up_proj, down_proj
    layers.(2i+1).moe.router                    model.layers.i.feed_forward.router
    layers.(2i+1).moe.w1_EFD, w2_EDF            model.layers.i.feed_forward.experts.e.{gate,up,down}_proj
    embedding, final_norm, head                 model.embed_tokens, model.final_layernorm, lm_head

A model without attention gets one more layer, whose outputs are 0: their cache and llama.cpp need a layer with
attention. Importing leaves such a layer out again.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.interop.backbone import refuse
from switchmamba.interop.conversion import Native, Read, Source, Written
from switchmamba.interop.foreign_weights import Tensors, read_weights, with_biases
from switchmamba.interop.hugging_face import (
    TOLERANCE,
    USAGE,
    foreign,
    read_config,
    unused_rows,
    write_config,
    write_tokenizer,
    write_weights,
)
from switchmamba.interop.jamba_shape import JambaShape, jamba_shape
from switchmamba.models.language_model import LanguageModel

MAX_POSITIONS = 262144
"""Jamba's own. Nothing in the model depends on it; programs take it for the longest context that they offer."""

_MAMBA = (
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "x_proj.weight",
    "dt_layernorm.weight",
    "b_layernorm.weight",
    "c_layernorm.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "A_log",
    "D",
    "out_proj.weight",
)
_ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.final_layernorm.weight",
    "head.weight": "lm_head.weight",
}

_VLLM = "The tensors bear the names that vLLM's loader of `JambaForCausalLM` reads; it has not been tried."

ADDED_LAYER = (
    "One attention layer was added behind the last layer, because the programs that run Jamba need one. The weights of "
    "its outputs are 0: it adds nothing, exactly."
)


def export(native: Native, directory: Path) -> Written:
    """Write the folder; it is read back by transformers, and that model compared."""
    shape = jamba_shape(native.model.config)
    write_weights(to_jamba(native.model, shape), directory)
    write_config(jamba_config(shape), native.tokenizer.end_of_text_id, directory)
    write_tokenizer(native.tokenizer, directory)
    return Written(
        foreign("JambaForCausalLM", directory, steps_per_layer=2),
        TOLERANCE,
        f"{USAGE}\n\n{_VLLM}",
        deviations=((ADDED_LAYER,) if shape.adds_attention else ()) + unused_rows(native),
        front_matter={"library_name": "transformers"},
    )


def import_(source: Source) -> Read:
    """Read a folder; compared with what transformers makes of it."""
    shape, weights = read_shape(source), read_weights(source.path)
    if _is_idle(weights, shape):
        shape = replace(shape, layers=shape.layers[:-1], adds_attention=True)
    model = from_jamba(weights, shape, bool(source.config.get("tie_word_embeddings")), source.path)
    theirs = foreign("JambaForCausalLM", source.path, steps_per_layer=2)
    return Read(model, source.tokenizer(), theirs, TOLERANCE)


def to_jamba(model: LanguageModel, shape: JambaShape) -> dict[str, Tensor]:
    """Return the model's tensors by Jamba's names, with those of an added layer."""
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ours.setdefault("head.weight", ours["embedding.weight"].clone())  # written untied
    theirs = {there: ours[here] for here, there in _WHOLE.items()}
    names = [step[0] for step in model.config.steps]
    for i, (mixer, feed_forward) in enumerate(shape.layers):
        for here, there in _mixer_names(i, mixer, names[2 * i]):
            theirs[there] = ours[here]
        prefix, target = f"layers.{2 * i + 1}.{names[2 * i + 1]}", f"model.layers.{i}.feed_forward"
        theirs[f"model.layers.{i}.pre_ff_layernorm.weight"] = ours[f"layers.{2 * i + 1}.norm.weight"]
        if feed_forward == "mlp":
            theirs |= _split(target, ours[f"{prefix}.up_proj.weight"], ours[f"{prefix}.down_proj.weight"])
            continue
        theirs[f"{target}.router.weight"] = ours[f"{prefix}.router.weight"]
        w1_EFD, w2_EDF = ours[f"{prefix}.w1_EFD"], ours[f"{prefix}.w2_EDF"]
        for expert in range(shape.num_experts):
            theirs |= _split(f"{target}.experts.{expert}", w1_EFD[expert], w2_EDF[expert])
    if shape.adds_attention:
        theirs |= _idle_layer(shape)
    return {name: tensor.contiguous() for name, tensor in theirs.items()}


def from_jamba(weights: dict[str, Tensor], shape: JambaShape, tied: bool, source: Path) -> LanguageModel:
    """Build the native model of Jamba's tensors; CheckpointError for tensors that are missing or left over."""
    config = shape.native(str(source))
    model = LanguageModel(config).eval()
    left, d_model, width = Tensors(with_biases(weights), source), shape.d_model, shape.d_ff

    def read(prefix: str) -> tuple[Tensor, Tensor]:
        gate, up = (left.take(f"{prefix}.{name}_proj.weight", (width, d_model)) for name in ("gate", "up"))
        return torch.cat([gate, up]), left.take(f"{prefix}.down_proj.weight", (d_model, width))

    found: dict[str, Tensor] = {}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for here, there in _WHOLE.items():
        again = tied and here == "head.weight"
        found[here] = found["embedding.weight"] if again else left.take(there, expected[here])
    if tied:
        left.take_tied_head(_WHOLE["head.weight"], found["embedding.weight"])
    for i, (mixer, feed_forward) in enumerate(shape.layers):
        for here, there in _mixer_names(i, mixer, mixer):
            found[here] = left.take(there, expected[here])
        prefix, target = f"layers.{2 * i + 1}", f"model.layers.{i}.feed_forward"
        found[f"{prefix}.norm.weight"] = left.take(f"model.layers.{i}.pre_ff_layernorm.weight", (d_model,))
        if feed_forward == "mlp":
            found[f"{prefix}.mlp.up_proj.weight"], found[f"{prefix}.mlp.down_proj.weight"] = read(target)
            continue
        found[f"{prefix}.moe.router.weight"] = left.take(
            f"{target}.router.weight", (shape.num_experts, d_model)
        )
        experts = [read(f"{target}.experts.{expert}") for expert in range(shape.num_experts)]
        found[f"{prefix}.moe.w1_EFD"] = torch.stack([w1 for w1, _ in experts])
        found[f"{prefix}.moe.w2_EDF"] = torch.stack([w2 for _, w2 in experts])
    if shape.num_layers > len(shape.layers):
        for name in _idle_layer(shape):
            left.take(name, tuple(weights[name].shape))
    left.finish()
    model.load_state_dict(found)
    return model


def _mixer_names(i: int, mixer: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield the names here and there of layer i's first norm and mixer; ``name`` is the mixer's here."""
    yield f"layers.{2 * i}.norm.weight", f"model.layers.{i}.input_layernorm.weight"
    module = "mamba" if mixer == "mamba" else "self_attn"
    for parameter in _MAMBA if mixer == "mamba" else _ATTENTION:
        yield f"layers.{2 * i}.{name}.{parameter}", f"model.layers.{i}.{module}.{parameter}"


def _split(prefix: str, w1_FD: Tensor, w2_DF: Tensor) -> dict[str, Tensor]:
    gate, up = w1_FD.chunk(2)
    return {
        f"{prefix}.gate_proj.weight": gate,
        f"{prefix}.up_proj.weight": up,
        f"{prefix}.down_proj.weight": w2_DF,
    }


def _idle_layer(shape: JambaShape) -> dict[str, Tensor]:
    """Return the tensors of the added layer: all 0 but the norms."""
    i, d_model = len(shape.layers), shape.d_model
    kv_width = d_model // shape.num_heads * shape.num_kv_heads
    layer, zeros = f"model.layers.{i}", torch.zeros
    tensors = {
        f"{layer}.input_layernorm.weight": torch.ones(d_model),
        f"{layer}.pre_ff_layernorm.weight": torch.ones(d_model),
        f"{layer}.self_attn.q_proj.weight": zeros(d_model, d_model),
        f"{layer}.self_attn.k_proj.weight": zeros(kv_width, d_model),
        f"{layer}.self_attn.v_proj.weight": zeros(kv_width, d_model),
        f"{layer}.self_attn.o_proj.weight": zeros(d_model, d_model),
    }
    w1_FD, w2_DF = zeros(2 * shape.d_ff, d_model), zeros(d_model, shape.d_ff)
    if shape.all_layers[-1][1] == "mlp":
        return tensors | _split(f"{layer}.feed_forward", w1_FD, w2_DF)
    tensors[f"{layer}.feed_forward.router.weight"] = zeros(shape.num_experts, d_model)
    for expert in range(shape.num_experts):
        tensors |= _split(f"{layer}.feed_forward.experts.{expert}", w1_FD.clone(), w2_DF.clone())
    return tensors


def jamba_config(shape: JambaShape) -> dict[str, Any]:
    """Return config.json, without special tokens."""
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "expert_layer_period": shape.experts[0],
        "expert_layer_offset": shape.experts[1],
        "attn_layer_period": shape.attention[0],
        "attn_layer_offset": shape.attention[1],
        "mamba_expand": shape.expand,
        "mamba_d_state": shape.d_state,
        "mamba_d_conv": shape.d_conv,
        "mamba_dt_rank": shape.dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def read_shape(source: Source) -> JambaShape:
    """Return the shape that a config.json describes; ConfigError lists what cannot be expressed here."""
    config = read_config("JambaConfig", source)
    reasons = []
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act = {config.hidden_act!r} (only 'silu' is known here)")
    if config.mamba_proj_bias:
        reasons.append("mamba_proj_bias = true (projections have no biases here)")
    refuse(source.path, reasons)
    layers: Any = tuple(
        (mixer, "moe" if experts > 1 else "mlp")
        for mixer, experts in zip(config.layers_block_type, config.layers_num_experts, strict=True)
    )
    return JambaShape(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        layers=layers,
        adds_attention=False,
        attention=(config.attn_layer_period, config.attn_layer_offset),
        experts=(config.expert_layer_period, config.expert_layer_offset),
        d_ff=config.intermediate_size,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        expand=config.mamba_expand,
        d_state=config.mamba_d_state,
        d_conv=config.mamba_d_conv,
        dt_rank=config.mamba_dt_rank,
        norm_eps=config.rms_norm_eps,
    )


def _is_idle(weights: dict[str, Tensor], shape: JambaShape) -> bool:
    """Say whether the last layer is the only one with attention and adds nothing."""
    *others, (mixer, _) = shape.layers
    layer = f"model.layers.{len(others)}."
    outputs = [
        t
        for name, t in weights.items()
        if name.startswith(layer) and ("o_proj" in name or "down_proj" in name)
    ]
    alone = mixer == "attention" and all(other != "attention" for other, _ in others) and len(others) > 0
    return alone and bool(outputs) and not any(bool(t.any()) for t in outputs)
