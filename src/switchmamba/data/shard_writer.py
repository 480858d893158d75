"""Writing token shards: hashed while they are written, on the disk before their names become visible."""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from switchmamba.data.index import MaskRecord, OffsetsRecord, ShardRecord, SplitRecord
from switchmamba.data.shards import MASK_DTYPE, OFFSET_DTYPE
from switchmamba.data.split import Split
from switchmamba.data.tokenizer import TokenIds
from switchmamba.errors import ConfigError, SwitchMambaError

logger = logging.getLogger("switchmamba")

_BUFFER_BYTES = 2**20


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a new directory that becomes ``out`` when the block ends well, and vanishes when it does not.

    ``out`` must not exist or be empty. What a killed process left of an earlier attempt is removed first. The
    block's own OSErrors are taken for failures to write and become a :class:`SwitchMambaError`.
    """
    destination = out.resolve()
    ancestor = next(parent for parent in destination.parents if parent.exists())
    partial = ancestor / f"{destination.name}.tmp-{secrets.token_hex(4)}"
    try:
        _remove_abandoned(ancestor, destination.name)
        partial.mkdir()
        with _locked(partial):
            yield partial
            _sync_directory(partial)
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(destination)
            _sync_directory(destination.parent)
    except OSError as error:
        raise SwitchMambaError(
            f"{out}: cannot be written: {error.strerror}; nothing was left behind; "
            "free space or name another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_new(out: Path) -> None:
    """Refuse an ``out`` that holds something, before anything is read; ConfigError names it."""
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ConfigError(f"--out {out} exists; name a directory that does not, or an empty one")


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove unfinished directories of ``name`` whose writer is gone: nobody holds their lock."""
    for path in parent.iterdir():
        if re.fullmatch(rf"{re.escape(name)}\.tmp-[0-9a-f]{{8}}", path.name) and path.is_dir():
            with _locked(path) as is_ours:
                if is_ours:
                    logger.warning("removing %s, left by an interrupted run", path)
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a lock on ``directory``, which the system drops when the process dies; yield whether it was to be had.

    A file system without locks grants none, so nothing there counts as abandoned.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SplitWriter:
    """Writes the documents of one split; a context manager, so that a failure closes its files.

    Args:
        directory: where the files go.
        split: their first name.
        dtype: of the token ids.
        end_of_text_id: appended to every document.
        shard_tokens: a shard closes before it would exceed this; a longer document has a shard of its own.
        masked: every document comes with a mask.
    """

    def __init__(
        self,
        directory: Path,
        split: Split,
        dtype: np.dtype[Any],
        end_of_text_id: int,
        shard_tokens: int,
        *,
        masked: bool = False,
    ) -> None:
        self._directory = directory
        self._split = split
        self._dtype = dtype.newbyteorder("<")
        self._end_of_text = np.array([end_of_text_id], self._dtype)
        self._shard_tokens = shard_tokens
        self._masked = masked
        self._targets = 0
        self._shards: list[ShardRecord] = []
        self._shard: _Shard | None = None
        self._tokens = 0
        self._offsets = _HashedFile(directory / f"{split}.offsets")
        self._offsets.write(np.zeros(1, OFFSET_DTYPE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._offsets.close()
        if self._shard is not None:
            self._shard.close()

    def add(self, ids: TokenIds, num_bytes: int, counted: npt.NDArray[np.bool_] | None = None) -> None:
        """Append a document.

        Args:
            ids: its tokens without the end of text.
            num_bytes: how many bytes of text they stand for.
            counted: which of them count as targets, and at last whether the end of text does; only if ``masked``.
        """
        assert self._masked == (counted is not None) and (counted is None or len(counted) == len(ids) + 1)
        tokens = np.concatenate([ids.astype(self._dtype), self._end_of_text])
        if self._shard is not None and self._shard.tokens + len(tokens) > self._shard_tokens:
            self._finish_shard(self._shard)
        if self._shard is None:
            stem = self._directory / f"{self._split}-{len(self._shards):05d}"
            self._shard = _Shard(stem, self._masked)
        self._shard.add(tokens, num_bytes, counted)
        self._tokens += len(tokens)
        self._targets += len(tokens) if counted is None else int(counted.sum())
        self._offsets.write(np.array([self._tokens], OFFSET_DTYPE))

    def finish(self) -> SplitRecord:
        """Bring everything to the disk and return its record; at least one document must have been added."""
        assert self._shard is not None
        self._finish_shard(self._shard)
        offsets = OffsetsRecord(file=self._offsets.path.name, sha256=self._offsets.finish())
        return SplitRecord(
            tokens=self._tokens,
            documents=sum(shard.documents for shard in self._shards),
            text_bytes=sum(shard.text_bytes for shard in self._shards),
            offsets=offsets,
            shards=tuple(self._shards),
            targets=self._targets if self._masked else None,
        )

    def _finish_shard(self, shard: "_Shard") -> None:
        self._shards.append(shard.finish())
        self._shard = None


class _Shard:
    """A shard that is being written."""

    def __init__(self, stem: Path, masked: bool) -> None:
        self._file = _HashedFile(stem.with_suffix(".tokens"))
        self._mask = _HashedFile(stem.with_suffix(".mask")) if masked else None
        self.tokens = self.documents = self.text_bytes = 0

    def add(self, tokens: npt.NDArray[Any], num_bytes: int, counted: npt.NDArray[np.bool_] | None) -> None:
        self._file.write(tokens)
        if self._mask is not None and counted is not None:
            self._mask.write(counted.astype(MASK_DTYPE))
        self.tokens += len(tokens)
        self.documents += 1
        self.text_bytes += num_bytes

    def finish(self) -> ShardRecord:
        mask = self._mask
        return ShardRecord(
            file=self._file.path.name,
            sha256=self._file.finish(),
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            mask=None if mask is None else MaskRecord(file=mask.path.name, sha256=mask.finish()),
        )

    def close(self) -> None:
        self._file.close()
        if self._mask is not None:
            self._mask.close()


class _HashedFile:
    """A file whose sha256 grows with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb", buffering=_BUFFER_BYTES)

    def write(self, array: npt.NDArray[Any]) -> None:
        content = array.tobytes()
        self._sha256.update(content)
        self._file.write(content)

    def finish(self) -> str:
        """Wait until all is on the disk, close, and return the sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Close after a failure: what is buffered is not wanted, and flushing it may fail again."""
        with suppress(OSError):
            self._file.close()
