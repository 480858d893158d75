"""Hugging Face's MambaForCausalLM and Mamba2ForCausalLM: config.json, model.safetensors, tokenizer.

Stacks of nothing but Mamba layers, or nothing but Mamba-2 layers, behind RMS norms. Tensors bear upstream's names
(``backbone``), but for the embedding. Mamba-2's groups share one eps with the norms before the layers.
"""

from pathlib import Path
from typing import Any

from switchmamba.errors import ConfigError
from switchmamba.interop.backbone import native_config, read_backbone, refuse, write_backbone
from switchmamba.interop.conversion import Native, Read, Source, Written
from switchmamba.interop.foreign_weights import read_weights
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
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.layers.mixers.mamba2 import Mamba2Config
from switchmamba.models.config import ModelConfig

_EMBEDDING = "embeddings"
_CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}


def export(native: Native, directory: Path) -> Written:
    """Write the folder; it is read back by transformers, and that model compared."""
    config = mamba_config(native.model.config)
    write_weights(write_backbone(native.model, _EMBEDDING), directory)
    write_config(config, native.tokenizer.end_of_text_id, directory)
    write_tokenizer(native.tokenizer, directory)
    theirs = foreign(config["architectures"][0], directory, steps_per_layer=1)
    library = {"library_name": "transformers"}
    return Written(theirs, TOLERANCE, USAGE, deviations=unused_rows(native), front_matter=library)


def import_(source: Source) -> Read:
    """Read a folder; compared with what transformers makes of it."""
    config = _read_config(source)
    model = read_backbone(read_weights(source.path), config, _EMBEDDING, source.path)
    theirs = foreign(_CLASSES[source.config["model_type"]], source.path, steps_per_layer=1)
    return Read(model, source.tokenizer(), theirs, TOLERANCE)


def mamba_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json, without special tokens; ConfigError lists everything that it cannot express."""
    reasons: list[str] = []
    layer = next(iter(config.layers.values()))
    if len(config.layers) > 1 or not isinstance(layer, MambaConfig | Mamba2Config):
        reasons.append(
            f"the pattern is {config.written_pattern}, theirs is one mamba or mamba2 layer and nothing else"
        )
    elif layer.expand.denominator != 1:
        reasons.append(f"expand = {layer.expand}, theirs is a whole number")
    if isinstance(layer, MambaConfig) and layer.inner_norm_eps is not None:
        reasons.append(f"inner_norm_eps = {layer.inner_norm_eps:g}, theirs has no norms on Δ, B and C")
    if isinstance(layer, Mamba2Config) and layer.norm_eps != config.norm_eps:
        reasons.append(
            f"norm_eps = {config.norm_eps:g} and of the layer {layer.norm_eps:g}, theirs has one for both"
        )
    if config.norm != "rmsnorm":
        reasons.append(f"model.norm = {config.norm!r}, theirs is 'rmsnorm'")
    if not config.final_norm:
        reasons.append("model.final_norm = false, theirs has a final norm")
    if reasons:
        raise ConfigError(
            f"the model is no Mamba of theirs: {'; '.join(reasons)}. --to hf exports every model"
        )
    assert isinstance(layer, MambaConfig | Mamba2Config)
    written = {
        "architectures": [_CLASSES[layer.kind]],
        "model_type": layer.kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.steps),
        "layer_norm_epsilon": config.norm_eps,
        "state_size": layer.d_state,
        "conv_kernel": layer.d_conv,
        "expand": int(layer.expand),
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if isinstance(layer, MambaConfig):
        inner = layer.d_inner(config.d_model)
        return written | {"time_step_rank": layer.rank(config.d_model), "intermediate_size": inner}
    heads = layer.num_heads(config.d_model)
    return written | {"head_dim": layer.head_dim, "num_heads": heads, "n_groups": layer.num_groups}


def _read_config(source: Source) -> ModelConfig:
    kind = source.config.get("model_type")
    if kind not in _CLASSES:
        raise ConfigError(f"{source.path}: model_type = {kind!r} is neither 'mamba' nor 'mamba2'")
    config = read_config("MambaConfig" if kind == "mamba" else "Mamba2Config", source)
    reasons = []
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act = {config.hidden_act!r} (only 'silu' is known here)")
    if config.use_bias:
        reasons.append("use_bias = true (projections have no biases here)")
    layer = {
        "kind": kind,
        "d_state": config.state_size,
        "d_conv": config.conv_kernel,
        "expand": config.expand,
    }
    if kind == "mamba":
        layer |= {"dt_rank": config.time_step_rank}
    else:
        layer |= {
            "head_dim": config.head_dim,
            "num_groups": config.n_groups,
            "norm_eps": config.layer_norm_epsilon,
        }
        low, high = config.time_step_limit
        if low > 0 or high < float("inf"):
            reasons.append(f"time_step_limit = {list(config.time_step_limit)} (Δ has no limits here)")
    refuse(source.path, reasons)
    return native_config(
        str(source.path),
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        num_blocks=config.num_hidden_layers,
        layer=layer,
        norm="rmsnorm",
        norm_eps=config.layer_norm_epsilon,
        tie_embeddings=config.tie_word_embeddings,
    )
