"""Mixture of experts as a feed-forward (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, §2).

    y_t = Σ_k weight_tk · Expert_{index_tk}(x_t),    Expert(x) = W2 act(W1 x)

``train()`` drops tokens over capacity when ``capacity_factor`` is set; ``eval()`` is always dropless, because dropping
makes a token's output depend on its batch mates.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from switchmamba.layers.feed_forward.mlp import Activation, hidden_rows
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import Layer, LayerConfig, LayerCost, LayerOutput, LayerState, SequenceInfo
from switchmamba.layers.routing import AnyRouterConfig, limit_capacity
from switchmamba.layers.routing.top_k import TopKRouter, TopKRouterConfig
from switchmamba.ops import expert_feed_forward
from switchmamba.ops.fused_step import experts_step, fused_step_unavailable


class MoEConfig(LayerConfig):
    """``num_experts`` feed-forwards of width ``d_expert`` behind a router; ``capacity_factor`` None is dropless."""

    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    d_expert: PositiveInt
    activation: Activation = "swiglu"
    router: AnyRouterConfig = Field(default_factory=TopKRouterConfig)
    capacity_factor: PositiveFloat | None = None

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEConfig":
        if self.router.experts_per_token > self.num_experts:
            raise ValueError(
                f"top_k={self.router.experts_per_token} exceeds num_experts={self.num_experts}; lower top_k"
            )
        return self

    def build(self, d_model: int) -> "MoE":  # noqa: D102
        return MoE(self, d_model)

    def cost(self, d_model: int) -> LayerCost:  # noqa: D102
        hidden = hidden_rows(self.activation, self.d_expert)
        expert = d_model * (hidden + self.d_expert)
        router = self.router.parameters(d_model, self.num_experts)
        visited = self.router.experts_per_token
        return LayerCost(
            parameters=self.num_experts * expert + router,
            active_parameters=visited * expert + router,
            flops_per_token=2 * (visited * expert + router),
            # x, each visited expert's hidden layer, probabilities and logits, and the routing (int64 counts twice).
            activation_values=d_model + visited * (hidden + 10) + 2 * self.num_experts,
        )


class MoE(Layer):
    """A router and its experts; w1_EFD holds the gate's rows before the up part's for SwiGLU."""

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.activation, self.capacity_factor = config.activation, config.capacity_factor
        self.router = config.router.build(d_model, config.num_experts)
        hidden = hidden_rows(config.activation, config.d_expert)
        self.w1_EFD = nn.Parameter(torch.empty(config.num_experts, hidden, d_model))
        self.w2_EDF = nn.Parameter(torch.empty(config.num_experts, d_model, config.d_expert))

    def initialize(self, scheme: Initialization) -> None:  # noqa: D102
        self.router.initialize(scheme)
        scheme.projection(self.w1_EFD, fan_in=self.w1_EFD.shape[-1])
        scheme.expert_output(self.w2_EDF)

    def decode_(
        self, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
    ) -> Tensor:
        """Apply the experts to one token per row; on a GPU in a few launches (ops/fused_step)."""
        unfused = fused_step_unavailable(x_BD.device, self.w1_EFD.dtype) is not None
        if unfused or self.training or type(self.router) is not TopKRouter:
            return super().decode_(x_BD, norm, sequence, state)
        router = self.router
        y_BD: Tensor = experts_step(
            x_BD, norm, router.weight, router.top_k, self.w1_EFD, self.w2_EDF, self.activation
        )
        return y_BD

    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Route, drop what is over capacity, apply the experts, combine."""
        x_TD = x_BLD.flatten(0, 1)
        padding_T = None if sequence.padding_BL is None else sequence.padding_BL.flatten()
        routing = self.router(x_TD, padding_T)
        if self.training and self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor)
        y_TD = expert_feed_forward(
            x_TD if routing.x_TD is None else routing.x_TD,
            routing.expert_index_TK,
            routing.expert_weight_TK,
            self.w1_EFD,
            self.w2_EDF,
            self.activation,
        )
        router_stats = (routing.stats,) if sequence.observe_routers else ()
        return LayerOutput(y_TD.view_as(x_BLD), None, router_stats)
