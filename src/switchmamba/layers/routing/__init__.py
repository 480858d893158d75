"""Routers: how tokens meet experts. A new one is a file here and a member of :data:`AnyRouterConfig`."""

from switchmamba.layers.routing.interface import Router, RouterConfig, Routing, limit_capacity
from switchmamba.layers.routing.top_k import TopKRouterConfig

AnyRouterConfig = TopKRouterConfig
"""Union of all router configurations, told apart by ``kind``."""

__all__ = ["AnyRouterConfig", "Router", "RouterConfig", "Routing", "limit_capacity"]
