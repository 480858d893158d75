"""What a model remembers between chunks of text: an immutable value that can be selected, stacked, moved and saved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from switchmamba.layers.interface import LayerState


@dataclass(frozen=True, repr=False)
class ModelState:
    """State of B sequences.

    Attributes:
        layers: one state per layer in order, None for those that remember nothing.
        position_B: (B,) int64, tokens seen.
        document_id_B: (B,) int64, document of the last token seen, so that a boundary between two chunks is noticed.
    """

    layers: tuple[LayerState | None, ...]
    position_B: Tensor
    document_id_B: Tensor

    def select(self, rows: Tensor) -> "ModelState":
        """Return the state of the given rows: an int64 index (rows may repeat) or a bool mask over the batch."""
        rows = rows.to(self.position_B.device)
        return ModelState(
            tuple(layer and layer.select(rows) for layer in self.layers),
            self.position_B[rows],
            self.document_id_B[rows],
        )

    @staticmethod
    def stack(states: Sequence["ModelState"]) -> "ModelState":
        """Join states along the batch. A key-value cache can join only caches of its own length."""
        columns = zip(*(state.layers for state in states), strict=True)
        return ModelState(
            tuple(
                type(column[0]).stack(list(column)) if column[0] is not None else None for column in columns
            ),
            torch.cat([state.position_B for state in states]),
            torch.cat([state.document_id_B for state in states]),
        )

    def reset(self, rows_B: Tensor) -> "ModelState":
        """Return the state with the layers' rows where ``rows_B`` (B,) bool is True as if they had seen nothing.

        Positions go on: they count the tokens of a row, not those of its document.
        """
        return replace(self, layers=tuple(layer and layer.reset(rows_B) for layer in self.layers))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name: ``position_B``, ``document_id_B`` and ``layers.<i>.<field>``."""
        named = {"position_B": self.position_B, "document_id_B": self.document_id_B}
        for i, layer in enumerate(self.layers):
            if layer is not None:
                named |= {f"layers.{i}.{field}": tensor for field, tensor in layer.tensors().items()}
        return named

    @staticmethod
    def from_tensors(
        tensors: dict[str, Tensor], state_classes: Sequence[type[LayerState] | None]
    ) -> "ModelState":
        """Rebuild a state from :meth:`tensors`; ``state_classes`` are the layers' in order. KeyError if one lacks."""
        layers: list[LayerState | None] = []
        for i, state_class in enumerate(state_classes):
            prefix = f"layers.{i}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if (state_class is None) == bool(own):
                raise KeyError(prefix.rstrip("."))
            layers.append(state_class(**own) if state_class is not None else None)
        return ModelState(tuple(layers), tensors["position_B"], tensors["document_id_B"])

    def to(self, device: torch.device | str) -> "ModelState":
        """Return the state on another device."""
        classes = [None if layer is None else type(layer) for layer in self.layers]
        return ModelState.from_tensors(
            {name: tensor.to(device) for name, tensor in self.tensors().items()}, classes
        )

    def __repr__(self) -> str:
        """Say how much it is, instead of all the numbers in it."""
        rows, layers = len(self.position_B), len(self.layers)
        return f"ModelState({rows} rows, {layers} layers, {self.num_bytes:,} bytes, {self.position_B.device})"

    @property
    def num_bytes(self) -> int:
        """Memory of the state, all rows together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
