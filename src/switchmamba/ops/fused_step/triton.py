# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""Triton kernels of a decoding step: everything that one token per row passes through, in few launches.

At batch 1 a step reads tens of megabytes of weights in about 10 µs, and each launch costs 2 µs even in a CUDA graph.
So norms are computed again by every program that needs them, residuals are added where a product ends, and states are
written where they were read.

Suffixes: B rows, D d_model, I d_inner, N d_state, W d_conv, R dt_rank, E experts, F d_expert, K experts per token.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_NO_NORM, _LAYER_NORM, _RMS_NORM = 0, 1, 2

_FEW_ROWS = 64
"""Up to here our product beats a library's; beyond, products are large enough to be bound by arithmetic."""

_SHORT_ROWS = 16
"""Up to here kernels are so short that setting up the next one shows."""


@triton.jit
def _begin(PDL: tl.constexpr):
    """Wait for what the kernels before have written, and let the next one be set up.

    Programmatic dependent launch, on Hopper and later: half a microsecond less for each of a step's dozens of kernels.
    Every kernel waits before it allows the next. So before its own wait a kernel may read weights, and also what the
    last kernel but one has written; and nothing is written before the wait.
    """
    _wait(PDL)
    _allow_next(PDL)


@triton.jit
def _allow_next(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _statistics(x, inside, count, eps, NORM: tl.constexpr):
    """Return mean (0 for RMSNorm) and inverse deviation of the rows of x (rows, columns) over columns ``inside``."""
    if NORM == 1:
        mean = tl.sum(x, axis=1) / count
    else:
        mean = tl.sum(x, axis=1) * 0.0
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1) / count + eps)


@triton.jit
def _normed_piece(
    x, norm_weight, norm_bias, row, row_exists, mean, scale, first, x_row,
    columns: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return BLOCK_K columns of norm(x), in the dtype of x where there is no norm."""
    k = first + tl.arange(0, BLOCK_K)
    inside = k < columns
    v = tl.load(x + row[:, None] * x_row + k[None, :], mask=row_exists[:, None] & inside[None, :], other=0.0)
    if NORM != 0:
        v = (v.to(tl.float32) - mean[:, None]) * scale[:, None]
        v = v * tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            v = v + tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def _product(
    x, weight, norm_weight, norm_bias, row, row_exists, output, output_exists, eps, x_row,
    columns: tl.constexpr, NORM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return norm(x) weightᵀ (BLOCK_B, BLOCK_O) in fp32; one row's first weights are read before the wait."""
    weight += output[:, None].to(tl.int64) * columns
    ahead = tl.arange(0, BLOCK_K)
    if not DOT:
        w_ahead = tl.load(
            weight + ahead[None, :], mask=output_exists[:, None] & (ahead < columns)[None, :], other=0.0
        )
    _begin(PDL)
    every = tl.arange(0, COLUMNS_PADDED)
    if NORM != 0:
        exists = row_exists[:, None] & (every < columns)[None, :]
        whole = tl.load(x + row[:, None] * x_row + every[None, :], mask=exists, other=0.0).to(tl.float32)
        mean, scale = _statistics(whole, every < columns, columns, eps, NORM)
    else:
        mean, scale = tl.zeros([BLOCK_B], tl.float32), tl.zeros([BLOCK_B], tl.float32)
    sums = tl.zeros([BLOCK_B, BLOCK_O], tl.float32)
    if DOT:
        for first in tl.range(0, columns, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            w = tl.load(weight + k[None, :], mask=output_exists[:, None] & (k < columns)[None, :], other=0.0)
            v = _normed_piece(
                x, norm_weight, norm_bias, row, row_exists, mean, scale, first, x_row, columns, NORM, BLOCK_K
            )
            sums = tl.dot(v.to(w.dtype), tl.trans(w), sums, input_precision=PRECISION)
    else:  # one row
        for first in tl.static_range(0, columns, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            if first == 0:
                w = w_ahead
            else:
                w = tl.load(
                    weight + k[None, :], mask=output_exists[:, None] & (k < columns)[None, :], other=0.0
                )
            v = _normed_piece(
                x, norm_weight, norm_bias, row, row_exists, mean, scale, first, x_row, columns, NORM, BLOCK_K
            )
            sums += tl.sum(w.to(tl.float32) * v.to(w.dtype).to(tl.float32), axis=1)[None, :]
    return sums


@triton.jit
def _linear(
    x, weight, norm_weight, norm_bias, residual, y, rows, outputs, eps, x_row, y_row,
    columns: tl.constexpr, NORM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y = residual + norm(x) weightᵀ for BLOCK_B rows and BLOCK_O outputs."""
    row = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_exists, output_exists = row < rows, output < outputs
    sums = _product(
        x, weight, norm_weight, norm_bias, row, row_exists, output, output_exists, eps, x_row, columns, NORM, BLOCK_B,
        BLOCK_O, BLOCK_K, COLUMNS_PADDED, DOT, PRECISION, PDL,
    )  # fmt: skip
    exists = row_exists[:, None] & output_exists[None, :]
    if residual is not None:
        place = residual + row[:, None] * outputs + output[None, :]
        sums += tl.load(place, mask=exists, other=0.0).to(tl.float32)
    tl.store(
        y + row.to(tl.int64)[:, None] * y_row + output[None, :], sums.to(y.dtype.element_ty), mask=exists
    )


@triton.jit
def _norm_rows(
    x, norm_weight, norm_bias, y, rows, columns, eps, NORM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fill y = norm(x) (B, D), ROWS rows a program."""
    _begin(PDL)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS_PADDED)
    inside = column < columns
    exists = (row < rows)[:, None] & inside[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    v = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    mean, scale = _statistics(v, inside, columns, eps, NORM)
    v = (v - mean[:, None]) * scale[:, None] * weight[None, :]
    if norm_bias is not None:
        v += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, v.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _normed(x, norm_weight, norm_bias, column, inside, columns, eps, NORM: tl.constexpr):
    """Return norm(x), or x without a norm, of one row in fp32."""
    v = x.to(tl.float32)
    if NORM != 0:
        mean, scale = _statistics(v[None, :], inside, columns, eps, NORM)
        v = (
            (v - tl.sum(mean))
            * tl.sum(scale)
            * tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
        )
        if norm_bias is not None:
            v += tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _largest(x, index, columns, x_row, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Fill index (B,) int64 with the first place of each row's maximum, a row a program."""
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < columns:
        v = tl.load(x + row * x_row + first + column, mask=first + column < columns, other=float("-inf")).to(
            tl.float32
        )
        place = tl.where(v > best, first + column, place)
        best = tl.maximum(best, v)
        first += BLOCK
    top = tl.max(best, axis=0)
    tl.store(index + row, tl.min(tl.where(best == top, place, columns), axis=0).to(tl.int64))


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_arguments(device: torch.device, rows: int) -> dict[str, bool]:
    """Return the arguments for programmatic dependent launch, where the device has it and it pays.

    In longer kernels the next one's programs would take room from those still to run.
    """
    if rows > _SHORT_ROWS or not _dependent_launch(device):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def _norm(norm: nn.Module | None) -> tuple[int, Tensor | None, Tensor | None, float]:
    """Return a norm's kind, weight, bias and eps."""
    if norm is None:
        return _NO_NORM, None, None, 0.0
    if isinstance(norm, nn.LayerNorm):
        return _LAYER_NORM, norm.weight, norm.bias, norm.eps
    assert isinstance(norm, nn.RMSNorm)
    assert norm.eps is not None
    return _RMS_NORM, norm.weight, None, norm.eps


def product_precision(dtype: torch.dtype) -> str:
    """Return how ``tl.dot`` multiplies: fp32 as three tf32 products, which keeps fp32's accuracy on matrix units."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def linear_step(
    x_BK: Tensor,
    weight_OK: Tensor,
    norm: nn.Module | None = None,
    residual_BO: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return residual + norm(x) weightᵀ, (B, O), in ``dtype``, by default that of x."""
    (rows, columns), outputs = x_BK.shape, weight_OK.shape[0]
    residual_BO = None if residual_BO is None else residual_BO.contiguous()
    if rows > 1 and norm is not None:
        x_BK, norm = norm_step(x_BK, norm), None
    if rows > _FEW_ROWS and outputs > 64 and not _adds_cheaply(x_BK, weight_OK, residual_BO):
        if outputs % 8:  # a copy of the weights costs less than a product whose rows are not aligned
            padded = weight_OK.new_empty(outputs + -outputs % 8, columns)
            padded[:outputs] = weight_OK
            weight_OK = padded
        x_BK = x_BK.to(weight_OK.dtype)
        if residual_BO is None:
            y_BO = (x_BK @ weight_OK.t())[:, :outputs]
        else:
            y_BO = torch.addmm(residual_BO, x_BK, weight_OK[:outputs].t())
        return y_BO if dtype is None else y_BO.to(dtype)
    kind, norm_weight, norm_bias, eps = _norm(norm)
    y_BO = torch.empty(rows, outputs, dtype=dtype or x_BK.dtype, device=x_BK.device)
    block_b, block_o, block_k, stages = _linear_tile(rows, outputs, weight_OK.element_size() > 2)
    block_k = min(block_k, max(16, triton.next_power_of_2(columns)))
    with torch.cuda.device_of(x_BK):
        _linear[(triton.cdiv(outputs, block_o), triton.cdiv(rows, block_b))](
            x_BK, weight_OK, norm_weight, norm_bias, residual_BO, y_BO, rows, outputs, eps,
            x_BK.stride(0), outputs, columns=columns, NORM=kind, BLOCK_B=block_b, BLOCK_O=block_o, BLOCK_K=block_k,
            COLUMNS_PADDED=triton.next_power_of_2(columns), DOT=block_b > 1,
            PRECISION=product_precision(weight_OK.dtype), num_warps=4, num_stages=stages,
            **launch_arguments(x_BK.device, rows),
        )  # fmt: skip
    return y_BO


def _adds_cheaply(x_BK: Tensor, weight_OK: Tensor, residual_BO: Tensor | None) -> bool:
    """Say whether our product's end adds the residual in less time than a library needs to copy it first."""
    programs = triton.cdiv(x_BK.shape[0], 64) * triton.cdiv(weight_OK.shape[0], 64)
    return residual_BO is not None and programs <= 256 and weight_OK.element_size() == 2


def _linear_tile(rows: int, outputs: int, wide: bool) -> tuple[int, int, int, int]:
    """Return rows, outputs and columns of a program, and stages; ``wide`` numbers of 32 bits take more registers."""
    if rows == 1:
        return 1, 16 if outputs >= 16384 else 4, 512, 3
    if outputs >= 16384:
        return (16, 128, 64, 3) if rows <= 16 else (64, 64, 128, 3)
    if rows <= 16:
        return 16, 16, 128, 3
    if wide:
        return 64, 16, 128, 3
    if rows > _FEW_ROWS:
        return (16, 32, 256, 3) if outputs <= 64 else (64, 64, 128, 4)
    # Few outputs: more programs, each with fewer rows.
    return (16, 16, 256, 3) if outputs <= 1024 else (64, 16, 128, 3)


def norm_step(x_BD: Tensor, norm: nn.Module) -> Tensor:
    """Return norm(x), (B, D) in the dtype of x."""
    kind, norm_weight, norm_bias, eps = _norm(norm)
    (rows, columns), x_BD = x_BD.shape, x_BD.contiguous()
    y_BD = torch.empty(rows, columns, dtype=x_BD.dtype, device=x_BD.device)
    with torch.cuda.device_of(x_BD):
        _norm_rows[(rows,)](
            x_BD, norm_weight, norm_bias, y_BD, rows, columns, eps, NORM=kind, ROWS=1,
            COLUMNS_PADDED=triton.next_power_of_2(columns), num_warps=1 if columns <= 1024 else 8,
            **launch_arguments(x_BD.device, rows),
        )  # fmt: skip
    return y_BD


def argmax_step(x_BV: Tensor, index_B: Tensor | None = None) -> Tensor:
    """Return the first place of each row's maximum, (B,) int64, in ``index_B`` if given; rows without NaN."""
    if index_B is None:
        index_B = torch.empty(x_BV.shape[0], dtype=torch.int64, device=x_BV.device)
    with torch.cuda.device_of(x_BV):
        _largest[(x_BV.shape[0],)](
            x_BV,
            index_B,
            x_BV.shape[1],
            x_BV.stride(0),
            BLOCK=4096,
            num_warps=16,
            **launch_arguments(x_BV.device, x_BV.shape[0]),
        )
    return index_B
