"""Examples of every layer, and of every kind of model, that the contract tests iterate over.

A new layer adds its example here; `test_every_layer_kind_has_an_example` fails until it does.
"""

import itertools
from typing import get_args

import torch
from torch import Tensor

from switchmamba.config import validate
from switchmamba.layers import AnyLayerConfig
from switchmamba.layers.initialization import ModernInitialization
from switchmamba.layers.interface import Layer, LayerConfig, SequenceInfo
from switchmamba.models.config import ModelConfig

D_MODEL = 24

LAYERS: dict[str, dict] = {
    "mamba": {"kind": "mamba"},
    "mamba-odd-inner": {"kind": "mamba", "expand": "5/3", "d_state": 5, "d_conv": 3, "dt_rank": 3},
    "mamba-one-tap": {"kind": "mamba", "d_conv": 1, "expand": "2/3"},
    "mamba-inner-norms": {"kind": "mamba", "d_state": 5, "dt_rank": 3, "inner_norm_eps": 1e-6},
    **{
        f"inner-moe-{'-'.join(projections)}": {
            "kind": "inner_moe_mamba",
            "projections": list(projections),
            "experts": {"num_experts": 3, "d_expert": 10, "activation": "relu"},
        }
        for n in (1, 2, 3)
        for projections in itertools.combinations(("conv", "gate", "out"), n)
    },
    "inner-moe-odd-inner": {
        "kind": "inner_moe_mamba",
        "expand": "5/3",
        "d_state": 5,
        "projections": ["gate", "out"],
        "experts": {
            "num_experts": 4,
            "d_expert": 7,
            "router": {"top_k": 2},
            "capacity_factor": 1.0,
            "num_shared_experts": 1,
        },
    },
    "inner-moe-bias": {
        "kind": "inner_moe_mamba",
        "projections": ["conv", "out"],
        "experts": {"num_experts": 4, "d_expert": 10, "router": {"kind": "bias_balanced"}},
    },
    "inner-moe-inner-norms": {
        "kind": "inner_moe_mamba",
        "inner_norm_eps": 1e-5,
        "projections": ["gate"],
        "experts": {"num_experts": 3, "d_expert": 10},
    },
    "inner-moe-soft": {
        "kind": "inner_moe_mamba",
        "projections": ["conv", "out"],
        "experts": {"num_experts": 3, "d_expert": 10, "router": {"kind": "soft", "slots_per_expert": 2}},
    },
    "inner-moe-expert-choice": {
        "kind": "inner_moe_mamba",
        "projections": ["gate"],
        "experts": {"num_experts": 3, "d_expert": 10, "router": {"kind": "expert_choice"}},
    },
    "mamba2": {"kind": "mamba2", "head_dim": 16, "d_state": 8},
    "mamba2-groups": {
        "kind": "mamba2",
        "head_dim": 5,
        "d_state": 3,
        "expand": "5/3",
        "num_groups": 4,
        "d_conv": 3,
    },
    "attention": {"kind": "attention", "num_heads": 3},
    "attention-without-positions": {"kind": "attention", "num_heads": 8, "rope_base": None},
    "attention-grouped": {"kind": "attention", "num_heads": 6, "num_kv_heads": 2},
    "attention-one-kv-head": {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "rope_base": None},
    "mlp-relu": {"kind": "mlp", "d_ff": 40, "activation": "relu"},
    "mlp-swiglu": {"kind": "mlp", "d_ff": 40, "activation": "swiglu"},
    "moe-switch": {"kind": "moe", "num_experts": 4, "d_expert": 20, "activation": "relu"},
    "moe-capacity": {"kind": "moe", "num_experts": 4, "d_expert": 20, "capacity_factor": 1.0},
    "moe-top-2": {"kind": "moe", "num_experts": 5, "d_expert": 20, "router": {"kind": "top_k", "top_k": 2}},
    "moe-top-2-raw": {
        "kind": "moe",
        "num_experts": 5,
        "d_expert": 20,
        "router": {"kind": "top_k", "top_k": 2, "renormalize": False},
    },
    "moe-temperature": {
        "kind": "moe",
        "num_experts": 5,
        "d_expert": 20,
        "router": {"kind": "top_k", "top_k": 2, "temperature": 0.3},
    },
    "moe-shared": {"kind": "moe", "num_experts": 4, "d_expert": 20, "num_shared_experts": 2},
    "moe-gumbel": {"kind": "moe", "num_experts": 4, "d_expert": 20, "router": {"kind": "gumbel"}},
    "moe-gumbel-top-2": {
        "kind": "moe",
        "num_experts": 5,
        "d_expert": 20,
        "router": {"kind": "gumbel", "top_k": 2, "temperature": 0.5},
        "capacity_factor": 1.5,
    },
    "moe-bias": {"kind": "moe", "num_experts": 4, "d_expert": 20, "router": {"kind": "bias_balanced"}},
    "moe-bias-softmax-top-2": {
        "kind": "moe",
        "num_experts": 5,
        "d_expert": 20,
        "router": {"kind": "bias_balanced", "top_k": 2, "score": "softmax"},
    },
    "moe-policy": {"kind": "moe", "num_experts": 4, "d_expert": 20, "router": {"kind": "policy_gradient"}},
    "moe-expert-choice": {
        "kind": "moe",
        "num_experts": 4,
        "d_expert": 20,
        "router": {"kind": "expert_choice", "capacity_factor": 1.5},
    },
    "moe-soft": {
        "kind": "moe",
        "num_experts": 3,
        "d_expert": 20,
        "router": {"kind": "soft", "slots_per_expert": 2},
    },
    "moe-one-expert": {"kind": "moe", "num_experts": 1, "d_expert": 20, "activation": "gelu"},
}

NON_CAUSAL = {"moe-expert-choice", "moe-soft", "inner-moe-soft", "inner-moe-expert-choice"}
"""Layers that may look ahead; the contract holds them to saying so, and to keeping rows and documents apart."""

PATTERNS: dict[str, list] = {
    "mamba": ["mamba"],
    "moe-mamba": ["mamba", "moe-switch"],
    "moe-mamba-top-2": ["mamba", "moe-top-2"],
    "moe-mamba-parallel": [["mamba", "moe-switch"]],
    "moe-mamba-parallel-norms": [["mamba", "moe-switch"], "mlp-relu"],
    "inner-moe-every-layer": ["inner-moe-conv-gate-out"],
    "inner-moe-every-other-layer": ["mamba", "inner-moe-out"],
    "mamba2": ["mamba2"],
    "moe-mamba2": ["mamba2-groups", "moe-switch"],
    "transformer": ["attention", "mlp-relu"],
    "transformer-moe": ["attention", "moe-capacity"],
    "moe-mamba-shared": ["mamba", "moe-shared"],
    "jamba": ["mamba-inner-norms", "moe-top-2-raw", "attention-one-kv-head", "mlp-swiglu"],
    "hybrid": ["mamba-odd-inner", "moe-top-2", "attention", "mlp-swiglu", "mamba-one-tap"],
}

FIELDS: dict[str, dict] = {"moe-mamba-parallel-norms": {"norm_per_branch": True}}
"""What else a pattern's model configures."""

KINDS = {
    get_args(member)[0] if get_args(member) else member for member in get_args(get_args(AnyLayerConfig)[0])
}


def layer_config(name: str) -> LayerConfig:
    return model_config([name]).layers[name]


def build_layer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    layer = layer_config(name).build(D_MODEL)
    layer.initialize(ModernInitialization(num_residual_steps=2))
    return layer.to(dtype)


def model_config(pattern: list, **fields: object) -> ModelConfig:
    names = {name for entry in pattern for name in ([entry] if isinstance(entry, str) else entry)}
    tables = {
        "vocab_size": 50,
        "d_model": D_MODEL,
        "num_blocks": 2,
        "pattern": pattern,
        "layers": {name: LAYERS[name] for name in names},
    }
    return validate(ModelConfig, tables | fields, source="test")


def example_model(name: str, **fields: object) -> ModelConfig:
    return model_config(PATTERNS[name], **FIELDS.get(name, {}), **fields)


def one_document(batch: int, position: int = 0) -> SequenceInfo:
    zeros = torch.zeros(batch, dtype=torch.int64)
    return SequenceInfo(None, None, zeros + position, zeros)


def documents(ids_BL: Tensor, position: int = 0, before_B: Tensor | None = None) -> SequenceInfo:
    """Packed documents, negative ids padding; ``position`` tokens came before, the last of documents ``before_B``."""
    zeros = torch.zeros(ids_BL.shape[0], dtype=torch.int64)
    return SequenceInfo(ids_BL, ids_BL < 0, zeros + position, zeros if before_B is None else before_B)
