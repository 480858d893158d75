"""Samples by number: the n-th sample is a pure function of the data, the seed and n.

Nothing is consumed and nothing is remembered, so training resumes at any step by asking for the next number,
and any number of processes see one global order: step s of global batch G is samples s·G to (s+1)·G, however
they are shared out.

In each epoch the documents are shuffled and joined into one stream of tokens; windows of L+1 tokens with
stride L are cut from it, so that every token of the stream but the first is a target exactly once (the last,
partial window is dropped; the next epoch's shuffle puts other tokens there). Then the windows are shuffled
too: neighbours in the stream often belong to one long document, and a batch of them would be far from
independent samples.

Shuffles sort by a hash (splitmix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators") of seed, epoch and position. It is written out here because the order of a run must never change
with a library's release.

Suffixes: B batch, L context length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from switchmamba.data.shards import Documents
from switchmamba.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int64]

IGNORE_INDEX = -100
"""Target that no loss counts; torch's default."""

_DOCUMENTS, _WINDOWS = 0, 1  # what is shuffled: the two permutations of an epoch must differ
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Window(NamedTuple):
    """One sample.

    Attributes:
        tokens: (L+1,) int64; the first L are inputs, the last L targets.
        document_ids: (L+1,) int64, non-decreasing: the rank of each token's document in the epoch's order.
        mask: (L+1,) uint8, 1 where the token counts as a target; None: all do.
    """

    tokens: IntArray
    document_ids: IntArray
    mask: npt.NDArray[np.uint8] | None = None


class Cuts(NamedTuple):
    """Documents whose rest counts for nothing, because another window holds their beginning.

    Attributes:
        documents: all there are.
        cut: how many are cut in the first epoch; another one shuffles, and cuts others.
        always_cut: how many are longer than a window, and cut in every epoch.
        lost: share of all tokens that stands behind the cuts.
        longest: tokens of the longest document.
    """

    documents: int
    cut: int
    always_cut: int
    lost: float
    longest: int


@dataclass(frozen=True)
class Batch:
    """Samples side by side.

    Attributes:
        tokens_BL: (B, L) int64.
        targets_BL: (B, L) int64, the token after each; -100 where the data's mask leaves it out, and where it belongs
            to another document and state is reset.
        document_ids_BL: (B, L) int64 when state is reset at document boundaries, else None.
    """

    tokens_BL: Tensor
    targets_BL: Tensor
    document_ids_BL: Tensor | None

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int((self.targets_BL != IGNORE_INDEX).sum())


class Sampler:
    """Numbered windows over documents, epoch after epoch.

    Args:
        documents: a split, such as :class:`~switchmamba.data.shards.TokenShards`.
        context_length: L.
        seed: of both shuffles, 0 ≤ seed < 2^63.
        shuffle: False leaves documents and windows as they are, the same in every epoch.
        reset_state: True: batches carry document ids and mask targets that cross a boundary; False: neither.
        from_beginning: of documents with a mask, targets count only in the window that holds the document's beginning:
            no answer is learnt to a question that the window has cut off.
        name: what errors call the documents.

    Attributes:
        windows_per_epoch: how many whole windows the stream gives.

    Memory: 16 bytes per document and 8 per window for each of two cached epochs. Raises :class:`DataError`
    when the data is shorter than one window.
    """

    def __init__(
        self,
        documents: Documents,
        context_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        reset_state: bool,
        from_beginning: bool = False,
        name: str = "the split",
    ) -> None:
        if context_length < 1:
            raise ConfigError(f"context_length={context_length} is under 1")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed={seed} is outside 0 … 2^63-1")
        num_tokens = int(documents.document_offsets[-1])
        if num_tokens < context_length + 1:
            raise DataError(
                f"{name} has {num_tokens} tokens, one sample needs {context_length + 1}; "
                "add text or lower data.context_length"
            )
        self.context_length = context_length
        self.windows_per_epoch = (num_tokens - 1) // context_length
        self._documents = documents
        self._seed = seed
        self._shuffle = shuffle
        self._reset_state = reset_state
        self._from_beginning = from_beginning
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def position(self, n: int) -> tuple[int, int]:
        """Return the epoch of sample ``n`` and the number of its window in that epoch's stream."""
        if n < 0:
            raise ConfigError(f"sample {n} does not exist; samples count from 0")
        epoch, index = divmod(n, self.windows_per_epoch)
        return epoch, int(self._epoch(epoch if self._shuffle else 0).windows[index])

    def sample(self, n: int) -> Window:
        """Return sample ``n`` ≥ 0; samples never end."""
        epoch, window = self.position(n)
        stream = self._epoch(epoch if self._shuffle else 0).stream
        return stream.read(window * self.context_length, self.context_length + 1)

    def batch(self, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count`` as tensors."""
        return _batch([self.sample(n) for n in range(first, first + count)], self._reset_state)

    def cuts(self) -> Cuts | None:
        """Count the documents that windows of the first epoch cut in two; None where the rest counts all the same."""
        if not self._from_beginning:
            return None
        starts, length = self._epoch(0).stream.starts, self.context_length
        begin, last = starts[:-1], starts[1:] - 1
        behind = last - (begin // length + 1) * length  # the window that holds the beginning
        rest = behind.clip(min=0)
        size = last - begin + 1
        return Cuts(
            documents=len(size),
            cut=int((rest > 0).sum()),
            always_cut=int((size > length + 1).sum()),
            lost=float(rest.sum() / starts[-1]),
            longest=int(size.max()),
        )

    def _make_epoch(self, epoch: int) -> _Epoch:
        num_documents = len(self._documents.document_offsets) - 1
        if not self._shuffle:
            order, windows = np.arange(num_documents), np.arange(self.windows_per_epoch)
        else:
            order = permutation(num_documents, self._seed, epoch, _DOCUMENTS)
            windows = permutation(self.windows_per_epoch, self._seed, epoch, _WINDOWS)
        return _Epoch(_Stream(self._documents, order, self._from_beginning), windows)


def every_target_once(
    documents: Documents,
    context_length: int,
    batch_size: int,
    *,
    reset_state: bool,
    from_beginning: bool = False,
) -> Iterator[Batch]:
    """Iterate over a split in its own order so that every target is counted exactly once, for evaluation.

    Batches are (batch_size, context_length) but the last two: the one that finishes the whole windows may
    have fewer rows, and what remains after them is one shorter row. So nothing is padded, and nothing is
    dropped. Works on a split shorter than a window; one of a single token has no target and gives no batch.
    ``from_beginning`` is that of :class:`Sampler`.
    """
    num_documents = len(documents.document_offsets) - 1
    num_targets = int(documents.document_offsets[-1]) - 1
    stream = _Stream(documents, np.arange(num_documents), from_beginning)
    num_windows, rest = divmod(num_targets, context_length)
    for first in range(0, num_windows, batch_size):
        windows = range(first, min(first + batch_size, num_windows))
        yield _batch([stream.read(w * context_length, context_length + 1) for w in windows], reset_state)
    if rest:
        yield _batch([stream.read(num_windows * context_length, rest + 1)], reset_state)


def permutation(n: int, *key: int) -> IntArray:
    """Return a permutation of 0 … n-1 that depends on ``key`` alone, on every machine and forever."""
    # splitmix64 maps distinct numbers to distinct numbers: there are no ties for the sort to break.
    return np.argsort(random_bits(n, *key))


def random_bits(n: int, *key: int) -> npt.NDArray[np.uint64]:
    """Return n distinct random numbers of 64 bits that depend on ``key`` alone, on every machine and forever."""
    mixed = 0
    for part in key:
        mixed = _splitmix64(((mixed ^ part) + _GOLDEN) & _MASK)
    positions = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mixed)
    bits: npt.NDArray[np.uint64] = _splitmix64(positions)
    return bits


def _splitmix64(x: Any) -> Any:
    """Mix a Python integer below 2^64, or an array of uint64, whose arithmetic wraps by itself."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class _Stream:
    """Documents joined in an order."""

    def __init__(self, documents: Documents, order: IntArray, from_beginning: bool) -> None:
        self._documents = documents
        self._order = order
        self._from_beginning = from_beginning
        lengths = np.diff(documents.document_offsets)[order]
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    def read(self, start: int, count: int) -> Window:
        """Return ``count`` tokens from ``start``; an id beyond the vocabulary is a :class:`DataError`."""
        tokens = np.empty(count, np.int64)
        ids = np.empty(count, np.int64)
        counts: npt.NDArray[np.uint8] | None = None
        rank = int(self.starts.searchsorted(start, side="right")) - 1
        filled = 0
        while filled < count:
            skip = start + filled - int(self.starts[rank])
            number = int(self._order[rank])
            piece = self._documents.document(number)[skip : skip + count - filled]
            tokens[filled : filled + len(piece)] = piece
            ids[filled : filled + len(piece)] = rank
            mask = self._documents.mask(number)
            if mask is not None:
                counts = np.ones(count, np.uint8) if counts is None else counts
                cut_off = self._from_beginning and skip > 0
                counts[filled : filled + len(piece)] = 0 if cut_off else mask[skip : skip + len(piece)]
            filled += len(piece)
            rank += 1
        if tokens.max() >= self._documents.vocab_size:
            raise DataError(
                f"token id {tokens.max()} is outside the vocabulary of {self._documents.vocab_size}; "
                "the shards are damaged, prepare the data again"
            )
        return Window(tokens, ids, counts)


class _Epoch(NamedTuple):
    stream: _Stream
    windows: IntArray


def _batch(windows: list[Window], reset_state: bool) -> Batch:
    import torch

    tokens = np.stack([window.tokens for window in windows])
    ids = np.stack([window.document_ids for window in windows])
    inputs_BL, targets_BL = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    for targets_L, window in zip(targets_BL, windows, strict=True):
        if window.mask is not None:
            targets_L[window.mask[1:] == 0] = IGNORE_INDEX
    if not reset_state:
        return Batch(torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL), None)
    targets_BL[ids[:, 1:] != ids[:, :-1]] = IGNORE_INDEX
    return Batch(
        torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL), torch.from_numpy(ids[:, :-1].copy())
    )
