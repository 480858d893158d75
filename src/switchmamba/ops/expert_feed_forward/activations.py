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


def activation_gradient(gradient: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """Return the gradient of the hidden layer from that of what :func:`activate` made of it."""
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        dhidden = torch.empty_like(hidden)
        dgate, dup = dhidden.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=dup)
        _aten.silu_backward.grad_input(gradient * up, gate, grad_input=dgate)
        return dhidden
    return _GRADIENTS[activation](gradient, hidden)
