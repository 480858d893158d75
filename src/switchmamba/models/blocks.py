"""One residual step: x + Σ layer(norm(x)), pre-norm. One branch is the sequential block, several the parallel one."""

from collections.abc import Sequence

from torch import Tensor, nn

from switchmamba.layers.interface import Layer, LayerState, RouterStats, SequenceInfo
from switchmamba.models.config import ModelConfig
from switchmamba.ops import residual_norm


def build_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
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
        self,
        x_BLD: Tensor,
        branch_BLD: Tensor | None,
        sequence: SequenceInfo,
        states: Sequence[LayerState | None],
    ) -> tuple[Tensor, Tensor, tuple[LayerState | None, ...], tuple[RouterStats, ...]]:
        """Take the residual stream x + branch (B, L, D) and return it likewise, with the last branch not yet added.

        ``states`` has one entry per branch.
        """
        x_BLD, normed_BLD = self._sum_and_norm(x_BLD, branch_BLD)
        outputs = [
            layer(normed_BLD, sequence, state) for layer, state in zip(self.branches(), states, strict=True)
        ]
        for output in outputs[:-1]:
            x_BLD = x_BLD + output.y
        stats = tuple(s for output in outputs for s in output.router_stats)
        return x_BLD, outputs[-1].y, tuple(output.state for output in outputs), stats

    def _sum_and_norm(self, x_BLD: Tensor, branch_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + branch and its norm.

        On a GPU one kernel makes both, and one adds up the gradients of both; then the norm is not called as a module,
        unless a hook watches it.
        """
        norm = self.norm
        if x_BLD.device.type == "cpu" or norm._forward_hooks or norm._forward_pre_hooks:
            x_BLD = x_BLD if branch_BLD is None else x_BLD + branch_BLD
            return x_BLD, norm(x_BLD)
        centered = isinstance(norm, nn.LayerNorm)
        bias_D = norm.bias if isinstance(norm, nn.LayerNorm) else None
        assert norm.eps is not None
        return residual_norm(x_BLD, branch_BLD, norm.weight, bias_D, norm.eps, centered)

    def decode_(self, x_BD: Tensor, sequence: SequenceInfo, states: Sequence[LayerState | None]) -> Tensor:
        """Add the branches to x (B, D), one token per row, and update the states in place (:meth:`Layer.decode_`)."""
        first, *others = (
            layer.decode_(x_BD, self.norm, sequence, state)
            for layer, state in zip(self.branches(), states, strict=True)
        )
        for other in others:
            first = first + (other - x_BD)
        return first
