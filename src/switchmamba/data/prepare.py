"""Text to a directory of token shards: read, tokenise on all cores, write, publish by renaming.

The directory appears whole or not at all: it is written beside its destination under another name, and a
failure or an interruption removes it. Memory is bounded by one record and a batch of a few megabytes. The
same inputs, tokenizer and arguments give the same bytes.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from switchmamba.data.chat import CHAT_TEMPLATE, ChatTemplate, encode_conversations
from switchmamba.data.corpus import Corpus
from switchmamba.data.defaults import (
    MAX_RECORD_BYTES,
    SHARD_TOKENS,
    TOKENIZER_SAMPLE_BYTES,
    VALIDATION_FRACTION,
)
from switchmamba.data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    Index,
    SourceRecord,
    SplitBy,
    SplitRecord,
    encode_index,
    token_dtype,
)
from switchmamba.data.shard_writer import SplitWriter, new_directory, require_new, write_file
from switchmamba.data.split import SPLITS, Part, Split, all_to, by_content, by_last, by_tail
from switchmamba.data.tokenizer import MIN_VOCAB_SIZE, TokenIds, Tokenizer
from switchmamba.errors import ConfigError, DataError

logger = logging.getLogger("switchmamba")

_BATCH_BYTES = 2**21
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Progress:
    """How far :func:`prepare` has come.

    Attributes:
        stage: what it is doing.
        bytes_done: of ``bytes_total``: when training, of the sample; when tokenising, of the files on disk.
    """

    stage: Literal["training the tokenizer", "tokenising"]
    bytes_done: int
    bytes_total: int
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class PreparedSummary:
    """What :func:`prepare` wrote.

    Attributes:
        path: the directory.
        index: as in its index.json: counts by split, vocabulary, sources.
        skipped: how many records.
        first_skipped: why the first record was skipped.
        seconds: the whole of it, training the tokenizer included.
    """

    path: Path
    index: Index
    skipped: int
    first_skipped: str | None
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens in all splits."""
        return sum(split.tokens for split in self.index.splits.values())


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    *,
    field: str = "text",
    text_suffixes: Sequence[str] = (),
    chat_template: ChatTemplate | None = None,
    validation_fraction: float = VALIDATION_FRACTION,
    validation_inputs: Sequence[str | Path] = (),
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    max_record_bytes: int = MAX_RECORD_BYTES,
    tokenizer_sample_bytes: int = TOKENIZER_SAMPLE_BYTES,
    skip_bad: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PreparedSummary:
    """Tokenise documents and write them to ``out`` as shards with an index.

    A document is validation text when a hash of ``seed`` and its content falls below ``validation_fraction``:
    duplicates stay together, and adding files moves no document. When that leaves a split empty, the tail of
    the text is held out instead, cutting one document in two. ``validation_inputs`` are the validation split
    where they are given; without them a fraction of 0 means that there is none.

    Args:
        inputs: files, directories and globs, as in :class:`~switchmamba.data.corpus.Corpus`.
        tokenizer: a tokenizer, the path of a tokenizer.json, or ``"bpe:8000"`` to train one with 8,000
            entries.
        out: a directory that does not exist or is empty.
        field: of a .jsonl record.
        text_suffixes: read like .txt.
        chat_template: the records are conversations, of which only the assistant's tokens count as targets; the
            template is kept with the data. None is cut in two: where text would be, the last ones are held out.
        validation_fraction: 0 ≤ fraction < 1, of documents.
        validation_inputs: as ``inputs``.
        seed: of the split, ≥ 0.
        shard_tokens: a shard closes before it would exceed this; a longer document has a shard of its own.
        max_record_bytes: the largest .txt file or .jsonl line.
        tokenizer_sample_bytes: of text from which ``bpe:N`` learns, taken from every file in proportion to
            its size.
        skip_bad: skip and count what cannot be used instead of refusing it.
        progress: called after every batch.

    Raises:
        ConfigError: an argument is impossible, or ``out`` exists.
        DataError: an input or the tokenizer cannot be used.
        SwitchMambaError: writing failed, such as for lack of space.
    """
    started = time.monotonic()
    out = Path(out)
    _check_arguments(out, inputs, validation_fraction, seed)
    _check_sizes(
        shard_tokens=shard_tokens,
        max_record_bytes=max_record_bytes,
        tokenizer_sample_bytes=tokenizer_sample_bytes,
    )
    corpus, held_out = (
        Corpus(
            names,
            field=field,
            max_record_bytes=max_record_bytes,
            text_suffixes=text_suffixes,
            chat_template=chat_template,
        )
        for names in (inputs, validation_inputs)
    )
    _log_ignored(corpus.ignored + held_out.ignored)
    report = progress or _report_nothing
    ready = _tokenizer_or_vocab_size(tokenizer)
    with new_directory(out) as directory:
        if isinstance(ready, int):
            ready = Tokenizer.train(
                _sample(corpus, tokenizer_sample_bytes, _Skipped(skip_bad), report), ready
            )
        total = corpus.num_bytes + held_out.num_bytes
        write = partial(_write_splits, directory, ready, shard_tokens, total, report)
        skipped = _Skipped(skip_bad)
        documents = corpus.documents(skipped)
        split_by: SplitBy
        if held_out.files:
            split_by = "input"
            validation = held_out.documents(skipped, corpus.num_bytes)
            splits = write(itertools.chain(all_to("train", documents), all_to("validation", validation)))
        elif validation_fraction == 0:
            split_by = "none"
            splits = write(all_to("train", documents))
        else:
            split_by = "content"
            splits = write(by_content(documents, validation_fraction, seed))
        if split_by == "content" and len(splits) == 1:
            split_by = "tail"
            skipped = _Skipped(skip_bad)
            (whole,) = splits.values()
            _empty(directory)
            if chat_template is None:
                splits = write(by_tail(corpus.documents(skipped), validation_fraction, whole.text_bytes))
            else:
                splits = write(by_last(corpus.documents(skipped), validation_fraction, whole.documents))
        _check_splits(splits, split_by, skipped)
        index = Index(
            dtype=token_dtype(ready.vocab_size),
            vocab_size=ready.vocab_size,
            end_of_text_id=ready.end_of_text_id,
            tokenizer_sha256=ready.sha256,
            splits=splits,
            source=SourceRecord(
                inputs=tuple(map(str, inputs)),
                validation_inputs=tuple(map(str, validation_inputs)),
                field=field,
                text_suffixes=tuple(text_suffixes),
                max_record_bytes=max_record_bytes,
                validation_fraction=float(validation_fraction),
                seed=seed,
                split_by=split_by,
                skipped=skipped.count,
                chat_template_sha256=None if chat_template is None else chat_template.sha256,
            ),
        )
        if chat_template is not None:
            write_file(directory / CHAT_TEMPLATE, chat_template.source.encode())
        ready.save(directory / TOKENIZER_FILE)
        write_file(directory / INDEX_FILE, encode_index(index))
    return PreparedSummary(out, index, skipped.count, skipped.first, time.monotonic() - started)


class _Skipped:
    """Counts records that cannot be used, or raises the first of them."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self.count = 0
        self.first: str | None = None

    def __call__(self, error: DataError) -> None:
        if not self._allowed:
            raise DataError(f"{error}; --skip-bad skips such records")
        self.count += 1
        self.first = self.first or str(error)


def _check_arguments(out: Path, inputs: Sequence[str | Path], validation_fraction: float, seed: int) -> None:
    require_new(out)
    if not inputs:
        raise ConfigError("no --input; name files, directories or globs")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"--validation-fraction {validation_fraction} is outside 0 ≤ fraction < 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed} is outside 0 … 2^63-1")


def _log_ignored(ignored: Counter[str]) -> None:
    counts = [f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(ignored.items())]
    if counts:
        logger.info("ignored files: %s; --text-suffix reads more kinds", ", ".join(counts))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {size} is under 1")


def _tokenizer_or_vocab_size(tokenizer: Tokenizer | str | Path) -> Tokenizer | int:
    """Return a tokenizer that is ready, or 8000 for ``"bpe:8000"``."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not isinstance(tokenizer, str) or not tokenizer.startswith("bpe:"):
        if not Path(tokenizer).exists():
            raise DataError(
                f"{tokenizer}: cannot read the tokenizer: no such file; name a tokenizer.json, or bpe:8000 to train one"
            )
        return Tokenizer.from_file(tokenizer)
    number = tokenizer.removeprefix("bpe:")
    if not number.isdecimal() or int(number) < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--tokenizer {tokenizer}: a number of at least {MIN_VOCAB_SIZE} must follow bpe:, such as bpe:8000"
        )
    return int(number)


def _sample(
    corpus: Corpus, max_bytes: int, skipped: _Skipped, report: Callable[[Progress], None]
) -> Iterator[str]:
    """Yield the first texts of every file, in proportion to its size, some ``max_bytes`` in all."""
    sampled = 0
    for path, size in corpus.files.items():
        share = -(-max_bytes * size // corpus.num_bytes) if size else 1
        for document in corpus.file_documents(path, skipped):
            yield document.text[:share]
            sampled += min(document.num_bytes, share)
            share -= document.num_bytes
            report(Progress("training the tokenizer", min(sampled, max_bytes), max_bytes))
            if share <= 0:
                break


def _write_splits(
    directory: Path,
    tokenizer: Tokenizer,
    shard_tokens: int,
    bytes_total: int,
    report: Callable[[Progress], None],
    parts: Iterable[Part],
) -> dict[Split, SplitRecord]:
    """Tokenise ``parts`` and write the splits they belong to."""
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    writers: dict[Split, SplitWriter] = {}
    num_documents = num_tokens = 0
    with ExitStack() as files:
        for batch in _batches(parts):
            for part, (ids, counted) in zip(batch, _encode(batch, tokenizer), strict=True):
                if part.split not in writers:
                    writer = SplitWriter(
                        directory,
                        part.split,
                        dtype,
                        tokenizer.end_of_text_id,
                        shard_tokens,
                        masked=counted is not None,
                    )
                    writers[part.split] = files.enter_context(writer)
                writers[part.split].add(ids, part.num_bytes, counted)
                num_tokens += len(ids) + 1
            num_documents += len(batch)
            report(Progress("tokenising", batch[-1].bytes_read, bytes_total, num_documents, num_tokens))
        return {split: writers[split].finish() for split in SPLITS if split in writers}


def _encode(
    batch: Sequence[Part], tokenizer: Tokenizer
) -> Iterator[tuple[TokenIds, npt.NDArray[np.bool_] | None]]:
    """Yield each part's tokens without the end of text that closes it, and what counts, that end of text included."""
    conversations = [part.segments for part in batch if part.segments is not None]
    if not conversations:
        yield from ((ids, None) for ids in tokenizer.encode_batch([part.text for part in batch]))
        return
    for ids, counted in encode_conversations(tokenizer, conversations):
        if len(ids) and ids[-1] == tokenizer.end_of_text_id:  # an answer's, which closes the document too
            yield ids[:-1], counted
        else:
            yield ids, np.append(counted, False)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    num_bytes = 0
    for part in parts:
        batch.append(part)
        num_bytes += part.num_bytes
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def _check_splits(splits: dict[Split, SplitRecord], split_by: SplitBy, skipped: _Skipped) -> None:
    first = f"; the first: {skipped.first}" if skipped.first else ""
    if not splits:
        raise DataError(f"no document can be used, {skipped.count} records were skipped{first}")
    for split in SPLITS:
        if split not in splits and split_by != "none":
            raise DataError(
                f"no text is left for the {split} split, {skipped.count} records were skipped{first}; "
                "add text, or hold none out with --validation-fraction 0"
            )


def _report_nothing(_progress: Progress) -> None:
    """Stand in for a progress callback."""
