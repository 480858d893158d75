"""Tokenised documents, memory-mapped from a prepared directory.

Opening maps files and checks their sizes against the index; no token is read, so it takes the same few
milliseconds for a thousand tokens and for a trillion.
"""

import bisect
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from switchmamba.data.chat import CHAT_TEMPLATE
from switchmamba.data.index import TOKENIZER_FILE, Index, SplitRecord, read_index
from switchmamba.data.split import Split
from switchmamba.errors import DataError

Array = npt.NDArray[Any]

OFFSET_DTYPE = np.dtype("<i8")
MASK_DTYPE = np.dtype("u1")
_VERIFY_TOKENS = 2**22


class Documents(Protocol):
    """Documents as token ids, none of them empty.

    ``document_offsets`` (num_documents + 1,) int64: document i holds tokens ``offsets[i]`` to ``offsets[i +
    1]`` of them all; ``document(i)`` is its read-only array of unsigned ids, and ``mask(i)`` says which of them
    count as targets.
    """

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        ...

    @property
    def document_offsets(self) -> Array:
        """Where each document starts, and where the last one ends."""
        ...

    def document(self, index: int) -> Array:
        """Return the ids of one document."""
        ...

    def mask(self, index: int) -> Array | None:
        """Return 0 or 1, uint8, for each token of a document: does it count as a target; None: all do."""
        ...


class TokenShards:
    """One split of a prepared directory.

    Open it with :meth:`open`.

    Attributes:
        document_offsets: (num_documents + 1,) int64, memory-mapped.
        num_tokens: end-of-text tokens included, one a document.
        num_bytes: of text in UTF-8, end-of-text tokens not counted.
        num_targets: tokens that count as targets; fewer than ``num_tokens`` where there is a mask.
        masked: there is a mask.
    """

    def __init__(self, directory: Path, split: str, index: Index, record: SplitRecord) -> None:
        """Map the files of ``record``; :class:`DataError` names one that is missing or has the wrong size."""
        self.directory = directory
        self.split = split
        self.index = index
        self.num_tokens = record.tokens
        self.num_documents = record.documents
        self.num_bytes = record.text_bytes
        self.masked = record.targets is not None
        self.num_targets = record.tokens if record.targets is None else record.targets
        self.vocab_size = index.vocab_size
        self.end_of_text_id = index.end_of_text_id
        self.tokenizer_sha256 = index.tokenizer_sha256
        self.tokenizer_path = directory / TOKENIZER_FILE
        self._record = record
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self.document_offsets = _map(directory / record.offsets.file, OFFSET_DTYPE, record.documents + 1)
        self._shards = [_map(directory / shard.file, dtype, shard.tokens) for shard in record.shards]
        self._masks = [
            _map(directory / shard.mask.file, MASK_DTYPE, shard.tokens)
            for shard in record.shards
            if shard.mask is not None
        ]
        self._shard_starts = list(itertools.accumulate((shard.tokens for shard in record.shards), initial=0))
        first, last = int(self.document_offsets[0]), int(self.document_offsets[-1])
        if (first, last, self._shard_starts[-1]) != (0, record.tokens, record.tokens):
            raise DataError(f"{directory}: offsets and shards of {split} disagree; prepare the data again")

    @classmethod
    def open(cls, directory: Path | str, split: Split = "train") -> Self:
        """Open ``split`` of a directory that ``data prepare`` wrote, in time independent of its size."""
        directory = Path(directory)
        index = read_index(directory)
        record = index.splits.get(split)
        if record is None:
            raise DataError(
                f"{directory}: no split {split!r}, it holds {', '.join(index.splits)}; "
                "name one of those, or prepare the data again"
            )
        return cls(directory, split, index, record)

    @property
    def sha256(self) -> str:
        """Of the split's documents in their order and shards: of the hashes of its files, as the index has them."""
        record = self._record
        hashes = [record.offsets.sha256, *(shard.sha256 for shard in record.shards)]
        hashes += [shard.mask.sha256 for shard in record.shards if shard.mask is not None]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def chat_template(self) -> str | None:
        """Return the template that made the conversations, checked; None where the documents are none."""
        if self.index.chat_template_sha256 is None:
            return None
        path = self.directory / CHAT_TEMPLATE
        _verify_sha256(path, self.index.chat_template_sha256)
        return path.read_text(encoding="utf-8")

    def document(self, index: int) -> Array:
        """Return the ids of document ``index`` as a read-only view of the file, end of text included."""
        return self._part_of(self._shards, index)

    def mask(self, index: int) -> Array | None:
        """Return which tokens of document ``index`` count as targets, likewise; None: all do."""
        return self._part_of(self._masks, index) if self.masked else None

    def _part_of(self, files: list[Array], index: int) -> Array:
        start, stop = self.document_offsets[index : index + 2].tolist()
        shard = bisect.bisect_right(self._shard_starts, start) - 1
        base = self._shard_starts[shard]
        return files[shard][start - base : stop - base]

    def verify(self) -> None:
        """Read everything and check it against the index: sha256, ids below the vocabulary, documents closed, masks.

        Takes about a second per GB. Raises :class:`DataError` naming the file at fault.
        """
        offsets_path = self.directory / self._record.offsets.file
        _verify_sha256(self.tokenizer_path, self.tokenizer_sha256)
        if self.index.chat_template_sha256 is not None:
            _verify_sha256(self.directory / CHAT_TEMPLATE, self.index.chat_template_sha256)
        _verify_sha256(offsets_path, self._record.offsets.sha256)
        if not np.all(np.diff(self.document_offsets) > 0):
            raise DataError(f"{offsets_path}: offsets do not increase; prepare the data again")
        for start, shard, record in zip(self._shard_starts, self._shards, self._record.shards, strict=False):
            path = self.directory / record.file
            _verify_sha256(path, record.sha256)
            self._verify_ids(path, start, shard)
        self._verify_masks()

    def _verify_ids(self, path: Path, start: int, shard: Array) -> None:
        closings: list[Array] = []
        for begin in range(0, len(shard), _VERIFY_TOKENS):
            ids = shard[begin : begin + _VERIFY_TOKENS]
            if int(ids.max()) >= self.vocab_size:
                position = begin + int(np.argmax(ids >= self.vocab_size))
                raise DataError(
                    f"{path}: token {position} has id {ids[position - begin]}, "
                    f"the vocabulary ends at {self.vocab_size - 1}; prepare the data again"
                )
            closings.append(np.flatnonzero(ids == self.end_of_text_id) + start + begin + 1)
        ends = np.concatenate(closings)
        first, last = np.searchsorted(self.document_offsets, [start, start + len(shard)])
        expected = self.document_offsets[first + 1 : last + 1]
        if self.index.chat_template_sha256 is not None:  # there an end of text closes every answer too
            ends = ends[np.isin(ends, expected)]
        if not np.array_equal(ends, expected):
            raise DataError(
                f"{path}: end-of-text tokens do not stand where documents end; prepare the data again"
            )

    def _verify_masks(self) -> None:
        num_targets = 0
        for mask, shard in zip(self._masks, self._record.shards, strict=False):
            assert shard.mask is not None
            path = self.directory / shard.mask.file
            _verify_sha256(path, shard.mask.sha256)
            if int(mask.max()) > 1:
                raise DataError(f"{path}: holds {int(mask.max())}, a mask is 0 or 1; prepare the data again")
            num_targets += int(mask.sum(dtype=np.int64))
        if self.masked and num_targets != self.num_targets:
            raise DataError(
                f"{self.directory}: the masks of {self.split} count {num_targets} targets, the index says "
                f"{self.num_targets}; prepare the data again"
            )


def _map(path: Path, dtype: np.dtype[Any], length: int) -> Array:
    try:
        size = path.stat().st_size
        if size != length * dtype.itemsize:
            raise DataError(
                f"{path}: {size} bytes, the index says {length * dtype.itemsize}; prepare the data again"
            )
        # A plain view: slicing a memmap object costs microseconds more, and there are many slices to a batch.
        return np.memmap(path, dtype=dtype, mode="r", shape=(length,)).view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _verify_sha256(path: Path, expected: str) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if digest != expected:
        raise DataError(f"{path}: damaged, its sha256 does not match the index; prepare the data again")
