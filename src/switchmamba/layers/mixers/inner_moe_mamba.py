"""Inner MoE: a Mamba layer whose projections are mixtures of experts (MoE-Mamba, arXiv 2401.04081v2, §4.5, table 3).

    x    = conv_proj(u)                 D → I, behind it the convolution      "conv"
    z    = gate_proj(u)                 D → I                                 "gate"
    y    = the selective scan of Mamba, times silu(z)
    out  = out_proj(y)                  I → D                                 "out"

Each projection that ``projections`` names is a router and experts in → d_expert → out (``feed_forward/moe.py``), with
parameters of its own; the others are matrices. The projection x_proj of Δ, B and C stays a matrix, as in the paper.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import field_validator
from torch import Tensor, nn

from switchmamba.layers.feed_forward.moe import MoE, MoEConfig
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import LayerCost, LayerOutput, LayerState, RouterStats, SequenceInfo
from switchmamba.layers.mixers.halves import project
from switchmamba.layers.mixers.mamba import MambaState, SelectiveConfig, SelectiveMixer, projection_cost
from switchmamba.layers.wrapping import unwrapped

Projection = Literal["conv", "gate", "out"]
ORDER: tuple[Projection, ...] = ("conv", "gate", "out")
"""The order in which a token meets them, and in which their routers' statistics come."""


class InnerMoEMambaConfig(SelectiveConfig):
    """A Mamba layer with ``experts`` in place of each of its ``projections``."""

    kind: Literal["inner_moe_mamba"] = "inner_moe_mamba"
    projections: list[Projection]
    experts: MoEConfig

    @field_validator("projections")
    @classmethod
    def _in_order(cls, projections: list[Projection]) -> list[Projection]:
        if not projections or len(set(projections)) < len(projections):
            raise ValueError(
                'name at least one of "conv", "gate" and "out", and each once; a layer without any is kind = "mamba"'
            )
        return [name for name in ORDER if name in projections]

    def widths(self, d_model: int) -> dict[Projection, tuple[int, int]]:
        """Return the input and output width of each projection."""
        inner = self.d_inner(d_model)
        return {"conv": (d_model, inner), "gate": (d_model, inner), "out": (inner, d_model)}

    def build(self, d_model: int) -> "InnerMoEMamba":  # noqa: D102
        return InnerMoEMamba(self, d_model)

    def cost(self, d_model: int) -> LayerCost:  # noqa: D102
        cost = self.selective_cost(d_model)
        for name, (d_in, d_out) in self.widths(d_model).items():
            routed = name in self.projections
            cost += self.experts.cost(d_in, d_out) if routed else projection_cost(d_in, d_out)
        return replace(
            cost, activation_values=cost.activation_values - d_model
        )  # conv and gate keep the same u


class InnerMoEMamba(SelectiveMixer):
    """The Mamba mixer with routed projections."""

    conv_proj: nn.Linear | MoE
    gate_proj: nn.Linear | MoE
    out_proj: nn.Linear | MoE

    def __init__(self, config: InnerMoEMambaConfig, d_model: int) -> None:
        modules = {
            name: config.experts.build(*widths)
            if name in config.projections
            else nn.Linear(*widths, bias=False)
            for name, widths in config.widths(d_model).items()
        }
        inward = {"conv_proj": modules["conv"], "gate_proj": modules["gate"]}
        super().__init__(config, d_model, inward, modules["out"])
        routed = [module for module in modules.values() if isinstance(module, MoE)]
        self.causal = all(module.causal for module in routed)
        self.why_not_causal = routed[0].why_not_causal
        self.batch_invariant = all(module.batch_invariant for module in routed)

    def initialize(self, scheme: Initialization) -> None:
        """Matrices as Mamba's, experts as a MoE layer's; only those of out_proj end a branch."""
        within = replace(scheme, num_residual_steps=1)
        _initialize(self.conv_proj, within, scheme.mamba_projection)
        _initialize(self.gate_proj, within, scheme.mamba_projection)
        self.initialize_convolution(scheme)
        _initialize(self.out_proj, scheme, scheme.mamba_output)
        self.initialize_recurrence()

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map x (B, L, D) to y (B, L, D)."""
        x_BLI, conv_stats = _apply(self.conv_proj, x_BLD, sequence)
        z_BLI, gate_stats = _apply(self.gate_proj, x_BLD, sequence)
        y_BLI, state = self.mix(x_BLI, z_BLI, sequence, state)
        y_BLD, out_stats = _apply(self.out_proj, y_BLI, sequence)
        return LayerOutput(y_BLD, state, conv_stats + gate_stats + out_stats)

    def decode_(
        self, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
    ) -> Tensor:
        """Take one step in place; on a GPU a router and its experts take a few launches."""
        assert isinstance(state, MambaState)
        u_BD = norm(x_BD)
        x_BI, z_BI = (_step(module, u_BD, sequence) for module in (self.conv_proj, self.gate_proj))
        y_B1I, new_state = self.mix(x_BI.unsqueeze(1), z_BI.unsqueeze(1), sequence, state)
        state.conv_BWI.copy_(new_state.conv_BWI)
        state.ssm_BIN.copy_(new_state.ssm_BIN)
        return x_BD + _step(self.out_proj, y_B1I.squeeze(1), sequence)


def _apply(
    projection: nn.Module, u_BLD: Tensor, sequence: SequenceInfo
) -> tuple[Tensor, tuple[RouterStats, ...]]:
    if isinstance(unwrapped(projection), MoE):
        output: LayerOutput = projection(u_BLD, sequence)
        return output.y, output.router_stats
    return project(projection, u_BLD), ()


def _step(projection: nn.Module, u_BD: Tensor, sequence: SequenceInfo) -> Tensor:
    if isinstance(projection, MoE):
        return projection.step(u_BD, sequence)
    if isinstance(unwrapped(projection), MoE):
        return _apply(projection, u_BD.unsqueeze(1), sequence)[0].squeeze(1)
    y_BO: Tensor = projection(u_BD)
    return y_BO


def _initialize(projection: nn.Linear | MoE, scheme: Initialization, fill: Callable[..., None]) -> None:
    if isinstance(projection, MoE):
        projection.initialize(scheme)
    else:
        fill(projection.weight, fan_in=projection.in_features)
