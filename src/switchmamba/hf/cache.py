"""The native recurrent state as the cache of ``generate``.

A state cannot forget its last tokens. Assisted generation has to (it drops the drafted tokens that the model would not
have chosen), so a cache that records keeps the state from before the newest chunks, and those chunks: to crop is to go
back to that state and to let the model read again what stays.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from switchmamba.layers.interface import LayerState
from switchmamba.layers.mixers.attention import AttentionState
from switchmamba.models.state import ModelState

_Nothing = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)
"""What stands for a layer that remembers nothing; older transformers have no word for it."""


@dataclass(frozen=True)
class Chunk:
    """What the model read in one call: embedded tokens (B, L, D), document ids and padding (B, L) or None."""

    embedded: Tensor
    document_ids: Tensor | None
    padding: Tensor | None

    @property
    def length(self) -> int:
        """L."""
        return self.embedded.shape[1]

    def first(self, length: int) -> "Chunk":
        """Return the first ``length`` positions."""
        ids, padding = self.document_ids, self.padding
        return Chunk(
            self.embedded[:, :length],
            None if ids is None else ids[:, :length],
            None if padding is None else padding[:, :length],
        )

    def select(self, rows: Tensor) -> "Chunk":
        """Return the given rows."""
        ids, padding, rows = self.document_ids, self.padding, rows.to(self.embedded.device)
        return Chunk(
            self.embedded[rows],
            None if ids is None else ids[rows],
            None if padding is None else padding[rows],
        )


class SwitchMambaCache(Cache):
    """The state of a SwitchMamba model, empty at first: ``past_key_values=SwitchMambaCache()``.

    Attributes:
        state: the native state; None before anything was read.
        unread: chunks that belong to the past and that ``state`` has not seen, after :meth:`crop`.
    """

    def __init__(self, state: ModelState | None = None) -> None:
        # Not super().__init__(): the list of layers that it keeps is computed here.
        self.state = state
        self.unread: list[Chunk] = []
        self.offloading, self.layer_class_to_replicate = False, None
        self._length = 0 if state is None else int(state.position_B.max())
        self._recording = False
        self._before: ModelState | None = None  # of the recorded chunks
        self._recorded: list[Chunk] = []

    def advance(self, chunk: Chunk, before: ModelState | None, after: ModelState) -> None:
        """Take the state after ``chunk``, which the model read from the state ``before``."""
        self.state, self.unread = after, []
        self._length += chunk.length
        if self._recording:
            if not self._recorded:
                self._before = before
            self._recorded.append(chunk)

    def update(self, *_: Any, **__: Any) -> Any:
        """Refuse: nothing is stored layer by layer here."""
        raise TypeError("a SwitchMambaCache holds the state of a whole model, which only that model advances")

    update_conv_state = update_recurrent_state = update

    def caught_up(self, state: ModelState | None) -> None:
        """Take the state that has seen what was unread."""
        self.state, self.unread = state, []

    def activate_past_recording(self) -> None:
        """Keep from now on what :meth:`crop` needs, until it is called."""
        self._recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (0: only what was recorded).

        RuntimeError if they were not recorded.
        """
        if tokens_to_remove > 0:
            raise RuntimeError(
                f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}"
            )
        remove = -tokens_to_remove
        if remove > sum(chunk.length for chunk in self._recorded):
            raise RuntimeError(
                f"{remove} tokens to remove were not recorded, and a recurrent state cannot forget: call "
                "activate_past_recording() before they are read"
            )
        if remove:
            kept = list(self._recorded)
            self._length -= remove
            while remove:
                last = kept.pop()
                if last.length > remove:
                    kept.append(last.first(last.length - remove))
                remove = max(0, remove - last.length)
            self.state, self.unread = self._before, kept
        self._before, self._recorded = None, []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were read, padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return −1: no limit."""
        return -1

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return how many tokens were read."""
        return self._length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Tell whether anything was read."""
        return self._length > 0

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row ``beam_idx[i]`` has read, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; they may repeat."""
        self.state = None if self.state is None else self.state.select(indices)
        self._before = None if self._before is None else self._before.select(indices)
        self.unread = [chunk.select(indices) for chunk in self.unread]
        self._recorded = [chunk.select(indices) for chunk in self._recorded]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.position_B.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Number of rows; −1 before anything was read."""
        return -1 if self.state is None else len(self.state.position_B)

    @property
    def is_compileable(self) -> bool:
        """False: nothing is of a static address."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Tell whether anything was read."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Tell whether :meth:`crop` can go back."""
        return self._recording

    def is_recording_past(self, layer_idx: int) -> bool:
        """Tell whether :meth:`crop` can go back."""
        return self._recording

    @property
    def layers(self) -> list[CacheLayerMixin | LinearAttentionCacheLayerMixin]:
        """One object per layer with its tensors, to look at: to change them changes nothing."""
        return [] if self.state is None else [_as_cache_layer(layer) for layer in self.state.layers]

    def __deepcopy__(self, memo: dict[int, Any]) -> "SwitchMambaCache":
        """Return a cache that goes on by itself, for several continuations; a state is a value and may be shared."""
        twin = copy(self)
        twin.unread, twin._recorded = list(self.unread), list(self._recorded)
        return twin

    def __len__(self) -> int:
        """Return the number of layers, 0 before anything was read."""
        return 0 if self.state is None else len(self.state.layers)

    def __bool__(self) -> bool:
        """Return True: an empty cache is one, too."""
        return True

    def __repr__(self) -> str:
        """Say how much it is."""
        return f"SwitchMambaCache({self._length} tokens, {self.state})"


def _as_cache_layer(state: LayerState | None) -> CacheLayerMixin | LinearAttentionCacheLayerMixin:
    if state is None:
        return _Nothing()
    if isinstance(state, AttentionState):
        attention = DynamicLayer()
        attention.update(state.key_BHSP, state.value_BHSP)
        return attention
    conv_BWI, hidden = state.tensors().values()
    recurrent = LinearAttentionLayer()
    recurrent.lazy_initialization(conv_states=conv_BWI.transpose(1, 2), recurrent_states=hidden)
    recurrent.conv_states[0], recurrent.recurrent_states[0] = conv_BWI.transpose(1, 2), hidden
    recurrent.has_previous_state[0] = True
    return recurrent
