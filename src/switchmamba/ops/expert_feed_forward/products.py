# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Matrix products of each expert's rows with its weights, in Triton, with all that surrounds them fused in.

Rows are sorted by expert, and every segment is filled up with zero rows to whole tiles (dispatch.py). So a tile of rows
belongs to one expert, ``tile_expert``, and needs no mask: tiles come and go by the tensor memory accelerator, which
clips what hangs over a matrix, and a zero row stays zero through every product and activation.

Two ways to keep the matrix units busy while a tile is being finished, each where it is faster: a program per
multiprocessor walks over large tiles, with the next tile's loads under way (``expand``, ``contract``), or two to three
programs share a multiprocessor, with a smaller tile each (the others).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from switchmamba.ops.expert_feed_forward.dispatch import Plan, combine, sum_shares

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)

TILE_ROWS = 128
"""Rows of a tile of sorted rows."""


@dataclass(frozen=True)
class Tiles:
    """Columns and depth of a product's tiles, and how a program works on them.

    ``chunks``: pieces in which a tile is written, so that they fit into shared memory beside the next tile's inputs.
    """

    columns: int
    depth: int
    num_warps: int
    num_stages: int
    chunks: int = 1
    maxnreg: int | None = None


# The fastest of those tried on an H200 (README.md). Shared memory, 227 KB, is full with expand's and contract's.
EXPAND = Tiles(256, 64, 8, 4, chunks=2)
EXPAND_KEEPING = Tiles(256, 64, 8, 4, chunks=4)
EXPAND_GATED = Tiles(64, 64, 4, 3)
CONTRACT = Tiles(256, 64, 8, 4, chunks=4)
PULL_BACK = Tiles(128, 64, 8, 3, maxnreg=128)
PULL_BACK_GATED = Tiles(64, 64, 8, 3, maxnreg=128)
WEIGHT_GRADIENT = Tiles(128, 32, 4, 4)


@triton.jit
def _halves(tile):
    """Return the left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _store(matrix, row, column, tile, CHUNKS: tl.constexpr):
    """Write a tile to (P, N) in chunks of columns."""
    if CHUNKS == 1:
        matrix.store([row, column], tile.to(matrix.dtype))
    else:
        left, right = _halves(tile)
        _store(matrix, row, column, left, CHUNKS // 2)
        _store(matrix, row, column + tile.shape[1] // 2, right, CHUNKS // 2)


@triton.jit
def _store_part(matrix, row, part, column, tile, CHUNKS: tl.constexpr):
    """Write a tile to (P, parts, N) in chunks of columns."""
    if CHUNKS == 1:
        matrix.store([row, part, column], tile.to(matrix.dtype).reshape(tile.shape[0], 1, tile.shape[1]))
    else:
        left, right = _halves(tile)
        _store_part(matrix, row, part, column, left, CHUNKS // 2)
        _store_part(matrix, row, part, column + tile.shape[1] // 2, right, CHUNKS // 2)


@triton.jit
def _scatter(matrix, rows, column, columns, tile, CHUNKS: tl.constexpr):
    """Write each row of a tile to a row of (T, columns), none to -1, in chunks of columns."""
    if CHUNKS == 1:
        place = column + tl.arange(0, tile.shape[1])
        target = matrix + rows.to(tl.int64)[:, None] * columns + place[None, :]
        exists = (rows >= 0)[:, None] & (place < columns)[None, :]
        tl.store(target, tile.to(matrix.dtype.element_ty), mask=exists)
    else:
        left, right = _halves(tile)
        _scatter(matrix, rows, column, columns, left, CHUNKS // 2)
        _scatter(matrix, rows, column + tile.shape[1] // 2, columns, right, CHUNKS // 2)


@triton.jit
def _product(
    a, b, row, expert, column, depth,
    BY_DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return a tile of a (P, K) · b[expert, 0] (N, K)ᵀ or, BY_DEPTH, of a · b[expert] (K, N)."""
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, depth, DEPTH):
        if BY_DEPTH:
            b_tile = b.load([expert, k, column]).reshape(DEPTH, COLUMNS)
        else:
            b_tile = b.load([expert, 0, column, k]).reshape(COLUMNS, DEPTH).T
        sums = tl.dot(a.load([row, k]), b_tile, sums)
    return sums


@triton.jit
def _activate(hidden, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        result = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        result = 0.5 * hidden * (1.0 + tl.erf(hidden * _SQRT_HALF))
    else:
        result = hidden * tl.sigmoid(hidden)
    return result


@triton.jit
def _slope(hidden, ACTIVATION: tl.constexpr):
    """Return the derivative of an activation."""
    if ACTIVATION == "gelu":
        density = _RSQRT_2PI * tl.exp(-0.5 * hidden * hidden)
        result = 0.5 * (1.0 + tl.erf(hidden * _SQRT_HALF)) + hidden * density
    else:
        gate = tl.sigmoid(hidden)
        result = gate * (1.0 + hidden * (1.0 - gate))
    return result


@triton.jit(do_not_specialize=["depth", "column_tiles"])
def _expand(
    x, w1, hidden, activated, tile_expert, num_tiles, depth, column_tiles,
    ACTIVATION: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """activated (P, F) = act(x (P, D) · w1 (E, 1, F, D)ᵀ), and what act acts on to hidden (P, 1, F) if it is given."""
    tiles = tl.load(num_tiles) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        expert = tl.load(tile_expert + tile // column_tiles)
        row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
        sums = _product(x, w1, row, expert, column, depth, False, ROWS, COLUMNS, DEPTH)
        if hidden is not None:
            _store_part(hidden, row, 0, column, sums, CHUNKS)
        _store(activated, row, column, _activate(sums, ACTIVATION), CHUNKS)


@triton.jit(do_not_specialize=["depth", "column_tiles"])
def _expand_gated(
    x, w1, hidden, activated, tile_expert, depth, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """activated (P, F) = silu(gate) · up, gate and up being x (P, D) · w1 (E, 2, F, D)ᵀ, and hidden (P, 2, F)."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile // column_tiles)
    if expert >= 0:
        row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.range(0, depth, DEPTH):
            x_tile = x.load([row, k])
            gate = tl.dot(x_tile, w1.load([expert, 0, column, k]).reshape(COLUMNS, DEPTH).T, gate)
            up = tl.dot(x_tile, w1.load([expert, 1, column, k]).reshape(COLUMNS, DEPTH).T, up)
        if hidden is not None:
            _store_part(hidden, row, 0, column, gate, 1)
            _store_part(hidden, row, 1, column, up, 1)
        _store(activated, row, column, _activate(gate, "silu") * up, 1)


@triton.jit(do_not_specialize=["depth", "column_tiles"])
def _contract(
    a, w, sorted_out, out, source, weight, tile_expert, num_tiles, depth, columns, column_tiles,
    BY_DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Each row of a (P, K) times its expert's matrix and its weight, if any, to sorted_out or to out's token."""
    tiles = tl.load(num_tiles) * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        expert = tl.load(tile_expert + tile // column_tiles)
        row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
        sums = _product(a, w, row, expert, column, depth, BY_DEPTH, ROWS, COLUMNS, DEPTH)
        assignment = tl.load(source + row + tl.arange(0, ROWS))
        if weight is not None:
            factor = tl.load(weight + assignment, mask=assignment >= 0, other=0.0).to(tl.float32)
            sums *= factor[:, None]
        if out is None:
            _store(sorted_out, row, column, sums, CHUNKS)
        else:  # one choice a token: its only assignment has its number
            _scatter(out, assignment, column, columns, sums, CHUNKS)


@triton.jit(do_not_specialize=["depth", "places", "column_tiles"])
def _pull_back(
    dy, w2, hidden, dhidden, activated, shares, source, weight, tile_expert, depth, places, column_tiles,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From dy (P, O) and w2 (E, O, F): dhidden (P, parts, F), weight · activated (P, F), and shares (column_tiles, P).

    A share is what a tile of columns adds to a weight's gradient. With ReLU, ``hidden`` holds what it returned.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile // column_tiles)
    if expert >= 0:
        row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
        gradient = _product(dy, w2, row, expert, column, depth, True, ROWS, COLUMNS, DEPTH)
        place = row + tl.arange(0, ROWS)
        assignment = tl.load(source + place)
        factor = tl.load(weight + assignment, mask=assignment >= 0, other=0.0).to(tl.float32)[:, None]
        before = hidden.load([row, 0, column]).reshape(ROWS, COLUMNS).to(tl.float32)
        if ACTIVATION == "relu":
            share = tl.sum(gradient * before, axis=1)
            gradient = tl.where(before > 0, gradient * factor, 0.0)
        elif ACTIVATION == "swiglu":
            up = hidden.load([row, 1, column]).reshape(ROWS, COLUMNS).to(tl.float32)
            gate = _activate(before, "silu")
            share = tl.sum(gradient * (gate * up), axis=1)
            _store(activated, row, column, gate * up * factor, 1)
            gradient *= factor
            _store_part(dhidden, row, 1, column, gradient * gate, 1)
            gradient *= up * _slope(before, "silu")
        else:
            result = _activate(before, ACTIVATION)
            share = tl.sum(gradient * result, axis=1)
            _store(activated, row, column, result * factor, 1)
            gradient *= factor * _slope(before, ACTIVATION)
        _store_part(dhidden, row, 0, column, gradient, 1)
        tl.store(shares + (tile % column_tiles).to(tl.int64) * places + place, share)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def _weight_gradient(
    a, b, out, first_place, count, row_tiles, column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out (E, M, N) = aᵀ · b over each expert's rows of a (P, M) and b (P, N); zero for an expert without rows."""
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    row, column = tile // column_tiles * ROWS, tile % column_tiles * COLUMNS
    first = tl.load(first_place + expert)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(first, first + tl.load(count + expert), DEPTH):
        sums = tl.dot(a.load([k, row]).T, b.load([k, column]), sums)
    out.store([expert, row, column], sums.to(out.dtype).reshape(1, ROWS, COLUMNS))


def expand(x_PD: Tensor, w1: Tensor, plan: Plan, activation: str, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Return activated (P, F) from w1 (E, parts, F, D), and the hidden layer before it (P, parts, F) if it is kept."""
    (places, d_model), (_, parts, d_expert, _) = x_PD.shape, w1.shape
    how = EXPAND_GATED if parts == 2 else EXPAND_KEEPING if keep else EXPAND
    activated = x_PD.new_empty(places, d_expert)
    hidden = x_PD.new_empty(places, parts, d_expert) if keep else None
    column_tiles, width = triton.cdiv(d_expert, how.columns), how.columns // how.chunks
    x, w1 = _tiled(x_PD, TILE_ROWS, how.depth), _tiled(w1, 1, 1, how.columns, how.depth)
    outputs = (
        None if hidden is None else _tiled(hidden, TILE_ROWS, 1, width),
        _tiled(activated, TILE_ROWS, width),
    )
    tiles = plan.tile_expert.numel() * column_tiles
    if parts == 2:
        _expand_gated[(tiles,)](x, w1, *outputs, plan.tile_expert, d_model, column_tiles, **_options(how))
    else:
        programs = min(tiles, _processors(x_PD.device))
        _expand[(programs,)](
            x, w1, *outputs, plan.tile_expert, plan.num_tiles, d_model, column_tiles,
            ACTIVATION=activation, PROGRAMS=programs, CHUNKS=how.chunks, **_options(how),
        )  # fmt: skip
    return activated, hidden


def contract(
    a_PK: Tensor, w: Tensor, plan: Plan, weight_TK: Tensor | None, y_TD: Tensor, choices: int
) -> None:
    """Fill y (T, N) with the weighted sum over its choices of a's rows times w: (E, 1, N, K) for wᵀ, or (E, K, N)."""
    how, by_depth = CONTRACT, w.dim() == 3
    columns, depth = y_TD.shape[1], a_PK.shape[1]
    sorted_PD = None if choices == 1 else a_PK.new_empty(a_PK.shape[0], columns)
    column_tiles = triton.cdiv(columns, how.columns)
    programs = min(plan.tile_expert.numel() * column_tiles, _processors(a_PK.device))
    _contract[(programs,)](
        _tiled(a_PK, TILE_ROWS, how.depth),
        _tiled(w, 1, how.depth, how.columns) if by_depth else _tiled(w, 1, 1, how.columns, how.depth),
        None if sorted_PD is None else _tiled(sorted_PD, TILE_ROWS, how.columns // how.chunks),
        y_TD if sorted_PD is None else None, plan.source, weight_TK, plan.tile_expert, plan.num_tiles,
        depth, columns, column_tiles, BY_DEPTH=by_depth, PROGRAMS=programs, CHUNKS=how.chunks, **_options(how),
    )  # fmt: skip
    if sorted_PD is not None:
        combine(sorted_PD, plan, y_TD)


def pull_back(
    dy_PD: Tensor, w2: Tensor, hidden: Tensor, plan: Plan, weight_TK: Tensor, activation: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return hidden's gradient (P, parts, F), weight · activated (P, F) but for ReLU, and weight's gradient (T, K).

    ``hidden`` is what :func:`expand` kept; for ReLU what it returned, as (P, 1, F).
    """
    (places, d_model), (_, parts, d_expert) = dy_PD.shape, hidden.shape
    how = PULL_BACK_GATED if parts == 2 else PULL_BACK
    column_tiles = triton.cdiv(d_expert, how.columns)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight_TK)
    activated = None if activation == "relu" else dy_PD.new_empty(places, d_expert)
    shares = torch.empty(column_tiles, places, dtype=torch.float32, device=dy_PD.device)
    _pull_back[(plan.tile_expert.numel() * column_tiles,)](
        _tiled(dy_PD, TILE_ROWS, how.depth), _tiled(w2, 1, how.depth, how.columns),
        _tiled(hidden, TILE_ROWS, 1, how.columns), _tiled(dhidden, TILE_ROWS, 1, how.columns),
        None if activated is None else _tiled(activated, TILE_ROWS, how.columns),
        shares, plan.source, weight_TK, plan.tile_expert, d_model, places, column_tiles,
        ACTIVATION=activation, **_options(how),
    )  # fmt: skip
    sum_shares(shares, plan, dweight)
    return dhidden, activated, dweight


def weight_gradient(a_PM: Tensor, b_PN: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Return aᵀ · b over each expert's rows, (E, M, N) in ``dtype``."""
    how, experts, rows, columns = WEIGHT_GRADIENT, plan.count.numel(), a_PM.shape[1], b_PN.shape[1]
    gradient = a_PM.new_empty(experts, rows, columns, dtype=dtype)
    row_tiles, column_tiles = triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, how.columns)
    _weight_gradient[(experts * row_tiles * column_tiles,)](
        _tiled(a_PM, how.depth, TILE_ROWS), _tiled(b_PN, how.depth, how.columns),
        _tiled(gradient, 1, TILE_ROWS, how.columns), plan.first_place, plan.count, row_tiles, column_tiles,
        **_options(how),
    )  # fmt: skip
    return gradient


def _tiled(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _options(how: Tiles) -> dict[str, int | None]:
    """Return a kernel's tile shape and how it is compiled."""
    return {
        "ROWS": TILE_ROWS,
        "COLUMNS": how.columns,
        "DEPTH": how.depth,
        "num_warps": how.num_warps,
        "num_stages": how.num_stages,
        "maxnreg": how.maxnreg,
    }


@functools.cache
def _processors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; under Triton's interpreter any number will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
