"""Dense feed-forward: y = W2 act(W1 x), without biases; SwiGLU (Shazeer 2020): y = W2 (silu(W_gate x) · W_up x)."""

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo

Activation = Literal["relu", "gelu", "silu", "swiglu"]
"""What stands between the two matrices of a feed-forward or an expert."""

KEPT_PER_HIDDEN: dict[Activation, int] = {"relu": 1, "gelu": 2, "silu": 2, "swiglu": 4}
"""Values of width d_ff that the backward pass needs: relu's output serves for its input; the others need both."""


def hidden_rows(activation: Activation, d_ff: int) -> int:
    """Rows of the first matrix: SwiGLU has a gate and an up part."""
    return 2 * d_ff if activation == "swiglu" else d_ff


class MLPConfig(LayerConfig):
    """A dense feed-forward of width ``d_ff``."""

    kind: Literal["mlp"] = "mlp"
    d_ff: PositiveInt
    activation: Activation = "swiglu"

    def build(self, d_model: int, d_out: int | None = None) -> "MLP":
        """Build the layer; ``d_out``: width of its output, by default d_model."""
        return MLP(self, d_model, d_out)

    def cost(self, d_model: int, d_out: int | None = None) -> LayerCost:  # noqa: D102
        hidden = hidden_rows(self.activation, self.d_ff)
        matrices = d_model * hidden + self.d_ff * (d_out or d_model)
        return LayerCost(
            parameters=matrices,
            active_parameters=matrices,
            flops_per_token=2 * matrices,
            activation_values=d_model + KEPT_PER_HIDDEN[self.activation] * self.d_ff,
        )


class MLP(Layer):
    """A dense feed-forward."""

    def __init__(self, config: MLPConfig, d_model: int, d_out: int | None = None) -> None:
        super().__init__()
        self.activation = config.activation
        self.up_proj = nn.Linear(d_model, hidden_rows(config.activation, config.d_ff), bias=False)
        self.down_proj = nn.Linear(config.d_ff, d_out or d_model, bias=False)

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        scheme.projection(self.up_proj.weight, fan_in=self.up_proj.in_features)
        scheme.output(self.down_proj.weight, fan_in=self.down_proj.in_features)

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map each token of x (B, L, D) by itself."""
        hidden = self.up_proj(x_BLD)
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = getattr(F, self.activation)(hidden)
        return LayerOutput(self.down_proj(hidden), None, ())
