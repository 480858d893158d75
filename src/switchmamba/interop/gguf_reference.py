"""A GGUF file computed as llama.cpp does (src/models/jamba.cpp, mamba.cpp, mamba2.cpp), a token at a time.

It reads nothing but the file: what stands in no key and no tensor is not known here. Slow, for a few tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switchmamba.interop.reference import Weights, inside, mamba1, mamba2, rms_norm
from switchmamba.interop.verification import Foreign

_MAMBA = {
    "ssm_in.weight": "in_proj.weight",
    "ssm_conv1d.bias": "conv1d.bias",
    "ssm_x.weight": "x_proj.weight",
    "ssm_dt.weight": "dt_proj.weight",
    "ssm_dt.bias": "dt_proj.bias",
    "ssm_d": "D",
    "ssm_out.weight": "out_proj.weight",
}
_NORMS = {"dt": "ssm_dt_norm.weight", "B": "ssm_b_norm.weight", "C": "ssm_c_norm.weight"}


def read_back(path: Path) -> Foreign:
    """Return the model in a file, its weights as fp32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    weights = {
        # ne of GGML is the shape backwards
        t.name: torch.tensor(dequantize(t.data, t.tensor_type)).reshape(*(int(n) for n in reversed(t.shape)))
        for t in reader.tensors
    }
    return Foreign(
        lambda tokens_BL: _head(weights, keys, _streams(weights, keys, tokens_BL)),
        lambda tokens_BL: _streams(weights, keys, tokens_BL),
    )


def _head(weights: Weights, keys: Mapping[str, Any], streams: dict[int, Tensor]) -> Tensor:
    hidden_BLD = rms_norm(streams[max(streams)], weights["output_norm.weight"], _eps(keys))
    return F.linear(hidden_BLD, weights["output.weight"])


def _streams(weights: Weights, keys: Mapping[str, Any], tokens_BL: Tensor) -> dict[int, Tensor]:
    x_BLD, eps = F.embedding(tokens_BL, weights["token_embd.weight"]), _eps(keys)
    streams, architecture = {-1: x_BLD}, keys["general.architecture"]
    for i in range(int(keys[f"{architecture}.block_count"])):
        w = inside(weights, f"blk.{i}.")
        u_BLD = rms_norm(x_BLD, w["attn_norm.weight"], eps)
        if architecture != "jamba":
            x_BLD = x_BLD + (
                _mamba2(u_BLD, w, keys, eps) if architecture == "mamba2" else _mamba(u_BLD, w, eps)
            )
            streams[i] = x_BLD
            continue
        kv_heads = keys["jamba.attention.head_count_kv"][i]
        x_BLD = x_BLD + (_attention(u_BLD, w, keys, kv_heads) if kv_heads else _mamba(u_BLD, w, eps))
        streams[2 * i] = x_BLD
        u_BLD = rms_norm(x_BLD, w["ffn_norm.weight"], eps)
        x_BLD = x_BLD + (_experts(u_BLD, w, keys) if "ffn_gate_inp.weight" in w else _swiglu(u_BLD, w))
        streams[2 * i + 1] = x_BLD
    return streams


def _eps(keys: Mapping[str, Any]) -> float:
    return float(keys[f"{keys['general.architecture']}.attention.layer_norm_rms_epsilon"])


def _mamba(u_BLD: Tensor, w: Weights, eps: float) -> Tensor:
    upstream = {there: w[here] for here, there in _MAMBA.items()}
    upstream["conv1d.weight"] = w["ssm_conv1d.weight"][:, None]
    norms = {name: w[there] for name, there in _NORMS.items() if there in w}
    return mamba1(u_BLD, upstream, w["ssm_a"], (norms, eps) if norms else None)


def _mamba2(u_BLD: Tensor, w: Weights, keys: Mapping[str, Any], eps: float) -> Tensor:
    upstream = {
        "in_proj.weight": w["ssm_in.weight"],
        "conv1d.weight": w["ssm_conv1d.weight"][:, None],
        "conv1d.bias": w["ssm_conv1d.bias"],
        "dt_bias": w["ssm_dt.bias"],
        "D": w["ssm_d"][:, 0],
        "norm.weight": w["ssm_norm.weight"].flatten(),
        "out_proj.weight": w["ssm_out.weight"],
    }
    groups, states = (int(keys[f"mamba2.ssm.{name}"]) for name in ("group_count", "state_size"))
    return mamba2(u_BLD, upstream, w["ssm_a"][:, 0], groups, states, eps)


def _attention(u_BLD: Tensor, w: Weights, keys: Mapping[str, Any], kv_heads: int) -> Tensor:
    heads, length = int(keys["jamba.attention.head_count"]), u_BLD.shape[1]

    def split(name: str, count: int) -> Tensor:
        projected = F.linear(u_BLD, w[f"attn_{name}.weight"])
        return projected.view(*projected.shape[:2], count, -1).transpose(1, 2)

    q, k, v = split("q", heads), split("k", kv_heads), split("v", kv_heads)
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return F.linear(y.transpose(1, 2).flatten(2), w["attn_output.weight"])


def _swiglu(u_BLD: Tensor, w: Weights) -> Tensor:
    gate, up = (F.linear(u_BLD, w[f"ffn_{name}.weight"]) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, w["ffn_down.weight"])


def _experts(u_BLD: Tensor, w: Weights, keys: Mapping[str, Any]) -> Tensor:
    probability = F.linear(u_BLD, w["ffn_gate_inp.weight"]).softmax(-1)
    y_BLD = torch.zeros_like(u_BLD)
    for row, position in torch.cartesian_prod(*(torch.arange(n) for n in u_BLD.shape[:2])).tolist():
        weight, chosen = probability[row, position].topk(int(keys["jamba.expert_used_count"]))
        for share, expert in zip(weight, chosen.tolist(), strict=True):
            one = {
                f"ffn_{name}.weight": w[f"ffn_{name}_exps.weight"][expert] for name in ("gate", "up", "down")
            }
            y_BLD[row, position] += share * _swiglu(u_BLD[row, position], one)
    return y_BLD
