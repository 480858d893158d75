"""Checkpoints of github.com/state-spaces/mamba: config.json with ``d_model`` and ``n_layer``, and pytorch_model.bin.

Mamba-1, and Mamba-2 where ``ssm_cfg = {"layer": "Mamba2"}``. ``residual_in_fp32`` and ``fused_add_norm`` change how
their program computes, not what; here the residual stream is fp32 anyway. The embedding has ``vocab_size`` rows rounded
up to a multiple of ``pad_vocab_size_multiple``, of which the last are no tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switchmamba.errors import CheckpointError
from switchmamba.interop.backbone import native_config, read_backbone, refuse
from switchmamba.interop.conversion import Read, Source
from switchmamba.interop.foreign_weights import read_weights
from switchmamba.interop.reference import Weights, any_norm, inside, mamba1, mamba2
from switchmamba.interop.verification import Foreign
from switchmamba.models.config import ModelConfig

TOLERANCE = 2e-5
"""Both in fp32; a sequential scan against ours, through dozens of layers."""

NORM_EPS = 1e-5
_EMBEDDING = "embedding"
_TOKENIZER_HINT = (
    " (these checkpoints carry none; the published ones use EleutherAI/gpt-neox-20b's tokenizer.json)"
)

_DEFAULTS: dict[str, Any] = {
    "d_intermediate": 0,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
"""Keys of config.json besides d_model, n_layer and vocab_size, with upstream's defaults."""

_ANY = object()
_SSM_KEYS: dict[str, dict[str, Any]] = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"},
    "Mamba2": {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1},
}
"""Keys of ``ssm_cfg`` that shape a layer, with upstream's defaults."""

_FIXED: dict[str, Any] = {
    "bias": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "D_has_hdim": False,
    "d_ssm": None,
    "conv_bias": _ANY,
    "chunk_size": _ANY,
    "use_fast_path": _ANY,
    "use_mem_eff_path": _ANY,
    "layer": _ANY,
}
"""Keys of ``ssm_cfg`` that may stand there with one value only, or whatever it is."""

_ONLY_INITIALISE = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init")


def import_(source: Source) -> Read:
    """Read a checkpoint; compared with the equations read plainly (``reference``)."""
    config = read_config(source)
    weights = read_weights(source.path)
    _require_biases(weights, source)
    model = read_backbone(weights, config, _EMBEDDING, source.path)
    foreign = Foreign(
        lambda tokens: _logits(weights, config, tokens), lambda tokens: _streams(weights, config, tokens)
    )
    return Read(model, source.tokenizer(_TOKENIZER_HINT), foreign, TOLERANCE)


def _require_biases(weights: Weights, source: Source) -> None:
    if (source.config.get("ssm_cfg") or {}).get("conv_bias", True):
        for name in weights:
            bias = f"{name.removesuffix('weight')}bias"
            if name.endswith(".conv1d.weight") and bias not in weights:
                raise CheckpointError(
                    f"{source.path}: lacks the tensor {bias} (ssm_cfg.conv_bias is not false)"
                )


def read_config(source: Source) -> ModelConfig:
    """Translate config.json; ConfigError lists everything that cannot be expressed here."""
    given = _DEFAULTS | source.config
    ssm = given["ssm_cfg"] or {}
    if not isinstance(ssm, dict):
        refuse(source.path, [f"ssm_cfg = {ssm!r} is no table"])
    kind = ssm.get("layer", "Mamba1")
    reasons = [
        f"{key} = {given[key]!r} is unknown here" for key in sorted(given.keys() - _DEFAULTS.keys() - _SIZES)
    ]
    for key in (*sorted(_SIZES), "pad_vocab_size_multiple"):
        if type(given.get(key)) is not int or given[key] < 1:
            reasons.append(f"{key} = {given[key]!r} is no size" if key in given else f"{key} is missing")
    if given["d_intermediate"]:
        reasons.append(f"d_intermediate = {given['d_intermediate']}: its gated feed-forwards are not read")
    if given["attn_layer_idx"]:
        reasons.append(f"attn_layer_idx = {given['attn_layer_idx']}: its attention layers are not read")
    if kind not in _SSM_KEYS:
        reasons.append(f"ssm_cfg.layer = {kind!r} is neither Mamba1 nor Mamba2")
    known = _SSM_KEYS.get(kind, {})
    for key, value in ssm.items():
        if key in known or key in _ONLY_INITIALISE or _FIXED.get(key) is _ANY:
            continue
        if key not in _FIXED or value != _FIXED[key]:
            rule = f"only {_FIXED[key]!r} is" if key in _FIXED else "the key is not"
            reasons.append(f"ssm_cfg.{key} = {value!r}: {rule} supported")
    refuse(source.path, reasons)
    shape = known | {key: value for key, value in ssm.items() if key in known}
    if kind == "Mamba2":
        layer = {
            "kind": "mamba2",
            "head_dim": shape.pop("headdim"),
            "num_groups": shape.pop("ngroups"),
        } | shape
    else:
        layer = {"kind": "mamba"} | shape
    multiple = given["pad_vocab_size_multiple"]
    return native_config(
        str(source.path),
        vocab_size=given["vocab_size"] + -given["vocab_size"] % multiple,
        d_model=given["d_model"],
        num_blocks=given["n_layer"],
        layer=layer,
        norm="rmsnorm" if given["rms_norm"] else "layernorm",
        norm_eps=NORM_EPS,
        tie_embeddings=given["tie_embeddings"],
    )


_SIZES = {"d_model", "n_layer", "vocab_size"}


def _logits(weights: Weights, config: ModelConfig, tokens_BL: Tensor) -> Tensor:
    hidden_BLD = _streams(weights, config, tokens_BL)[config.num_blocks - 1]
    hidden_BLD = any_norm(hidden_BLD, inside(weights, "backbone.norm_f."), NORM_EPS)
    head = "backbone.embedding.weight" if config.tie_embeddings else "lm_head.weight"
    return F.linear(hidden_BLD, weights[head])


def _streams(weights: Weights, config: ModelConfig, tokens_BL: Tensor) -> dict[int, Tensor]:
    (layer,) = config.layers.values()
    x_BLD = F.embedding(tokens_BL, weights["backbone.embedding.weight"])
    streams = {-1: x_BLD}
    for number in range(config.num_blocks):
        w = inside(weights, f"backbone.layers.{number}.")
        u_BLD, mixer = any_norm(x_BLD, inside(w, "norm."), NORM_EPS), inside(w, "mixer.")
        if layer.kind == "mamba2":
            y_BLD = mamba2(
                u_BLD, mixer, -torch.exp(mixer["A_log"]), layer.num_groups, layer.d_state, NORM_EPS
            )
        else:
            y_BLD = mamba1(u_BLD, mixer, -torch.exp(mixer["A_log"]))
        streams[number] = x_BLD = x_BLD + y_BLD
    return streams
