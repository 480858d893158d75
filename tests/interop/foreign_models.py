"""Small models of other programs, their weights drawn at random, and a tokenizer of 300 entries."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchmamba.data.tokenizer import Tokenizer

WORDS = "the cat sat on the mat and saw a rat; no dog did. "


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([WORDS * 20, "0123456789 äöü é 字"], 300)


def mamba1_tensors(
    vocab: int = 304, d_model: int = 16, layers: int = 2, states: int = 4
) -> dict[str, Tensor]:
    """Tensors by the names of state-spaces/mamba."""
    inner, rank = 2 * d_model, 1
    shapes = {
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    return _backbone(vocab, d_model, layers, shapes)


def mamba2_tensors(
    vocab: int = 304, d_model: int = 16, layers: int = 2, groups: int = 2
) -> dict[str, Tensor]:
    """The same for Mamba-2: 4 heads of 8 channels, 5 states."""
    inner, heads, shared = 32, 4, 5 * groups
    shapes = {
        "in_proj.weight": (2 * inner + 2 * shared + heads, d_model),
        "conv1d.weight": (inner + 2 * shared, 1, 4),
        "conv1d.bias": (inner + 2 * shared,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    return _backbone(vocab, d_model, layers, shapes)


MAMBA2_SSM = {"layer": "Mamba2", "d_state": 5, "headdim": 8, "ngroups": 2, "chunk_size": 256}


def _backbone(vocab: int, d_model: int, layers: int, mixer: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "backbone.embedding.weight": draw(vocab, d_model),
        "backbone.norm_f.weight": 1 + 0.3 * draw(d_model),
    }
    for i in range(layers):
        tensors[f"backbone.layers.{i}.norm.weight"] = 1 + 0.3 * draw(d_model)
        for name, shape in mixer.items():
            value = draw(*shape)
            if name.endswith("proj.weight"):
                value /= shape[-1] ** 0.5
            tensors[f"backbone.layers.{i}.mixer.{name}"] = value
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"].clone()}


def write_state_spaces(
    path: Path, tensors: dict[str, Tensor], ssm_cfg: dict[str, Any], *, binary: bool = False, **config: Any
) -> Path:
    """Write a checkpoint in the layout of state-spaces/mamba, and its tokenizer beside it."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    vocab, d_model = tensors["backbone.embedding.weight"].shape
    written = {"d_model": d_model, "n_layer": layers, "vocab_size": vocab - 3, "ssm_cfg": ssm_cfg} | config
    (path / "config.json").write_text(json.dumps(written))
    tokenizer().save(path / "tokenizer.json")
    if binary:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_file(tensors, path / "model.safetensors")
    return path
