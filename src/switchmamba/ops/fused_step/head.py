# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Triton kernels that choose the next token greedily: the head's product and its maxima in one, logits never written.

Suffixes: B rows, D d_model, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from switchmamba.ops.fused_step.triton import (
    _begin,
    _norm,
    _product,
    launch_arguments,
    norm_step,
    product_precision,
)


@triton.jit
def _largest_of_product(
    x, weight, norm_weight, norm_bias, best, place, rows, outputs, eps,
    columns: tl.constexpr, NORM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill best and place (B, parts) with the maximum of each row's BLOCK_O logits, rounded as x, and where it is."""
    row_blocks = tl.cdiv(rows, BLOCK_B)
    part = tl.program_id(0) // row_blocks  # the rows of one part run together: its weights are read once
    row = tl.program_id(0) % row_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    output = part * BLOCK_O + tl.arange(0, BLOCK_O)
    row_exists, output_exists = row < rows, output < outputs
    sums = _product(
        x, weight, norm_weight, norm_bias, row, row_exists, output, output_exists, eps, columns, columns, NORM, BLOCK_B,
        BLOCK_O, BLOCK_K, COLUMNS_PADDED, DOT, PRECISION, PDL,
    )  # fmt: skip
    logit = tl.where(output_exists[None, :], sums.to(x.dtype.element_ty).to(tl.float32), float("-inf"))
    at = row.to(tl.int64) * tl.cdiv(outputs, BLOCK_O) + part
    tl.store(best + at, tl.max(logit, axis=1), mask=row_exists)
    chosen = tl.minimum(
        part * BLOCK_O + tl.argmax(logit, axis=1), outputs - 1
    )  # of NaN, too, one that exists
    tl.store(place + at, chosen, mask=row_exists)


@triton.jit
def _largest_of_parts(best, place, index, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Fill index (B,) int64 with the place of the first of each row's largest parts, a row a program."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    value = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where((value == tl.max(value, axis=0)) & (part < parts), part, parts - 1), axis=0)
    tl.store(index + row, tl.load(place + row * parts + first).to(tl.int64))


def largest_logit_step(
    x_BD: Tensor,
    weight_VD: Tensor,
    norm: nn.Module | None = None,
    index_B: Tensor | None = None,
) -> Tensor:
    """Return the first place of each row's maximum of norm(x) weightᵀ, (B,) int64, in ``index_B`` if given.

    Logits are rounded to the dtype of x before they are compared. A row with NaN gets some place within V.
    """
    x_BD = x_BD.contiguous()
    (rows, columns), outputs = x_BD.shape, weight_VD.shape[0]
    if index_B is None:
        index_B = torch.empty(rows, dtype=torch.int64, device=x_BD.device)
    if rows > 1 and norm is not None:
        x_BD, norm = norm_step(x_BD, norm), None
    kind, norm_weight, norm_bias, eps = _norm(norm)
    block_b, block_o, block_k, warps, stages = _tile(rows, weight_VD.element_size() > 2)
    block_k = min(block_k, max(16, triton.next_power_of_2(columns)))
    parts = triton.cdiv(outputs, block_o)
    best = torch.empty(rows, parts, dtype=torch.float32, device=x_BD.device)
    place = torch.empty(rows, parts, dtype=torch.int32, device=x_BD.device)
    launch = launch_arguments(x_BD.device, rows)
    with torch.cuda.device_of(x_BD):
        _largest_of_product[(parts * triton.cdiv(rows, block_b),)](
            x_BD, weight_VD, norm_weight, norm_bias, best, place, rows, outputs, eps, columns=columns, NORM=kind,
            BLOCK_B=block_b, BLOCK_O=block_o, BLOCK_K=block_k, COLUMNS_PADDED=triton.next_power_of_2(columns),
            DOT=block_b > 1, PRECISION=product_precision(weight_VD.dtype), num_warps=warps, num_stages=stages, **launch,
        )  # fmt: skip
        block = triton.next_power_of_2(parts)
        _largest_of_parts[(rows,)](
            best,
            place,
            index_B,
            parts,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
            **launch,
        )
    return index_B


def _tile(rows: int, wide: bool) -> tuple[int, int, int, int, int]:
    """Return rows, outputs and columns of a program, warps and stages; ``wide`` numbers of 32 bits need more room."""
    if rows == 1:
        return 1, 8, 512, 2, 1
    if rows <= 16:
        return 16, 128, 64, 4, 3
    if wide:
        return 64, 64, 64, 4, 3
    return (64, 64, 64, 4, 4) if rows <= 64 else (128, 256, 64, 8, 3)
