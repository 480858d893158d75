# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Capacity on a GPU in three small kernels without sorting; integers only, so results repeat.

Assignments in the order of their precedence, first choices before second ones, are cut into blocks. Blocks count their
experts; every expert sums up what comes before each block; then each assignment's place among its expert's is that sum
plus its rank within the block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 8192
"""Of a block, its assignments times the experts, which a program compares at once."""


@triton.jit
def _load_block(index, tokens, choices, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Return where a block's assignments lie in index (T, K), their experts, and these as zeros and ones."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < tokens * choices
    place = (i % tokens).to(tl.int64) * choices + i // tokens
    expert = tl.load(index + place, mask=exists, other=num_experts).to(tl.int32)
    bins = tl.arange(0, BINS)
    equal = (expert[:, None] == bins[None, :]) & (bins < num_experts)[None, :]
    return place, exists, expert, equal.to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks"])
def _count(index, counts, tokens, choices, num_experts, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Fill counts (E, blocks)."""
    _, _, _, equal = _load_block(index, tokens, choices, num_experts, BLOCK, BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * blocks + tl.program_id(0), tl.sum(equal, 0), mask=bins < num_experts)


@triton.jit(do_not_specialize=["blocks"])
def _accumulate(counts, blocks, BLOCKS: tl.constexpr):
    """Turn an expert's counts (blocks,) into the counts of the blocks before."""
    counts += tl.program_id(0) * blocks
    before, start = 0, 0
    while start < blocks:
        block = start + tl.arange(0, BLOCKS)
        here = tl.load(counts + block, mask=block < blocks, other=0)
        tl.store(counts + block, before + tl.cumsum(here) - here, mask=block < blocks)
        before += tl.sum(here)
        start += BLOCKS


@triton.jit(do_not_specialize=["tokens", "num_experts", "blocks", "capacity"])
def _drop(
    index, counts, kept, tokens, choices, num_experts, blocks, capacity, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Fill kept (T, K): the index, ``num_experts`` from the capacity on."""
    place, exists, expert, equal = _load_block(index, tokens, choices, num_experts, BLOCK, BINS)
    bins = tl.arange(0, BINS)
    before = tl.load(counts + bins * blocks + tl.program_id(0), mask=bins < num_experts, other=0)
    rank = tl.sum(equal * (before[None, :] + tl.cumsum(equal, 0) - equal), 1)
    tl.store(kept + place, tl.where(rank < capacity, expert, num_experts).to(tl.int64), mask=exists)


def expert_capacity(expert_index_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Return the index (T, K) with ``num_experts`` for what is dropped."""
    index_TK = expert_index_TK.contiguous()
    tokens, choices = index_TK.shape
    bins = max(2, triton.next_power_of_2(num_experts))
    block = max(16, min(256, _NUMBERS // bins))
    blocks = triton.cdiv(tokens * choices, block)
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=index_TK.device)
    kept_TK = torch.empty_like(index_TK)
    with torch.cuda.device_of(index_TK):
        _count[(blocks,)](index_TK, counts, tokens, choices, num_experts, blocks, BLOCK=block, BINS=bins)
        _accumulate[(num_experts,)](
            counts, blocks, BLOCKS=min(1024, max(2, triton.next_power_of_2(blocks))), num_warps=4
        )
        _drop[(blocks,)](
            index_TK, counts, kept_TK, tokens, choices, num_experts, blocks, capacity, BLOCK=block, BINS=bins
        )
    return kept_TK
