# mypy: allow-untyped-calls
"""The two products of a decoding step's experts in CUDA C++ (experts.cu), for many rows in 16 bits on Hopper and later.

Suffixes: B rows, D d_model, O outputs, E experts, F d_expert, K experts per token.
"""

import functools
from math import ceil, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switchmamba.ops import nvrtc

KINDS = {"relu": 1, "gelu": 2, "silu": 3, "swiglu": 4}

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}
_WARPS = 8
_SHARED_BYTES = 227 * 1024
_MOST_STAGES = 6
_MOST_ASSIGNMENTS = 2048
"""A block keeps a list of an expert's assignments, which may be all."""


class Tile(NamedTuple):
    """What a block works on at a time (experts.cu)."""

    rows: int
    tokens: int
    stages: int


def tile(columns: int, outputs: int, gates: int, count: int, experts: int) -> Tile | None:
    """Return the tile of a product of (outputs, columns) matrices for ``count`` assignments, None if there is none.

    An expert's matrix is read again for tokens beyond the tile's, so most experts' tokens should fit.
    """
    mean, lists = count / experts, 4 * (_list_size(count) + experts + 128)
    for tokens in range(min(64, 8 * ceil((mean + 2 * sqrt(mean)) / 8)), 0, -8):
        left = _SHARED_BYTES - lists - tokens * (columns + 32) * 2 - _WARPS * tokens * 80
        for rows in (32, 16):
            strips, stage = rows // 16 * gates, rows * gates * (columns + 32) * 2
            divides = outputs % rows == 0 and columns % (_WARPS // strips * 32) == 0
            if strips <= 2 and divides and left >= 2 * stage:
                return Tile(rows, tokens, min(_MOST_STAGES, left // stage))
    return None


def _list_size(count: int) -> int:
    return 1 << max(8, (count - 1).bit_length())


def unavailable(x_BD: Tensor, w1_EFD: Tensor, w2_EOF: Tensor, top_k: int) -> str | None:
    """Say why these products cannot be computed here, or None if they can."""
    (experts, outputs, d_expert), columns = w2_EOF.shape, x_BD.shape[1]
    if x_BD.dtype not in _DTYPES or w1_EFD.dtype != x_BD.dtype:
        return f"it multiplies 16-bit numbers, the inputs are {x_BD.dtype}"
    lacking = nvrtc.needs_nvrtc(x_BD.device, x_BD.dtype)
    if lacking is not None:
        return lacking
    if torch.cuda.get_device_capability(x_BD.device) < (9, 0):
        return "it needs compute capability 9.0"
    count, gates = x_BD.shape[0] * top_k, w1_EFD.shape[1] // d_expert
    if count > _MOST_ASSIGNMENTS:
        return f"it serves up to {_MOST_ASSIGNMENTS} assignments, here are {count}"
    if (
        tile(columns, d_expert, gates, count, experts) is None
        or tile(d_expert, outputs, 1, count, experts) is None
    ):
        return f"no tile fits widths {columns}, {d_expert} and {outputs}"
    return None


def experts_products(
    normed_BD: Tensor,
    index: Tensor,
    scores: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    residual_BO: Tensor | None,
    activation: str,
) -> Tensor:
    """Return residual + score · w2 act(w1 x) of each assignment, (B·K, O); a residual only with K = 1."""
    rows, count, (_, outputs, d_expert) = len(normed_BD), len(index), w2_EOF.shape
    hidden, y = normed_BD.new_empty(count, d_expert), normed_BD.new_empty(count, outputs)
    with torch.cuda.device_of(normed_BD):
        _product(KINDS[activation], count // rows, normed_BD, index, None, w1_EFD, None, hidden)
        _product(0, 1, hidden, index, scores, w2_EOF, residual_BO, y)
    return y


def _product(
    kind: int,
    top_k: int,
    x: Tensor,
    index: Tensor,
    scores: Tensor | None,
    w: Tensor,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    (experts, _, columns), outputs, count = w.shape, y.shape[1], len(index)
    gates = 2 if kind == KINDS["swiglu"] else 1
    chosen = tile(columns, outputs, gates, count, experts)
    assert chosen is not None
    macros = (
        ("T_KIND", _DTYPES[x.dtype]), ("COLUMNS", columns), ("OUTPUTS", outputs), ("EXPERTS", experts),
        ("TOP_K", top_k), ("KIND", kind), ("ROWS", chosen.rows), ("TOKENS", chosen.tokens), ("STAGES", chosen.stages),
        ("LIST", _list_size(count)),
    )  # fmt: skip
    shared = (chosen.stages * chosen.rows * gates + chosen.tokens) * (
        columns + 32
    ) * 2 + _WARPS * chosen.tokens * 80
    run = nvrtc.kernel("experts", _source(), macros, shared, x.device, dependent=True)
    run(_multiprocessors(x.device), (_WARPS + 1) * 32, x, index, scores, w, residual, y, count)


@functools.cache
def _source() -> str:
    return Path(__file__).with_name("experts.cu").read_text(encoding="utf-8")


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
