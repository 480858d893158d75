"""Mamba-2 layer, Dao & Gu 2024 (arXiv 2405.21060), §7.1 and figure 6.

    z, x, B, C, Δ = in_proj(u)                      D → 2·I + 2·G·N + H
    x, B, C = silu(causal_conv1d([x, B, C]))        depthwise, d_conv taps
    Δ       = softplus(Δ + dt_bias)
    h_t     = exp(Δ_t A) h_{t-1} + Δ_t x_t ⊗ B_t    A = −exp(A_log), one per head; state (H, P, N) in fp32
    y_t     = h_t C_t + D x_t
    out     = out_proj(norm(y · silu(z)))           RMS norm over each group's channels; I → D

I = H·P channels in H heads; the heads of a group share B and C. Parameter names are those of the upstream Mamba-2
checkpoints. Suffixes: W d_conv, J = I + 2·G·N channels of the convolution; the rest as in the glossary.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from switchmamba.config import Ratio
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo
from switchmamba.layers.mixers.halves import project
from switchmamba.layers.wrapping import convolution
from switchmamba.ops import causal_conv1d_step, gated_rms_norm, mamba2_inner, ssd_step


class Mamba2Config(LayerConfig):
    """A Mamba-2 layer. ``d_inner`` = ⌊expand · d_model⌋ = heads · ``head_dim``; ``num_groups`` divides the heads."""

    kind: Literal["mamba2"] = "mamba2"
    expand: Ratio = Fraction(2)
    head_dim: PositiveInt = 64
    d_state: PositiveInt = 128
    d_conv: PositiveInt = 4
    num_groups: PositiveInt = 1
    norm_eps: PositiveFloat = 1e-5
    A_min: PositiveFloat = 1.0
    A_max: PositiveFloat = 16.0
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 1e-1
    dt_init_floor: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _ranges(self) -> "Mamba2Config":
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must not exceed {high}={getattr(self, high)}")
        return self

    def check(self, d_model: int) -> None:  # noqa: D102
        inner = self.d_inner(d_model)
        if inner < 1 or inner % self.head_dim:
            raise ValueError(
                f"d_inner={inner} (expand={self.expand} times d_model={d_model}) is not divisible by "
                f"head_dim={self.head_dim}; choose head_dim or expand so that it is"
            )
        if self.num_heads(d_model) % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide the {self.num_heads(d_model)} heads "
                f"(d_inner={inner} over head_dim={self.head_dim}); choose a divisor"
            )

    def d_inner(self, d_model: int) -> int:
        """Return I, the number of channels that the state-space model runs over."""
        return int(self.expand * d_model)

    def num_heads(self, d_model: int) -> int:
        """Return H = I / head_dim."""
        return self.d_inner(d_model) // self.head_dim

    def split_sizes(self, d_model: int) -> list[int]:
        """Return the widths of z, of x, B and C together, and of Δ in the input projection's output."""
        inner = self.d_inner(d_model)
        return [inner, inner + 2 * self.num_groups * self.d_state, self.num_heads(d_model)]

    def build(self, d_model: int) -> "Mamba2":  # noqa: D102
        return Mamba2(self, d_model)

    def cost(self, d_model: int) -> LayerCost:  # noqa: D102
        inner, heads, states, taps = self.d_inner(d_model), self.num_heads(d_model), self.d_state, self.d_conv
        _, convolved, _ = sizes = self.split_sizes(d_model)
        matrices = d_model * sum(sizes) + inner * d_model
        vectors = convolved * (taps + 1) + 3 * heads + inner
        # Of the recurrence, a state-step: decay·h, (Δx)·B, +, C·h, +. A chunk's matrix products do about as many.
        scan_flops = 5 * inner * states
        return LayerCost(
            parameters=matrices + vectors,
            active_parameters=matrices + vectors,
            flops_per_token=2 * matrices + 2 * convolved * taps + scan_flops,
            state_values=inner * states + convolved * (taps - 1),
            # u; what in_proj returns; x, B and C after the convolution; y before the gate and after the norm; and the
            # state that enters each chunk of 64 steps, from which the scan's backward pass starts again.
            activation_values=d_model + sum(sizes) + convolved + 2 * inner + inner * states // 64,
        )


@dataclass(frozen=True)
class Mamba2State(LayerState):
    """conv_BWJ (B, d_conv − 1, I + 2·G·N): the last inputs of the convolution; ssm_BHPN (B, H, P, N) fp32: h."""

    conv_BWJ: Tensor
    ssm_BHPN: Tensor


class GatedRMSNorm(nn.Module):
    """norm(y · silu(z)) over each of G groups of channels, with a learned scale."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Map y and z (…, I) to (…, I)."""
        return gated_rms_norm(y, z, self.weight, self.groups, self.eps)


class Mamba2(Layer):
    """The Mamba-2 mixer; all projections are called as modules, so adapters can wrap them."""

    state_class = Mamba2State
    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.sizes = config.split_sizes(d_model)
        inner, convolved, heads = self.sizes
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, config.d_conv, groups=convolved)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, config.num_groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def initialize(self, scheme: Initialization) -> None:
        """Projections by the scheme; A uniform in [A_min, A_max], D = 1, dt as in Mamba §3.6, the norm's scale 1."""
        config = self.config
        scheme.mamba_projection(self.in_proj.weight, fan_in=self.in_proj.in_features)
        scheme.mamba_projection(self.conv1d.weight, fan_in=config.d_conv)
        assert self.conv1d.bias is not None
        scheme.mamba_projection(self.conv1d.bias, fan_in=config.d_conv)
        scheme.mamba_output(self.out_proj.weight, fan_in=self.out_proj.in_features)
        with torch.no_grad():
            self.norm.weight.fill_(1)
            self.A_log.uniform_(config.A_min, config.A_max).log_()
            self.D.fill_(1)
            low, high = log(config.dt_min), log(config.dt_max)
            dt_H = torch.empty_like(self.dt_bias).uniform_(low, high).exp_().clamp_(min=config.dt_init_floor)
            self.dt_bias.copy_(dt_H + torch.log(-torch.expm1(-dt_H)))  # inverse of softplus

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map x (B, L, D) to y (B, L, D); one token with a state takes the recurrent step."""
        assert state is None or isinstance(state, Mamba2State)
        projected = project(self.in_proj, x_BLD)
        if state is not None and x_BLD.shape[1] == 1:
            y_BLI, state = self._step(projected, state)
        else:
            y_BLI, state = self._scan(projected, sequence, state)
        return LayerOutput(project(self.out_proj, y_BLI), state, ())

    def _scan(
        self, projected: Tensor, sequence: SequenceInfo, state: Mamba2State | None
    ) -> tuple[Tensor, Mamba2State]:
        y_BLI, conv_BWJ, ssm_BHPN = mamba2_inner(
            projected,
            *convolution(self.conv1d),
            -torch.exp(self.A_log),
            self.D,
            self.dt_bias,
            self.norm.weight,
            self.config.d_state,
            self.config.num_groups,
            self.config.norm_eps,
            conv_state=None if state is None else state.conv_BWJ,
            ssm_state=None if state is None else state.ssm_BHPN,
            document_ids=sequence.document_ids_BL,
        )
        return y_BLI, Mamba2State(conv_BWJ, ssm_BHPN)

    def _step(self, projected: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        z_BI, xBC_BJ, dt_BH = torch.split(projected.squeeze(1), self.sizes, dim=-1)
        xBC_BJ, conv_BWJ = causal_conv1d_step(
            state.conv_BWJ, xBC_BJ, *convolution(self.conv1d), activation="silu"
        )
        config = self.config
        shared = config.num_groups * config.d_state
        x_BI, B, C = torch.split(xBC_BJ, [self.sizes[0], shared, shared], dim=-1)
        y_BHP, ssm_BHPN = ssd_step(
            state.ssm_BHPN,
            x_BI.view(len(x_BI), -1, config.head_dim),
            dt_BH,
            -torch.exp(self.A_log),
            B.view(len(B), -1, config.d_state),
            C.view(len(C), -1, config.d_state),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        y_BI = self.norm(y_BHP.flatten(-2), z_BI)
        return y_BI.unsqueeze(1), Mamba2State(conv_BWJ, ssm_BHPN)
