"""Mixture of experts as a feed-forward (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, §2).

    y_t = Σ_k weight_tk · Expert_{index_tk}(x_t) + Shared(x_t),    Expert(x) = W2 act(W1 x)

Shared experts are visited by every token, with weight 1 (DeepSeekMoE, arXiv 2401.06066, §3.2): n of them are one dense
feed-forward of n times the width. Experts may also stand for a projection d_model → d_out (``mixers/inner_moe_mamba``).
``train()`` drops tokens over capacity when ``capacity_factor`` is set; ``eval()`` is always dropless, because dropping
makes a token's output depend on its batch mates.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from switchmamba.errors import ConfigError
from switchmamba.layers.feed_forward.mlp import MLP, Activation, MLPConfig, hidden_rows
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo
from switchmamba.layers.routing import AnyRouterConfig, Router, limit_capacity
from switchmamba.layers.routing.top_k import TopKRouter, TopKRouterConfig
from switchmamba.layers.wrapping import is_plain_norm
from switchmamba.ops import expert_feed_forward
from switchmamba.ops.expert_feed_forward import waits_for_device
from switchmamba.ops.fused_step import experts_step, fused_step_unavailable


class MoEConfig(LayerConfig):
    """``num_experts`` feed-forwards of width ``d_expert`` behind a router; ``capacity_factor`` None is dropless.

    ``num_shared_experts`` more, of the same width, that every token visits.
    """

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    d_expert: PositiveInt
    activation: Activation = "swiglu"
    router: AnyRouterConfig = Field(default_factory=TopKRouterConfig)
    capacity_factor: PositiveFloat | None = None
    num_shared_experts: NonNegativeInt = 0

    @field_validator("router", mode="before")
    @classmethod
    def _top_k_by_default(cls, router: Any) -> Any:
        return {"kind": "top_k", **router} if isinstance(router, dict) else router

    @model_validator(mode="after")
    def _router_fits(self) -> "MoEConfig":
        self.router.check(self.num_experts)
        if self.capacity_factor is not None and not self.router.drops:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} has no meaning with router.kind={self.router.kind!r}, whose "
                "experts never take more than their share; leave it out"
            )
        return self

    @property
    def shared(self) -> MLPConfig | None:
        """The shared experts as one feed-forward; None without any."""
        if not self.num_shared_experts:
            return None
        return MLPConfig(d_ff=self.num_shared_experts * self.d_expert, activation=self.activation)

    def build(self, d_model: int, d_out: int | None = None) -> "MoE":
        """Build the layer; ``d_out``: width of its output, by default d_model."""
        return MoE(self, d_model, d_out)

    def cost(self, d_model: int, d_out: int | None = None) -> LayerCost:  # noqa: D102
        hidden = hidden_rows(self.activation, self.d_expert)
        expert = d_model * hidden + self.d_expert * (d_out or d_model)
        router = self.router.parameters(d_model, self.num_experts)
        visited = self.router.experts_per_token
        # x, each visited expert's hidden layer, what the router keeps, and the routing (int64 counts twice).
        routed = d_model + int(visited * (hidden + 10))
        cost = LayerCost(
            parameters=self.num_experts * expert + router,
            active_parameters=int(visited * expert) + router,
            flops_per_token=int(2 * visited * expert)
            + self.router.flops_per_token(d_model, self.num_experts),
            activation_values=routed + self.router.activation_values(d_model, self.num_experts),
        )
        return cost if self.shared is None else cost + self.shared.cost(d_model, d_out)


def mixtures(config: BaseModel) -> Iterator[MoEConfig]:
    """Find all mixtures of experts in a configuration: itself, or those inside it."""
    if isinstance(config, MoEConfig):
        yield config
        return
    for name in type(config).model_fields:
        value = getattr(config, name)
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, BaseModel):
                yield from mixtures(part)


class MoE(Layer):
    """A router and its experts; w1_EFD holds the gate's rows before the up part's for SwiGLU.

    It maps (B, L, D) to (B, L, ``d_out``), most often D again; then w2_EDF is (E, d_out, F).
    """

    def __init__(self, config: MoEConfig, d_model: int, d_out: int | None = None) -> None:
        super().__init__()
        self.activation, self.capacity_factor = config.activation, config.capacity_factor
        self.router = config.router.build(d_model, config.num_experts)
        self.causal, self.batch_invariant = self.router.causal, self.router.batch_invariant
        self.why_not_causal = self.router.why_not_causal
        hidden = hidden_rows(config.activation, config.d_expert)
        self.w1_EFD = nn.Parameter(torch.empty(config.num_experts, hidden, d_model))
        self.w2_EDF = nn.Parameter(torch.empty(config.num_experts, d_out or d_model, config.d_expert))
        self.shared: MLP | None = None if config.shared is None else config.shared.build(d_model, d_out)

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        self.router.initialize(scheme)
        scheme.projection(self.w1_EFD, fan_in=self.w1_EFD.shape[-1])
        scheme.expert_output(self.w2_EDF)
        if self.shared is not None:
            self.shared.initialize(scheme)

    def decode_(
        self, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
    ) -> Tensor:
        """Apply the experts to one token per row; on a GPU in a few launches (ops/fused_step)."""
        y_BD = self._fused_step(x_BD, norm, residual=True)
        return super().decode_(x_BD, norm, sequence, state) if y_BD is None else y_BD

    def step(self, x_BD: Tensor, sequence: SequenceInfo) -> Tensor:
        """Return (B, d_out) for one token per row, without norm and residual, as fast as :meth:`decode_`."""
        y_BO = self._fused_step(x_BD, None, residual=False)
        return self(x_BD.unsqueeze(1), sequence).y.squeeze(1) if y_BO is None else y_BO

    def _fused_step(self, x_BD: Tensor, norm: nn.Module | None, residual: bool) -> Tensor | None:
        """Return None where there is no fused step for this layer or device."""
        if not self._has_fused_step() or not is_plain_norm(norm):
            return None
        router = self.router
        assert isinstance(router, TopKRouter)
        y_BO: Tensor = experts_step(
            x_BD, norm, router.weight, router.top_k, self.w1_EFD, self.w2_EDF, self.activation, residual
        )
        return y_BO

    def _has_fused_step(self) -> bool:
        weight, router = self.w1_EFD, self.router
        plain = (
            type(router) is TopKRouter
            and router.temperature == 1
            and (router.top_k == 1 or router.renormalize)
            and self.shared is None
        )
        return plain and not self.training and fused_step_unavailable(weight.device, weight.dtype) is None

    def why_not_capturable(self, dtype: torch.dtype, decoding: bool) -> str | None:
        """Say why no CUDA graph can hold this layer: something in it waits for the device; None if one can.

        Args:
            dtype: of the matrix products.
            decoding: of :meth:`decode_` and :meth:`step` rather than :meth:`forward`.
        """
        if decoding and self._has_fused_step():
            return None
        if self.router.waits_for_device:
            return "its router makes rows for the experts whose number the host has to know"
        return waits_for_device(self.w1_EFD.device, dtype)

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Route, drop what is over capacity, apply the experts, combine."""
        x_TD = x_BLD.flatten(0, 1)
        if not isinstance(self.router, Router):
            raise ConfigError(
                f"router is wrapped by {type(self.router).__name__}, but a router is asked for more than a call, past "
                "what wraps it; take it out of the adapter's targets, and train it itself if it shall change"
            )
        routing = self.router.route(x_BLD, sequence)
        if self.training and self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor)
        y_TD = self.apply_experts(
            x_TD if routing.x_TD is None else routing.x_TD, routing.expert_index_TK, routing.expert_weight_TK
        )
        if routing.combine is not None:
            y_TD = routing.combine(y_TD)
        y_BLD = y_TD.view(*x_BLD.shape[:2], -1)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(x_BLD, sequence).y
        router_stats = (routing.stats,) if sequence.observe_routers else ()
        return LayerOutput(y_BLD, None, router_stats)

    def apply_experts(self, x_TD: Tensor, expert_index_TK: Tensor, expert_weight_TK: Tensor) -> Tensor:
        """Return what the chosen experts make of each token, by weight (T, d_out)."""
        y_TD: Tensor = expert_feed_forward(
            x_TD, expert_index_TK, expert_weight_TK, self.w1_EFD, self.w2_EDF, self.activation
        )
        return y_TD
