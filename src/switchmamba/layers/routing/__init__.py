"""Routers: how tokens meet experts. A new one is a file here and a member of :data:`AnyRouterConfig`."""

from typing import Annotated

from pydantic import Field

from switchmamba.layers.routing.bias_balanced import BiasBalancedRouterConfig
from switchmamba.layers.routing.expert_choice import ExpertChoiceRouterConfig
from switchmamba.layers.routing.gumbel import GumbelRouterConfig
from switchmamba.layers.routing.interface import Router, RouterConfig, Routing, limit_capacity
from switchmamba.layers.routing.policy_gradient import PolicyGradientRouterConfig
from switchmamba.layers.routing.soft import SoftRouterConfig
from switchmamba.layers.routing.top_k import TopKRouterConfig

AnyRouterConfig = Annotated[
    TopKRouterConfig
    | GumbelRouterConfig
    | BiasBalancedRouterConfig
    | PolicyGradientRouterConfig
    | ExpertChoiceRouterConfig
    | SoftRouterConfig,
    Field(discriminator="kind"),
]
"""Union of all router configurations, told apart by ``kind``."""

__all__ = ["AnyRouterConfig", "Router", "RouterConfig", "Routing", "limit_capacity"]
