"""What every layer is: the one base class, and the values that pass through it.

A layer maps x (B, L, D) to y (B, L, D). What it remembers (:class:`LayerState`) and what its routers saw
(:class:`RouterStats`) are values that it takes and returns; nothing is kept in the module but parameters. One interface
serves mixers, feed-forwards and everything between (a Mamba layer whose projections are experts has both a state and
router statistics); ``docs/decisions/0001-one-layer-interface.md`` says why.

Suffixes: B batch, L length, T = B·L tokens, D d_model, E experts, K top_k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from switchmamba.config import Config
from switchmamba.layers.initialization import Initialization

PADDING_ID = -1
"""Document id of padding. Padding stands to the left of a row's first document."""


def _moved(value: Any, device: torch.device | str | int, non_blocking: bool) -> dict[str, Any]:
    """Return a dataclass's tensors by field, on another device."""
    tensors = {f.name: getattr(value, f.name) for f in fields(value)}
    return {
        name: tensor.to(device, non_blocking=non_blocking)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


@dataclass(frozen=True)
class SequenceInfo:
    """What layers may know of the tokens besides their vectors.

    Attributes:
        document_ids_BL: (B, L) int64, non-decreasing along a row; state, convolution windows and attention stop where
            it changes. None: each row continues one document.
        padding_BL: (B, L) bool, True at padding; None: no padding. Padding is kept out of routers.
        position_B: (B,) int64, how many tokens of the row came before this chunk.
        document_id_B: (B,) int64, the document each row stands in where ``document_ids_BL`` is None.
        observe_routers: return RouterStats; decoding does without.
    """

    document_ids_BL: Tensor | None
    padding_BL: Tensor | None
    position_B: Tensor
    document_id_B: Tensor
    observe_routers: bool = True

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return the same on another device, for models whose layers stand on several."""
        return replace(self, **_moved(self, device, non_blocking))


@dataclass(frozen=True)
class LayerState:
    """What a layer remembers between chunks: a final dataclass of tensors whose first dimension is the batch.

    Class attribute ``grows``: its size grows with the tokens seen, as a key-value cache's does.
    """

    grows: ClassVar[bool] = False

    def select(self, rows: Tensor) -> Self:
        """Return the state of the given rows, an int64 index or a bool mask over the batch."""
        return type(self)(**{f.name: (t := getattr(self, f.name))[rows.to(t.device)] for f in fields(self)})

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return the state on another device."""
        return replace(self, **_moved(self, device, non_blocking))

    @classmethod
    def stack(cls, states: list[Self]) -> Self:
        """Join states along the batch."""
        return cls(**{f.name: torch.cat([getattr(s, f.name) for s in states]) for f in fields(cls)})

    def reset(self, rows_B: Tensor) -> Self:
        """Return the state with the rows where ``rows_B`` (B,) bool is True as if they had seen nothing."""

        def zeroed(tensor: Tensor) -> Tensor:
            return tensor.masked_fill(rows_B.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)

        return replace(self, **{f.name: zeroed(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class RouterStats:
    """What one router saw in one forward pass; sums over tokens, so that passes can be added.

    Padding is not counted. Gradients flow through ``probability_sum_E`` and ``squared_logsumexp_sum`` only. All tensors
    may have the same dimensions in front, one router each; every property then has them too.

    Attributes:
        tokens_per_expert_E: (E,) int64, assignments to each expert before any is dropped.
        probability_sum_E: (E,) fp32, router probability summed over tokens.
        squared_logsumexp_sum: () fp32, Σ logsumexp(router_logits)².
        entropy_sum: () fp32, Σ entropy of the router's distribution, nats.
        dropped: () int64, assignments over capacity.
        num_tokens: () int64.
        top_k: assignments per token.
    """

    tokens_per_expert_E: Tensor
    probability_sum_E: Tensor
    squared_logsumexp_sum: Tensor
    entropy_sum: Tensor
    dropped: Tensor
    num_tokens: Tensor
    top_k: int

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.tokens_per_expert_E.shape[-1]

    @property
    def fraction_E(self) -> Tensor:
        """(E,) fp32: fraction of all assignments that went to each expert, before dropping; sums to 1."""
        assigned = self.tokens_per_expert_E.sum(-1, keepdim=True)
        return self.tokens_per_expert_E.float() / assigned.clamp(min=1)

    @property
    def load_balance_loss(self) -> Tensor:
        """() fp32: E·Σ f_i·P_i (Switch Transformer eq. 4 without α): 1 at uniform routing."""
        mean_probability_E = self.probability_sum_E / self.num_tokens.clamp(min=1).unsqueeze(-1)
        return self.num_experts * (self.fraction_E * mean_probability_E).sum(-1)

    @property
    def z_loss(self) -> Tensor:
        """() fp32: mean logsumexp(router_logits)² (ST-MoE eq. 5)."""
        return self.squared_logsumexp_sum / self.num_tokens.clamp(min=1)

    @property
    def entropy(self) -> Tensor:
        """() fp32: mean entropy of the router's distribution, nats; log E if it knows nothing."""
        return self.entropy_sum / self.num_tokens.clamp(min=1)

    @property
    def dropped_fraction(self) -> Tensor:
        """() fp32: share of assignments that found their expert full."""
        return self.dropped.float() / (self.num_tokens.clamp(min=1) * self.top_k)

    @property
    def dead_experts(self) -> Tensor:
        """() int64: experts without a token."""
        return (self.tokens_per_expert_E == 0).sum(-1)

    @property
    def largest_load(self) -> Tensor:
        """() fp32: load of the fullest expert over the mean load; 1 is perfect balance, E is collapse."""
        return self.fraction_E.amax(-1) * self.num_experts

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return the same numbers on another device."""
        return replace(self, **_moved(self, device, non_blocking))

    def detach(self) -> Self:
        """Return the same numbers without their graph."""
        return replace(
            self,
            probability_sum_E=self.probability_sum_E.detach(),
            squared_logsumexp_sum=self.squared_logsumexp_sum.detach(),
        )

    def __add__(self, other: Self) -> Self:
        """Add two passes of the same router."""
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "top_k"
        }
        return replace(self, **sums)


class LayerOutput(NamedTuple):
    """A layer's result: y (B, L, D), the state after the last token (None if stateless), statistics of its routers."""

    y: Tensor
    state: LayerState | None
    router_stats: tuple[RouterStats, ...]


class KeepsFloat32(nn.Module):
    """A module some of whose parameters stay fp32 under ``.to(torch.bfloat16)`` and ``.half()``.

    Class attribute ``float32_parameters``: their dotted names. Decay near 1 and router probabilities lose what
    matters in 16 bits.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self.get_parameter(name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device)
        return self


class Layer(KeepsFloat32, ABC):
    """A sequence layer D → D, without norm and residual: those belong to the block.

    Class attributes:
        causal: no output depends on a later token; of a layer with a router the router says so.
        why_not_causal: the reason, where it does.
        batch_invariant: in ``eval()`` no output depends on the other rows of the batch.
        state_class: the type of its state; None if it remembers nothing.
    """

    causal: bool = True
    why_not_causal: str = "a layer looks ahead"
    batch_invariant: bool = True
    state_class: ClassVar[type[LayerState] | None] = None

    @abstractmethod
    def forward(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Map x (B, L, D) to y (B, L, D), continuing from ``state`` (None: from nothing)."""

    @abstractmethod
    def initialize(self, scheme: Initialization) -> None:
        """Fill the parameters in place."""

    def decode_(
        self, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
    ) -> Tensor:
        """Return x + layer(norm(x)) for one token per row, (B, D), and update the state's tensors in place.

        For inference only; what :meth:`forward` computes, and a layer may override it to take fewer launches on a GPU.
        The state must not grow.
        """
        return decode_by_forward_(self, x_BD, norm, sequence, state)

    def __call__(self, x_BLD: Tensor, sequence: SequenceInfo, state: LayerState | None = None) -> LayerOutput:
        """Call :meth:`forward` through the module's hooks."""
        output: LayerOutput = super().__call__(x_BLD, sequence, state)
        return output


def decode_by_forward_(
    layer: nn.Module, x_BD: Tensor, norm: nn.Module, sequence: SequenceInfo, state: LayerState | None
) -> Tensor:
    """Do what :meth:`Layer.decode_` does by calling ``layer``, which may be a wrapper around one."""
    y_B1D, new_state, _ = layer(norm(x_BD).unsqueeze(1), sequence, state)
    if state is not None:
        assert new_state is not None
        for name, tensor in new_state.tensors().items():
            state.tensors()[name].copy_(tensor)
    y_BD: Tensor = x_BD + y_B1D.squeeze(1)
    return y_BD


class LayerConfig(Config, ABC):
    """Configuration of a layer: everything but d_model, which passes down through :meth:`build`.

    The costs are computed from the configuration alone; tests hold them against the module that is built.
    """

    def check(self, d_model: int) -> None:
        """Raise ValueError if the layer cannot be built at this d_model; by default every d_model will do."""

    @abstractmethod
    def build(self, d_model: int) -> Layer:
        """Build the layer; its parameters are filled by :meth:`Layer.initialize` afterwards."""

    @abstractmethod
    def cost(self, d_model: int) -> LayerCost:
        """Return parameters, operations and memory of one layer."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        parameters: all parameters.
        active_parameters: parameters that one token meets (of the experts only those it visits; the whole router).
        flops_per_token: one token's forward pass, a multiply-add counted as 2, without what grows with length.
        flops_per_token_and_key: what each visible key adds to it (attention; otherwise 0).
        state_values: fp32 values in the state of one sequence, whatever its length.
        state_values_per_token: values that each token adds to it (key-value cache; otherwise 0).
        activation_values: values per token that training keeps for the backward pass.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    flops_per_token_and_key: int = 0
    state_values: int = 0
    state_values_per_token: int = 0
    activation_values: int = 0

    def __add__(self, other: Self) -> Self:
        """Add the costs of parts that are computed one beside or behind the other."""
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})
