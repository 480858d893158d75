"""Cross-entropy of a linear head, without ever holding all logits.

loss_t = logsumexp(weight x_t) - (weight x_t)[target_t], in nats.
"""

from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops.backend import Backend, Operation, always
from switchmamba.ops.checks import (
    product_dtype,
    require_dimensions,
    require_floating,
    require_integer,
    require_shape,
)
from switchmamba.ops.gpu import imported_when_called, needs_triton
from switchmamba.ops.linear_cross_entropy.eager import linear_cross_entropy_eager
from switchmamba.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    [
        Backend(
            "triton",
            imported_when_called("switchmamba.ops.linear_cross_entropy.triton", "linear_cross_entropy"),
            needs_triton,
        ),
        Backend("eager", linear_cross_entropy_eager, always),
        Backend("reference", linear_cross_entropy_reference, always),
    ],
)
REDUCTIONS = ("mean", "sum", "none")
CPU_CHUNK, ACCELERATOR_CHUNK = 512, 4096


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of ``target`` under the logits ``x @ weight.T``.

    The matrix products run in the dtype of x, or in autocast's where that is enabled; the softmax, the losses and the
    sum of the weight's gradient over chunks are fp32 (fp64 for fp64 x). Differentiable in x and weight; ``"mean"``
    and ``"sum"`` compute both gradients in the forward pass, chunk by chunk, when anything asks for them.

    Args:
        x: (T, D).
        weight: (V, D).
        target: (T,) int64 in [0, V), or ``ignore_index``; on the CPU the range is checked.
        ignore_index: marks tokens that do not count, whatever their x; their gradient is exactly 0.
        reduction: ``"mean"`` over the tokens that count (0 if none does), ``"sum"`` or ``"none"``.
        chunk_size: tokens whose logits exist at a time; None: 512 on the CPU, 4096 elsewhere.
        backend: ``"auto"``, ``"triton"`` (a GPU), ``"eager"`` (any device) or ``"reference"`` (all logits at once).

    Returns:
        The loss in nats, fp32 (fp64 for fp64 x): () or, for ``"none"``, (T,) with 0 for ignored tokens.

    Raises:
        ConfigError: shapes, dtypes or targets do not fit, or the backend cannot run here.
    """
    name = LINEAR_CROSS_ENTROPY.name
    if reduction not in REDUCTIONS:
        raise ConfigError(f"{name}: reduction={reduction!r} does not exist; choose {', '.join(REDUCTIONS)}")
    require_dimensions(name, "x", x, "(T, D)")
    require_floating(name, "x", x)
    tokens, d_model = x.shape
    require_dimensions(name, "weight", weight, "(V, D)")
    vocab_size = weight.shape[0]
    require_shape(name, "weight", weight, "(V, D)", (vocab_size, d_model))
    require_integer(name, "target", target)
    require_shape(name, "target", target, "(T,)", (tokens,))
    if chunk_size is None:
        chunk_size = CPU_CHUNK if x.device.type == "cpu" else ACCELERATOR_CHUNK
    if chunk_size < 1:
        raise ConfigError(f"{name}: chunk_size={chunk_size}; it must be at least 1")
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= vocab_size)) & (target != ignore_index)]
        if wrong.numel():
            raise ConfigError(
                f"{name}: target {int(wrong[0])} is neither in 0 … {vocab_size - 1} nor ignore_index={ignore_index}"
            )
    run = LINEAR_CROSS_ENTROPY.choose(backend, x.device, x.dtype)
    loss: Tensor = run(
        x, weight, target, ignore_index, reduction, chunk_size, product_dtype(name, x, weight=weight)
    )
    return loss
