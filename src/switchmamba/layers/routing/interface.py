"""What a router decides: which experts each token visits, and with what weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from switchmamba.config import Config
from switchmamba.layers.initialization import Initialization
from switchmamba.layers.interface import KeepsFloat32, RouterStats, SequenceInfo
from switchmamba.ops import expert_capacity


@dataclass(frozen=True)
class Routing:
    """Assignments of tokens to experts. T tokens, E experts, K assignments per token.

    Attributes:
        expert_index_TK: (T, K) int64 in [0, E]; E stands for "no expert": padding, or dropped over capacity.
        expert_weight_TK: (T, K) fp32, factor of the expert's output.
        num_experts: E.
        observe: computes ``stats``, which a decoding step does without.
        x_TD: x as the experts shall read it, if the router adds their gradient of it to its own, or makes the rows that
            they read; None: x itself.
        combine: makes the layer's output (T, D) of the experts' weighted outputs; None: they are it, row by row.
        token_S: the token that stands, or weighs most, in each row of ``x_TD``; None: row t is token t.

    A router whose experts read something else than one row per token (expert choice, Soft MoE) has S rows in all of
    these instead of T, and says with ``combine`` how S rows become T.
    """

    expert_index_TK: Tensor
    expert_weight_TK: Tensor
    num_experts: int
    observe: Callable[[], RouterStats]
    x_TD: Tensor | None = None
    combine: Callable[[Tensor], Tensor] | None = None
    token_S: Tensor | None = None

    @cached_property
    def stats(self) -> RouterStats:
        """What the router saw, for losses and metrics."""
        return self.observe()


class Router(KeepsFloat32, ABC):
    """Decides for T tokens. Runs in fp32 whatever the surrounding precision.

    Class attributes: ``causal`` and ``batch_invariant`` as for a layer, without capacity; ``why_not_causal`` completes
    an error's sentence.
    """

    causal: ClassVar[bool] = True
    batch_invariant: ClassVar[bool] = True
    why_not_causal: ClassVar[str] = ""
    waits_for_device: ClassVar[bool] = False
    """The host reads how many rows the experts get, so no CUDA graph can hold it."""

    def route(self, x_BLD: Tensor, sequence: SequenceInfo) -> Routing:
        """Route x (B, L, D): by default every token by itself."""
        padding_T = None if sequence.padding_BL is None else sequence.padding_BL.flatten()
        routing: Routing = self(x_BLD.flatten(0, 1), padding_T)
        return routing

    @abstractmethod
    def forward(self, x_TD: Tensor, padding_T: Tensor | None) -> Routing:
        """Route x (T, D); tokens where padding (T,) bool is True visit no expert and are not counted."""

    @abstractmethod
    def initialize(self, scheme: Initialization) -> None:
        """Fill the parameters in place."""


class RouterConfig(Config, ABC):
    """Configuration of a router; d_model and the number of experts pass down through :meth:`build`."""

    drops: ClassVar[bool] = True
    """A layer's ``capacity_factor`` can limit it: each token chooses its experts."""

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        """How many experts a token visits, on average."""

    @abstractmethod
    def build(self, d_model: int, num_experts: int) -> Router:
        """Build the router."""

    def parameters(self, d_model: int, num_experts: int) -> int:
        """Count the router's parameters; by default those of a linear map without a bias."""
        return d_model * num_experts

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the router does not fit this number of experts."""
        if self.experts_per_token > num_experts:
            raise ValueError(f"top_k={self.experts_per_token} exceeds num_experts={num_experts}; lower top_k")

    def flops_per_token(self, d_model: int, num_experts: int) -> int:
        """One token's forward pass through the router; a multiply-add counts as 2."""
        return 2 * self.parameters(d_model, num_experts)

    def activation_values(self, d_model: int, num_experts: int) -> int:
        """Values per token that training keeps for the router's backward pass: probabilities and logits."""
        return 2 * num_experts


def limit_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drop assignments over each expert's capacity = max(1, ⌊capacity_factor · K · T / E⌋).

    First choices come before second ones, then earlier tokens before later ones (row by row of the batch): the order is
    deterministic, and no token is dropped for a later one of its row. Dropped assignments get index E; the statistics
    keep the counts from before, and learn how many were dropped.
    """
    tokens, choices = routing.expert_index_TK.shape
    experts = routing.num_experts
    capacity = max(1, int(capacity_factor * choices * tokens / experts))
    kept_TK = expert_capacity(routing.expert_index_TK, experts, capacity)

    def observe() -> RouterStats:
        stats = routing.stats  # its counts are from before
        return replace(stats, dropped=(stats.tokens_per_expert_E - capacity).clamp(min=0).sum())

    return replace(routing, expert_index_TK=kept_TK, observe=observe)
