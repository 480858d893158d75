"""Mamba layer, Gu & Dao 2023 (arXiv 2312.00752), §3 and figure 3.

    x, z    = in_proj(u)                          D → 2·I
    x       = silu(causal_conv1d(x))              depthwise, d_conv taps
    Δ, B, C = x_proj(x)                           I → dt_rank + 2·N
    Δ       = softplus(dt_proj(Δ) + dt_bias)      dt_rank → I
    h_t     = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t    A = −exp(A_log), state (I, N) in fp32
    y_t     = C_t h_t + D x_t
    out     = out_proj(y · silu(z))               I → D

With ``inner_norm_eps``, what x_proj returns passes through an RMS norm each for Δ, B and C, as in Jamba
(arXiv 2403.19887, §2); their names are those of its checkpoints.

:class:`SelectiveMixer` is what stands between in_proj and out_proj, which variants replace.
Parameter names are those of the upstream Mamba checkpoints. Suffixes: R dt_rank, W d_conv; the rest as in the glossary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, log
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from switchmamba.config import Ratio
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo
from switchmamba.layers.mixers.halves import product, project, project_halves, widened
from switchmamba.layers.wrapping import convolution, is_plain, is_plain_norm, is_watched
from switchmamba.ops import causal_conv1d_step, causal_conv1d_twice, selective_scan, selective_step
from switchmamba.ops.fused_step import (
    fused_step_unavailable,
    inward_step_,
    linear_step,
    selective_step_,
)


class SelectiveConfig(LayerConfig):
    """What Mamba layers have in common. ``d_inner`` = ⌊expand · d_model⌋; ``dt_rank`` "auto" is ⌈d_model / 16⌉.

    ``inner_norm_eps``: of RMS norms on Δ before its projection, on B and on C; None: there are none.
    """

    kind: str
    expand: Ratio = Fraction(2)
    d_state: PositiveInt = 16
    d_conv: PositiveInt = 4
    dt_rank: PositiveInt | Literal["auto"] = "auto"
    dt_min: PositiveFloat = 1e-3
    dt_max: PositiveFloat = 1e-1
    dt_init_floor: PositiveFloat = 1e-4
    inner_norm_eps: PositiveFloat | None = None

    @model_validator(mode="after")
    def _dt_range(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} must not exceed dt_max={self.dt_max}")
        return self

    def check(self, d_model: int) -> None:  # noqa: D102
        if self.d_inner(d_model) < 1:
            raise ValueError(
                f"expand={self.expand} gives no channel at d_model={d_model}; choose a larger expand"
            )

    def d_inner(self, d_model: int) -> int:
        """Return I, the number of channels that the state-space model runs over."""
        return int(self.expand * d_model)

    def rank(self, d_model: int) -> int:
        """Return dt_rank with "auto" resolved."""
        return ceil(d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    def selective_cost(self, d_model: int) -> LayerCost:
        """Return the cost of a :class:`SelectiveMixer` without the projections into it and out of it."""
        inner, rank, states, taps = self.d_inner(d_model), self.rank(d_model), self.d_state, self.d_conv
        matrices = inner * (rank + 2 * states) + rank * inner
        normed = 0 if self.inner_norm_eps is None else rank + 2 * states
        vectors = inner * (taps + 1) + inner + inner * states + inner + normed
        # A state-step: Δ·A, exp, decay·h, (Δx)·B, +, C·h, +.
        scan_flops = 7 * inner * states
        return LayerCost(
            parameters=matrices + vectors,
            active_parameters=matrices + vectors,
            flops_per_token=2 * matrices + 2 * inner * taps + scan_flops,
            state_values=inner * (states + taps - 1),
            # x and z before the convolution, x after it, Δ before softplus; low-rank Δ, B and C; and the state at every
            # 32nd step, from which the scan's backward pass starts again.
            # Inner norms keep their input and what they normalised as well.
            activation_values=4 * inner + rank + 2 * states + 2 * normed + inner * states // 32,
        )


def projection_cost(d_in: int, d_out: int) -> LayerCost:
    """Return the cost of a matrix d_in → d_out, whose input training keeps."""
    matrix = d_in * d_out
    return LayerCost(matrix, matrix, 2 * matrix, activation_values=d_in)


class MambaConfig(SelectiveConfig):
    """A Mamba layer."""

    kind: Literal["mamba"] = "mamba"

    def build(self, d_model: int) -> "Mamba":  # noqa: D102
        return Mamba(self, d_model)

    def cost(self, d_model: int) -> LayerCost:  # noqa: D102
        inner = self.d_inner(d_model)
        projections = projection_cost(d_model, 2 * inner) + projection_cost(inner, d_model)
        return self.selective_cost(d_model) + projections


@dataclass(frozen=True)
class MambaState(LayerState):
    """conv_BWI (B, d_conv − 1, I): the last inputs of the convolution; ssm_BIN (B, I, N) fp32: h."""

    conv_BWI: Tensor
    ssm_BIN: Tensor


ALIGNMENT = 16
"""Channels on a GPU are padded to a multiple of it: at d_inner 1706 rows that begin anywhere cost half of the speed."""


class DeltaProjection(nn.Linear):
    """dt_proj without its bias, which the scan adds in fp32 just before softplus."""

    def forward(self, dt_BLR: Tensor) -> Tensor:
        """Map (B, L, dt_rank) to (B, L, I)."""
        if dt_BLR.device.type == "cpu" or not torch.is_grad_enabled():
            return F.linear(dt_BLR, self.weight)
        return product(dt_BLR, self.weight)


class InnerNorm(nn.RMSNorm):
    """RMS norm computed in fp32 or wider, returned in the dtype of its input, whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


class SelectiveMixer(Layer):
    """Convolution, selective scan and gate: from x and z (B, L, I) to y (B, L, I).

    A variant brings the projections: ``inward``, modules by name, and ``out_proj``. It registers them here so that the
    parameters stand in the order in which they are used.
    """

    state_class = MambaState
    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_proj.bias")

    def __init__(
        self, config: SelectiveConfig, d_model: int, inward: Mapping[str, nn.Module], out_proj: nn.Module
    ) -> None:
        super().__init__()
        inner, rank = config.d_inner(d_model), config.rank(d_model)
        self._config = config
        self.split_sizes = [rank, config.d_state, config.d_state]
        for name, projection in inward.items():
            self.add_module(name, projection)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.split_sizes), bias=False)
        if config.inner_norm_eps is not None:
            self.dt_layernorm = InnerNorm(rank, eps=config.inner_norm_eps)
            self.b_layernorm = InnerNorm(config.d_state, eps=config.inner_norm_eps)
            self.c_layernorm = InnerNorm(config.d_state, eps=config.inner_norm_eps)
        self.dt_proj = DeltaProjection(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = out_proj
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def initialize_convolution(self, scheme: Initialization) -> None:
        """Fill the convolution and x_proj by the scheme."""
        scheme.mamba_projection(self.conv1d.weight, fan_in=self._config.d_conv)
        assert self.conv1d.bias is not None
        scheme.mamba_projection(self.conv1d.bias, fan_in=self._config.d_conv)
        scheme.mamba_projection(self.x_proj.weight, fan_in=self.x_proj.in_features)

    def initialize_recurrence(self) -> None:
        """Fill A_log = log(1..N), D = 1, dt as in Mamba §3.6, and the inner norms' scales with 1."""
        config, inner, rank = self._config, self.D.shape[0], self.dt_proj.in_features
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, config.d_state + 1, dtype=torch.float32).log().expand(inner, -1))
            self.D.fill_(1)
            if config.inner_norm_eps is not None:
                for norm in (self.dt_layernorm, self.b_layernorm, self.c_layernorm):
                    norm.weight.fill_(1)
            low, high = log(config.dt_min), log(config.dt_max)
            dt_I = (
                torch.empty_like(self.dt_proj.bias)
                .uniform_(low, high)
                .exp_()
                .clamp_(min=config.dt_init_floor)
            )
            self.dt_proj.bias.copy_(dt_I + torch.log(-torch.expm1(-dt_I)))  # inverse of softplus

    def mix(
        self, x_BLI: Tensor, z_BLI: Tensor, sequence: SequenceInfo, state: LayerState | None
    ) -> tuple[Tensor, MambaState]:
        """Return y · silu(z) and the state after the last token; one token with a state takes the recurrent step.

        Without a state x and z may have channels of zeros behind their own, and then y has (:data:`ALIGNMENT`).
        """
        assert state is None or isinstance(state, MambaState)
        if state is not None and x_BLI.shape[1] == 1:
            return self._step(x_BLI, z_BLI, state)
        return self._scan(x_BLI, z_BLI, sequence, state)

    def _scan(
        self, x_BLI: Tensor, z_BLI: Tensor, sequence: SequenceInfo, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        inner = self.D.shape[0]
        extra = x_BLI.shape[-1] - inner
        taps_IW, bias_I = convolution(self.conv1d)
        x_BLI, again_BLI, conv_BWI = causal_conv1d_twice(
            x_BLI,
            widened(taps_IW, extra),
            widened(bias_I, extra),
            activation="silu",
            initial_state=None if state is None else state.conv_BWI,
            document_ids=sequence.document_ids_BL,
        )
        dt_BLR, B_BLN, C_BLN = self._low_rank(project(self.x_proj, again_BLI, extra))
        y_BLI, ssm_BIN = selective_scan(
            x_BLI,
            product(dt_BLR, widened(self.dt_proj.weight, extra)) if extra else self.dt_proj(dt_BLR),
            widened(-torch.exp(self.A_log), extra),
            B_BLN,
            C_BLN,
            D=widened(self.D, extra),
            z=z_BLI,
            dt_bias=widened(self.dt_proj.bias, extra),
            dt_softplus=True,
            initial_state=None if state is None else state.ssm_BIN,
            document_ids=sequence.document_ids_BL,
            return_final_state=True,
        )
        if extra:
            conv_BWI, ssm_BIN = conv_BWI[..., :inner].contiguous(), ssm_BIN[:, :inner].contiguous()
        return y_BLI, MambaState(conv_BWI, ssm_BIN)

    def _low_rank(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split what x_proj returns (…, R + 2N) into Δ, B and C, normed if they are to be."""
        dt, B, C = torch.split(projected, self.split_sizes, dim=-1)
        if self._config.inner_norm_eps is None:
            return dt, B, C
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)

    def _step(self, x_BLI: Tensor, z_BLI: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        x_BI, conv_BWI = causal_conv1d_step(
            state.conv_BWI, x_BLI.squeeze(1), *convolution(self.conv1d), activation="silu"
        )
        dt_BR, B_BN, C_BN = self._low_rank(self.x_proj(x_BI))
        y_BI, ssm_BIN = selective_step(
            state.ssm_BIN,
            x_BI,
            self.dt_proj(dt_BR),
            -torch.exp(self.A_log),
            B_BN,
            C_BN,
            D=self.D,
            z=z_BLI.squeeze(1),
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
        )
        return y_BI.unsqueeze(1), MambaState(conv_BWI, ssm_BIN)


class Mamba(SelectiveMixer):
    """The Mamba mixer; all projections are called as modules, so adapters can wrap them."""

    in_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        inner = config.d_inner(d_model)
        in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        super().__init__(config, d_model, {"in_proj": in_proj}, nn.Linear(inner, d_model, bias=False))

    def initialize(self, scheme: Initialization) -> None:
        """Projections by the scheme, the rest as :class:`SelectiveMixer` does."""
        scheme.mamba_projection(self.in_proj.weight, fan_in=self.in_proj.in_features)
        self.initialize_convolution(scheme)
        scheme.mamba_output(self.out_proj.weight, fan_in=self.out_proj.in_features)
        self.initialize_recurrence()

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map x (B, L, D) to y (B, L, D)."""
        extra = self._extra_channels(x_BLD) if state is None else 0
        x_BLI, z_BLI = project_halves(self.in_proj, x_BLD, extra)
        y_BLI, state = self.mix(x_BLI, z_BLI, sequence, state)
        return LayerOutput(project(self.out_proj, y_BLI, extra), state, ())

    def _extra_channels(self, x_BLD: Tensor) -> int:
        """Return how many channels of zeros make the kernels' rows aligned; 0 on a CPU, or where adapters are."""
        return -self.D.shape[0] % ALIGNMENT if x_BLD.device.type != "cpu" and self._all_plain() else 0

    def _all_plain(self) -> bool:
        plain = all(is_plain(projection) for projection in (self.in_proj, self.x_proj, self.out_proj))
        return plain and type(self.dt_proj) is DeltaProjection and not is_watched(self.dt_proj)

    def decode_(
        self, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
    ) -> Tensor:
        """Take one step in place; on a GPU in three launches, if no adapter wraps a projection.

        Inner norms add theirs.
        """
        assert isinstance(state, MambaState)
        plain = self._all_plain() and is_plain_norm(norm)
        if not plain or fused_step_unavailable(x_BD.device, self.in_proj.weight.dtype) is not None:
            return super().decode_(x_BD, norm, sequence, state)
        u_BI, z_BI, low_rank = inward_step_(
            x_BD,
            norm,
            self.in_proj.weight,
            *convolution(self.conv1d),
            state.conv_BWI,
            self.x_proj.weight,
        )
        if self._config.inner_norm_eps is not None:
            low_rank = torch.cat(self._low_rank(low_rank.sum(0)), dim=-1)[None]
        y_BI = selective_step_(
            state.ssm_BIN, u_BI, low_rank, z_BI, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D
        )
        y_BD: Tensor = linear_step(y_BI, self.out_proj.weight, None, x_BD)
        return y_BD
