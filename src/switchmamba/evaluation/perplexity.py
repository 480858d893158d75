"""Loss, perplexity, bits per byte and next-token accuracy on held-out documents.

Every document is predicted from its own past alone: its first token from the end-of-text token. The end of text
that closes it is a target too, one per document, so that a document of n tokens gives n + 1 targets.

    loss          = −Σ log p(target | its document so far) / targets      nats
    perplexity    = exp(loss)
    bits per byte = −Σ log₂ p(target | …) / UTF-8 bytes of the text       the end of text stands for no byte

Short documents share rows; a document longer than a chunk is computed chunk by chunk, its state passed on. Neither
changes the result, and what is computed at once depends on the chunk, not on the length of a document.

Suffixes: B rows, L length, N tokens of one row, T targets of a chunk, D d_model, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from switchmamba.data.split import Split
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError, DataError, NonFiniteError
from switchmamba.evaluation.documents import TokenIds, open_documents
from switchmamba.generation.generate import refuse_unsuitable
from switchmamba.models.language_model import LanguageModel

IGNORED = -100
"""Target of a column that fills a row up."""

IntArray = npt.NDArray[np.signedinteger[Any]]

LOGITS_AT_ONCE = 2**24
"""Logits that live at once, whatever the vocabulary: 64 MB in fp32."""

_LARGEST_LOSS = math.log(sys.float_info.max)  # beyond it exp(loss), the perplexity, is no number


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        loss: mean over all targets, nats.
        perplexity: exp(loss).
        bits_per_byte: does not depend on the tokenizer, so models with different ones can be compared.
        accuracy: share of targets that were the most probable token.
        tokens: number of targets, the end of text of each document included.
        bytes: of text in UTF-8 that the targets stand for.
        documents: how many; ``max_tokens`` may have cut the last one.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    bytes: int
    documents: int


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str | Path,
    *,
    split: Split = "validation",
    field: str = "text",
    max_tokens: int | None = None,
    batch_size: int = 8,
    chunk_size: int = 1024,
    allow_non_causal: bool = False,
    allow_batch_dependence: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Evaluation:
    """Evaluate ``model`` on the documents of ``source``.

    Args:
        model: in ``eval()`` mode, so that no expert drops a token.
        tokenizer: the model's own.
        source: a prepared directory, of which ``split`` is taken; or a text file, a directory or a glob, where
            ``field`` names the text in .jsonl records.
        max_tokens: stop after this many targets, in the middle of a document if need be.
        batch_size: rows computed at once. Like ``chunk_size``, the columns computed at once, it changes time
            and memory, not the result.
        allow_non_causal: accept a model that sees the targets; its loss then means little.
        allow_batch_dependence: accept a model whose rows change each other; the result then depends on the batch.
        progress: called with the number of targets done, and of all targets if that is known.

    Raises:
        ConfigError: an argument out of range, or a model that should not be evaluated.
        DataError: no document, one that cannot be read, or a directory prepared with another tokenizer.
        NonFiniteError: the loss is no number.
    """
    refuse_unsuitable(model, tokenizer, allow_non_causal, allow_batch_dependence)
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    documents = open_documents(source, split, field)
    limits = [limit for limit in (documents.num_tokens, max_tokens) if limit is not None]
    expected = min(limits) if documents.num_tokens is not None else None
    bytes_per_token_V = _bytes_per_token(tokenizer)
    loss_sum, correct, targets, num_bytes, num_documents = 0.0, 0, 0, 0, 0
    for group in _groups(_cut(documents.token_ids(tokenizer), max_tokens), batch_size, chunk_size):
        rows = [_row(row, tokenizer.end_of_text_id) for row in group]
        num_documents += sum(map(len, group))
        num_bytes += sum(int(bytes_per_token_V[row.targets_N].sum()) for row in rows)
        for score in _score_rows(model, rows, chunk_size):
            loss_sum += score.loss_sum
            correct += score.correct
            targets += score.targets
            if progress is not None:
                progress(targets, expected)
    if not targets:
        raise DataError(f"{source}: no document to evaluate on")
    loss = loss_sum / targets
    if not loss < _LARGEST_LOSS:  # NaN too
        raise NonFiniteError(f"the loss is {loss}: the weights are damaged or overflow in their dtype")
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=loss_sum / math.log(2) / num_bytes,
        accuracy=correct / targets,
        tokens=targets,
        bytes=num_bytes,
        documents=num_documents,
    )


def _bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of text that each token stands for: a byte-level BPE's tokens spell the text, byte for byte."""
    counts_V = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    counts_V[tokenizer.end_of_text_id] = 0
    return counts_V


# Arranging documents in rows


class _Row(NamedTuple):
    """Documents one after another: inputs, targets, and which document each column belongs to."""

    tokens_N: IntArray
    targets_N: IntArray
    document_ids_N: IntArray


def _row(documents: Sequence[TokenIds], end_of_text_id: int) -> _Row:
    lengths = [len(document) for document in documents]
    targets_N = np.concatenate(documents).astype(np.int32)
    tokens_N = np.roll(targets_N, 1)
    tokens_N[np.cumsum([0, *lengths[:-1]])] = end_of_text_id
    return _Row(tokens_N, targets_N, np.repeat(np.arange(len(documents), dtype=np.int32), lengths))


def _cut(documents: Iterable[TokenIds], max_tokens: int | None) -> Iterator[TokenIds]:
    """Pass on the first ``max_tokens`` tokens."""
    left = max_tokens
    for document in documents:
        yield document[:left]
        if left is not None:
            left -= len(document)
            if left <= 0:
                return


def _groups(
    documents: Iterable[TokenIds], batch_size: int, chunk_size: int
) -> Iterator[list[list[TokenIds]]]:
    """Arrange documents in groups of up to ``batch_size`` rows.

    A row holds documents that fit into a chunk together (each goes to the first row with room), or one longer
    document. The two kinds are in groups of their own: only long rows need a state.
    """
    short: list[list[TokenIds]] = []
    long: list[list[TokenIds]] = []
    for document in documents:
        if len(document) > chunk_size:
            long.append([document])
            if len(long) == batch_size:
                yield long
                long = []
            continue
        room = next((row for row in short if sum(map(len, row)) + len(document) <= chunk_size), None)
        if room is not None:
            room.append(document)
            continue
        if len(short) == batch_size:
            yield short
            short = []
        short.append([document])
    yield from (group for group in (short, long) if group)


# Scoring


class _Score(NamedTuple):
    """Sums over the targets of one chunk: −log p in nats, right predictions, targets."""

    loss_sum: float
    correct: int
    targets: int


@torch.inference_mode()
def _score_rows(model: LanguageModel, rows: Sequence[_Row], chunk_size: int) -> Iterator[_Score]:
    """Score all columns of ``rows``, one chunk of them at a time; a row leaves when it has ended."""
    device = model.head_weight.device
    state = None
    start = 0
    while rows:
        width = min(chunk_size, max(len(row.targets_N) for row in rows) - start)
        tokens_BL, targets_BL, document_ids_BL = (
            torch.from_numpy(columns_BL).to(device) for columns_BL in _columns(rows, start, width)
        )
        hidden_BLD, state, _ = model.hidden_states(tokens_BL, document_ids_BL, state, allow_non_causal=True)
        yield _score(model, hidden_BLD, targets_BL)
        start += width
        going_on = [i for i, row in enumerate(rows) if len(row.targets_N) > start]
        rows = [rows[i] for i in going_on]
        state = state.select(torch.tensor(going_on, dtype=torch.int64, device=device))


def _columns(rows: Sequence[_Row], start: int, width: int) -> tuple[IntArray, IntArray, IntArray]:
    """Cut columns out of every row, int64; where a row has ended, another document with ignored targets begins."""
    tokens_BL = np.zeros((len(rows), width), dtype=np.int64)
    targets_BL = np.full_like(tokens_BL, IGNORED)
    document_ids_BL = np.empty_like(tokens_BL)
    for i, row in enumerate(rows):
        part = slice(start, start + width)
        count = len(row.targets_N[part])
        tokens_BL[i, :count] = row.tokens_N[part]
        targets_BL[i, :count] = row.targets_N[part]
        document_ids_BL[i, :count] = row.document_ids_N[part]
        document_ids_BL[i, count:] = row.document_ids_N[-1] + 1
    return tokens_BL, targets_BL, document_ids_BL


def _score(model: LanguageModel, hidden_BLD: Tensor, targets_BL: Tensor) -> _Score:
    counted_BL = targets_BL != IGNORED
    loss_T, correct_T = score_tokens(model, hidden_BLD[counted_BL], targets_BL[counted_BL])
    return _Score(loss_T.double().sum().item(), int(correct_T.sum()), len(loss_T))


def score_tokens(model: LanguageModel, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return −log p of each target in nats, (T,) fp32 or wider, and whether it was the most probable token, (T,) bool.

    The logits of ``LOGITS_AT_ONCE // V`` targets live at once.
    """
    slice_size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses, right = [], []
    for hidden, targets in zip(
        torch.split(hidden_TD, slice_size), torch.split(targets_T, slice_size), strict=True
    ):
        logits = model.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.argmax(dim=-1) == targets)
    return torch.cat(losses), torch.cat(right)
