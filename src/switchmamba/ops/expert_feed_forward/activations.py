"""What stands between an expert's two matrices, and its gradient.

SwiGLU (Shazeer 2020, arXiv 2002.05202) takes (…, 2F), the gate first, to silu(gate) · up; the others are elementwise.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda gradient, hidden: _aten.threshold_backward(gradient, hidden, 0),
    "gelu": lambda gradient, hidden: _aten.gelu_backward(gradient, hidden),
    "silu": lambda gradient, hidden: _aten.silu_backward(gradient, hidden),
}
ACTIVATIONS = (*_FUNCTIONS, "swiglu")


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Return (…, F) from the hidden layer (…, F), or (…, 2F) for SwiGLU."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _FUNCTIONS[activation](hidden)


def activate_with_pullback(hidden: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what :func:`activate` does, and the function from its gradient, which it overwrites, to hidden's."""
    if activation != "swiglu":
        return _FUNCTIONS[activation](hidden), lambda gradient: _GRADIENTS[activation](gradient, hidden)
    gate, up = hidden.chunk(2, dim=-1)
    open_gate = F.silu(gate)

    def pullback(gradient: Tensor) -> Tensor:
        dhidden = torch.empty_like(hidden)
        dgate, dup = dhidden.chunk(2, dim=-1)
        torch.mul(gradient, open_gate, out=dup)
        _aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=dgate)
        return dhidden

    return open_gate * up, pullback
