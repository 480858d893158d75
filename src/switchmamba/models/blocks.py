"""One residual step: x + Σ layer(norm(x)), pre-norm. One branch is the sequential block, several the parallel one.

Parallel branches share the norm, as in MoE-Mamba (arXiv 2401.04081v2, §4.4), or have one each (``norm_per_branch``).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from switchmamba.layers.interface import Layer, LayerState, RouterStats, SequenceInfo, decode_by_forward_
from switchmamba.layers.wrapping import is_plain_norm, unwrapped
from switchmamba.models.config import ModelConfig
from switchmamba.ops import residual_norm

Norm = nn.LayerNorm | nn.RMSNorm


def build_norm(config: ModelConfig) -> Norm:
    """Build the norm that ``config`` names, over d_model, with affine parameters."""
    norm_class = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return norm_class(config.d_model, eps=config.norm_eps)


class ResidualStep(nn.Module):
    """A norm and the branches behind it; each branch is an attribute under its layer's name (``layers.0.mamba``).

    Its norm is ``norm``, or with one per branch ``norms.<layer's name>``.
    """

    def __init__(self, config: ModelConfig, branches: Sequence[str]) -> None:
        super().__init__()
        if config.norms_of(branches) == 1:
            self.norm = build_norm(config)
        else:
            self.norms = nn.ModuleDict({name: build_norm(config) for name in branches})
        self.branch_names = tuple(branches)
        for name in branches:
            self.add_module(name, config.layers[name].build(config.d_model))

    def branches(self) -> list[Layer]:
        """Return the layers side by side in this step, from inside adapters: to be asked, not to be called."""
        return [unwrapped(module) for module in self._called()]  # type: ignore[misc]

    def _called(self) -> list[nn.Module]:
        """Return what is called for each branch: the layer, or the adapter around it."""
        return [self.get_submodule(name) for name in self.branch_names]

    def branch_norms(self) -> list[Norm]:
        """Return the norm before each branch; a shared one as often as there are branches."""
        if "norm" in self._modules:
            return [self.norm] * len(self.branch_names)
        return list(self.norms.values())  # type: ignore[arg-type]

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
        normed: dict[Norm, Tensor] = {}
        for norm in dict.fromkeys(self.branch_norms()):
            x_BLD, normed[norm] = _sum_and_norm(norm, x_BLD, branch_BLD)
            branch_BLD = None
        outputs = [
            layer(normed[norm], sequence, state)
            for layer, norm, state in zip(self._called(), self.branch_norms(), states, strict=True)
        ]
        for output in outputs[:-1]:
            x_BLD = x_BLD + output.y
        stats = tuple(s for output in outputs for s in output.router_stats)
        return x_BLD, outputs[-1].y, tuple(output.state for output in outputs), stats

    def decode_(self, x_BD: Tensor, sequence: SequenceInfo, states: Sequence[LayerState | None]) -> Tensor:
        """Add the branches to x (B, D), one token per row, and update the states in place (:meth:`Layer.decode_`)."""
        first, *others = (
            layer.decode_(x_BD, norm, sequence, state)
            if isinstance(layer, Layer)
            else decode_by_forward_(layer, x_BD, norm, sequence, state)
            for layer, norm, state in zip(self._called(), self.branch_norms(), states, strict=True)
        )
        for other in others:
            first = first + (other - x_BD)
        return first


def _sum_and_norm(norm: Norm, x_BLD: Tensor, branch_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + branch and its norm.

    On a GPU one kernel makes both, and one adds up the gradients of both; then the norm is not called as a module,
    unless a hook watches it or something wraps it.
    """
    watched = norm._forward_hooks or norm._forward_pre_hooks or not is_plain_norm(norm)
    if x_BLD.device.type == "cpu" or watched:
        x_BLD = x_BLD if branch_BLD is None else x_BLD + branch_BLD
        return x_BLD, norm(x_BLD)
    centered = isinstance(norm, nn.LayerNorm)
    bias_D = norm.bias if isinstance(norm, nn.LayerNorm) else None
    assert norm.eps is not None
    return residual_norm(x_BLD, branch_BLD, norm.weight, bias_D, norm.eps, centered)
