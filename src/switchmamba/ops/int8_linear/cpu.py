"""A few rows on the CPU: a compiled loop that reads the weight's bytes as they are.

Decoding one sequence reads every weight once for each token, and memory is what it waits for: a quarter of the bytes is
most of a quarter of the time. For more rows than :data:`FEW_ROWS` the arithmetic counts, and the weight is widened for
a product of torch.

A row's sum may be taken in any order, so that it becomes vector instructions; the order depends on the row's length
alone, never on threads.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchmamba.ops.compiled import compiled
from switchmamba.ops.int8_linear import eager
from switchmamba.ops.parallel import cut, run_parallel

FEW_ROWS = 8

WORTH_A_THREAD = 1 << 20
"""Products of one piece of work; a second thread costs as much as some 100,000."""

u = np.uint64


def int8_linear_cpu(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return y (…, O) fp32."""
    outputs, inputs = weight_OI.shape
    rows = x.numel() // max(1, inputs)
    if rows > FEW_ROWS or not rows:
        return eager.int8_linear(x, weight_OI, scale_O)
    y_TO = torch.empty(rows, outputs)
    pieces = cut(outputs, -(-rows * outputs * inputs // WORTH_A_THREAD), multiple=16)
    run_parallel(
        _multiply,
        pieces,
        x.detach().reshape(rows, inputs).contiguous().numpy(),
        weight_OI.contiguous().numpy(),
        scale_O.detach().float().numpy(),
        y_TO.numpy(),
    )
    return y_TO.view(*x.shape[:-1], outputs)


@partial(compiled, reassociate=True)
def _multiply(
    start: int,
    stop: int,
    x: NDArray[np.float32],
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    rows, inputs = x.shape
    for output in range(start, stop):
        for row in range(rows):
            total = np.float32(0)
            for i in range(inputs):
                total += np.float32(weight[u(output), u(i)]) * x[u(row), u(i)]
            y[u(row), u(output)] = total * scale[u(output)]
