"""One residual step: x + Σ layer(norm(x)), pre-norm. One branch is the sequential block, several the parallel one."""

from collections.abc import Sequence

from torch import Tensor, nn

from switchmamba.layers.interface import Layer, LayerState, RouterStats, SequenceInfo
from switchmamba.models.config import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """Build the norm that ``config`` names, over d_model, with affine parameters."""
    norm_class = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return norm_class(config.d_model, eps=config.norm_eps)


class ResidualStep(nn.Module):
    """A norm and the branches behind it; each branch is an attribute under its layer's name (``layers.0.mamba``)."""

    def __init__(self, config: ModelConfig, branches: Sequence[str]) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.branch_names = tuple(branches)
        for name in branches:
            self.add_module(name, config.layers[name].build(config.d_model))

    def branches(self) -> list[Layer]:
        """Return the layers side by side in this step."""
        return [self.get_submodule(name) for name in self.branch_names]  # type: ignore[misc]

    def forward(
        self, x_BLD: Tensor, sequence: SequenceInfo, states: Sequence[LayerState | None]
    ) -> tuple[Tensor, tuple[LayerState | None, ...], tuple[RouterStats, ...]]:
        """Add the branches to x (B, L, D); ``states`` has one entry per branch."""
        normed_BLD = self.norm(x_BLD)
        outputs = [
            layer(normed_BLD, sequence, state) for layer, state in zip(self.branches(), states, strict=True)
        ]
        for output in outputs:
            x_BLD = x_BLD + output.y
        return x_BLD, tuple(o.state for o in outputs), tuple(s for o in outputs for s in o.router_stats)
