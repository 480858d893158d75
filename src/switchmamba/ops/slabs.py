# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the programs of a Triton kernel leave of a sum, added up in a fixed order: no atomics, so results repeat."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _ROWS = 16, 512


@triton.jit(do_not_specialize=["count"])
def _sum(slabs, total, count, width, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Fill total (width,); the first rows · columns of its numbers are a matrix, which is stored transposed."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = 0
    while start < count:
        slab = start + tl.arange(0, ROWS)
        inside = (slab < count)[:, None] & (column < width)[None, :]
        parts += tl.load(slabs + slab.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
        start += ROWS
    turned = (column % columns) * rows + column // columns
    place = tl.where(column < rows * columns, turned, column)
    tl.store(total + place, tl.sum(parts, 0), mask=column < width)


def sum_slabs(slabs_PN: Tensor, rows: int = 0, columns: int = 1) -> Tensor:
    """Return the sum (N,) of contiguous fp32 slabs (P, N).

    Its first rows · columns numbers, a matrix, come out transposed.
    """
    count, width = slabs_PN.shape
    total_N = slabs_PN.new_empty(width)
    at_once = min(_ROWS, max(16, triton.next_power_of_2(count)))
    with torch.cuda.device_of(slabs_PN):
        _sum[(triton.cdiv(width, _COLUMNS),)](
            slabs_PN, total_N, count, width, rows, columns,
            ROWS=at_once, COLUMNS=_COLUMNS, num_warps=max(1, at_once // 64),
        )  # fmt: skip
    return total_N
