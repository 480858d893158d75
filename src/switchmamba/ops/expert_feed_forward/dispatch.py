# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Rows in the order of their experts on a GPU: a stable counting sort, and the copies into and out of that order.

An assignment is one (token, choice) pair, t·K + k. A place is a row of the sorted order: experts one after the other,
their assignments in order, every segment filled up to whole tiles of rows. Dropped assignments (index E) have no place.

The sort is exact and parallel: blocks of assignments count their experts and rank each assignment among its equals;
every expert finds where its segment begins and where each block's assignments do; an assignment's place is that plus
its rank. Only counts are added atomically, as integers, so places repeat. Nothing leaves the device; the number of
places is what the worst routing needs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128
"""Assignments that a program of the sort compares with each other."""


class Plan(NamedTuple):
    """Where each of the S = T·K assignments stands among P places.

    Attributes:
        place: (S,) int32 place of each assignment, -1 for dropped ones.
        source: (P,) int32 assignment at each place, -1 where a segment is filled up; undefined behind the last tile.
        count: (E,) int32 assignments of each expert.
        first_place: (E,) int32 where each expert's segment begins.
        tile_expert: (P / tile_rows,) int32 expert of each tile of places, -1 behind the last.
        num_tiles: (1,) int32 tiles in use.
    """

    place: Tensor
    source: Tensor
    count: Tensor
    first_place: Tensor
    tile_expert: Tensor
    num_tiles: Tensor


@triton.jit
def _load_experts(index, i, assignments, num_experts):
    """Return assignments and their experts; ``num_experts`` for dropped ones and where there is none."""
    expert = tl.load(index + i, mask=i < assignments, other=num_experts).to(tl.int32)
    return i, tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)


@triton.jit(do_not_specialize=["assignments", "num_experts", "blocks"])
def _count(
    index, rank, counts, count, assignments, num_experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Fill rank (S,) within each block's equals and counts (E, blocks), and add the counts to count (E,)."""
    block = tl.program_id(0)
    i, expert = _load_experts(index, block * BLOCK + tl.arange(0, BLOCK), assignments, num_experts)
    lane = tl.arange(0, BLOCK)
    earlier_equal = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
    tl.store(rank + i, tl.sum(earlier_equal.to(tl.int32), axis=1), mask=i < assignments)
    found = tl.histogram(expert, BINS, mask=expert < num_experts)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * blocks + block, found, mask=bins < num_experts)
    tl.atomic_add(count + bins, found, mask=(bins < num_experts) & (found > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_experts", "blocks", "most_tiles"])
def _lay_out(
    counts, count, first_place, source, tile_expert, num_tiles, sorted_x, num_experts, blocks, most_tiles, columns,
    TILE: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Give each expert its places and tiles, and turn its counts into the first place of each block's assignments.

    Rows of sorted_x (P, D) that fill up its segment become zero. Program E marks the tiles behind the last.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    tiles = (tl.load(count + bins, mask=bins < num_experts, other=0) + TILE - 1) // TILE
    first_tile = tl.sum(tl.where(bins < expert, tiles, 0))
    if expert < num_experts:
        first = first_tile * TILE
        end = first + tl.load(count + expert)
        tl.store(first_place + expert, first)
        place = first
        for start in tl.range(0, blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            here = tl.load(counts + expert * blocks + block, mask=block < blocks, other=0)
            tl.store(counts + expert * blocks + block, place + tl.cumsum(here) - here, mask=block < blocks)
            place += tl.sum(here)
        last_tile = (end + TILE - 1) // TILE
        for tile in tl.range(first_tile, last_tile):
            tl.store(tile_expert + tile, expert)
        fill = end + tl.arange(0, TILE)
        tl.store(source + fill, tl.full((TILE,), -1, tl.int32), mask=fill < last_tile * TILE)
        column = tl.arange(0, COLUMNS)
        for start in tl.range(0, TILE, ROWS):
            row = end + start + tl.arange(0, ROWS)
            for left in tl.range(0, columns, COLUMNS):
                target = sorted_x + row.to(tl.int64)[:, None] * columns + (left + column)[None, :]
                exists = (row < last_tile * TILE)[:, None] & (left + column < columns)[None, :]
                tl.store(target, tl.zeros((ROWS, COLUMNS), sorted_x.dtype.element_ty), mask=exists)
    else:
        tl.store(num_tiles, first_tile)
        for tile in tl.range(first_tile, most_tiles):
            tl.store(tile_expert + tile, -1)


@triton.jit(do_not_specialize=["assignments", "num_experts", "blocks", "choices"])
def _send(
    index, rank, counts, x, place, source, sorted_x, dropped, assignments, num_experts, blocks, choices, columns,
    dropped_columns, x_row, x_column, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill place (S,) and source (P,), copy rows of x (T, D) to their places, and zero rows of ``dropped`` (T, O)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, expert = _load_experts(index, i, assignments, num_experts)
    kept = expert < num_experts
    target = tl.load(counts + expert * blocks + i // BLOCK, mask=kept, other=0)
    target += tl.load(rank + i, mask=kept, other=0)
    if tl.program_id(1) == 0:
        tl.store(place + i, tl.where(kept, target, -1), mask=i < assignments)
        tl.store(source + target, i, mask=kept)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    row = (i // choices).to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None, :] * x_column
    value = tl.load(x + row, mask=kept[:, None] & inside, other=0.0)
    row = target.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(sorted_x + row, value.to(sorted_x.dtype.element_ty), mask=kept[:, None] & inside)
    if dropped is not None:
        row = i.to(tl.int64)[:, None] * dropped_columns + column[None, :]
        gone = (~kept & (i < assignments))[:, None] & (column < dropped_columns)[None, :]
        tl.store(dropped + row, tl.zeros((ROWS, COLUMNS), dropped.dtype.element_ty), mask=gone)


@triton.jit(do_not_specialize=["choices", "assignments"])
def _gather(
    x, weight, sorted_x, weighted_x, dropped, source, place, tile_expert, choices, assignments, columns,
    dropped_columns, x_row, x_column, ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy rows of x (T, D) to their places, if asked also times their weights; zero rows of ``dropped`` (T, O)."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (column < columns)[None, :]
    if tl.load(tile_expert + tl.program_id(0) * ROWS // TILE) >= 0:
        assignment = tl.load(source + row)
        exists = assignment >= 0
        where = (assignment // choices).to(tl.int64)[:, None] * x_row + column.to(tl.int64)[
            None, :
        ] * x_column
        value = tl.load(x + where, mask=exists[:, None] & inside, other=0.0)
        target = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(sorted_x + target, value.to(sorted_x.dtype.element_ty), mask=inside)
        if weighted_x is not None:
            factor = tl.load(weight + assignment, mask=exists, other=0.0).to(tl.float32)
            value = value.to(tl.float32) * factor[:, None]
            tl.store(weighted_x + target, value.to(weighted_x.dtype.element_ty), mask=inside)
    if dropped is not None:
        gone = tl.load(place + row, mask=row < assignments, other=0) < 0
        target = dropped + row.to(tl.int64)[:, None] * dropped_columns + column[None, :]
        nothing = tl.zeros((ROWS, COLUMNS), dropped.dtype.element_ty)
        tl.store(target, nothing, mask=gone[:, None] & (column < dropped_columns)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    sorted_y, place, y, tokens, columns, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """y (T, O) = sum over each token's choices, in order, of the rows at their places."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for choice in tl.static_range(CHOICES):
        found = tl.load(place + token * CHOICES + choice, mask=token < tokens, other=-1)
        where = found.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(sorted_y + where, mask=(found >= 0)[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(
        y + token.to(tl.int64)[:, None] * columns + column[None, :], total.to(y.dtype.element_ty), mask=inside
    )


@triton.jit(do_not_specialize=["assignments", "places", "parts"])
def _sum_shares(shares, place, dweight, assignments, places, parts, BLOCK: tl.constexpr):
    """dweight (S,) = sum over parts of shares (parts, P) at each assignment's place; 0 for dropped ones."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(place + i, mask=i < assignments, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for _part in tl.range(0, parts):
        total += tl.load(shares + found, mask=found >= 0, other=0.0)
        shares += places
    tl.store(dweight + i, total.to(dweight.dtype.element_ty), mask=i < assignments)


def _tile_shape(columns: int, numbers: int) -> tuple[int, int]:
    """Return rows and columns, powers of two, of the tiles in which a copy takes about ``numbers`` at a time."""
    width = min(1024, triton.next_power_of_2(columns))
    return max(1, min(16, numbers // width)), width


def dispatch(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    num_experts: int,
    tile: int,
    dtype: torch.dtype,
    dropped_TO: Tensor | None,
) -> tuple[Plan, Tensor]:
    """Sort assignments by expert, and by token within an expert; return the plan and x at its places (P, D).

    Segments are whole tiles of ``tile`` places. The rows of dropped tokens in ``dropped`` (T, O) become zero.
    """
    index_S = expert_index_TK.reshape(-1)
    assignments, columns = index_S.numel(), x_TD.shape[1]
    blocks = triton.cdiv(assignments, _BLOCK)
    most_tiles = (assignments + min(assignments, num_experts) * (tile - 1)) // tile
    bins = max(2, triton.next_power_of_2(num_experts))

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=index_S.device)

    place, source, tile_expert = integers(assignments), integers(most_tiles * tile), integers(most_tiles)
    first_place, num_tiles, rank, counts = (
        integers(num_experts), integers(1), integers(assignments), integers(num_experts, blocks)
    )  # fmt: skip
    count = torch.zeros(num_experts, dtype=torch.int32, device=index_S.device)
    sorted_PD = x_TD.new_empty(most_tiles * tile, columns, dtype=dtype)
    _count[(blocks,)](index_S, rank, counts, count, assignments, num_experts, blocks, BLOCK=_BLOCK, BINS=bins)
    rows, width = _tile_shape(columns, 4096)
    _lay_out[(num_experts + 1,)](
        counts, count, first_place, source, tile_expert, num_tiles, sorted_PD, num_experts, blocks, most_tiles, columns,
        TILE=tile, BINS=bins, BLOCKS=min(1024, max(2, triton.next_power_of_2(blocks))), ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    dropped_columns = 0 if dropped_TO is None else dropped_TO.shape[1]
    _send[(triton.cdiv(assignments, rows), triton.cdiv(max(columns, dropped_columns), width))](
        index_S, rank, counts, x_TD, place, source, sorted_PD, dropped_TO, assignments, num_experts, blocks,
        expert_index_TK.shape[1], columns, dropped_columns, *x_TD.stride(), BLOCK=_BLOCK, ROWS=rows, COLUMNS=width,
    )  # fmt: skip
    return Plan(place, source, count, first_place, tile_expert, num_tiles), sorted_PD


def gather(
    x_TD: Tensor,
    weight_TK: Tensor | None,
    plan: Plan,
    dtype: torch.dtype,
    choices: int,
    dropped_TO: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return x at its places (P, D) in ``dtype``, and times ``weight`` if given; zero dropped tokens of ``dropped``."""
    places, columns = plan.source.shape[0], x_TD.shape[1]
    sorted_PD = x_TD.new_empty(places, columns, dtype=dtype)
    weighted_PD = None if weight_TK is None else torch.empty_like(sorted_PD)
    rows, width = _tile_shape(columns, 8192)
    dropped_columns = 0 if dropped_TO is None else dropped_TO.shape[1]
    _gather[(triton.cdiv(places, rows), triton.cdiv(max(columns, dropped_columns), width))](
        x_TD, weight_TK, sorted_PD, weighted_PD, dropped_TO, plan.source, plan.place, plan.tile_expert,
        choices, plan.place.numel(), columns, dropped_columns, *x_TD.stride(),
        ROWS=rows, TILE=places // plan.tile_expert.shape[0], COLUMNS=width,
    )  # fmt: skip
    return sorted_PD, weighted_PD


def combine(sorted_PD: Tensor, plan: Plan, y_TD: Tensor) -> None:
    """Fill y (T, O) with the sum over its choices of the rows at their places."""
    tokens, columns = y_TD.shape
    rows, width = _tile_shape(columns, 4096)
    _combine[(triton.cdiv(tokens, rows), triton.cdiv(columns, width))](
        sorted_PD, plan.place, y_TD, tokens, columns,
        CHOICES=plan.place.numel() // tokens, ROWS=rows, COLUMNS=width,
    )  # fmt: skip


def sum_shares(shares: Tensor, plan: Plan, dweight_TK: Tensor) -> None:
    """Fill dweight (T, K) with the sums of its shares (parts, P)."""
    parts, places = shares.shape
    _sum_shares[(triton.cdiv(dweight_TK.numel(), 256),)](
        shares, plan.place, dweight_TK, dweight_TK.numel(), places, parts, BLOCK=256
    )
