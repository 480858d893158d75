"""Loss, perplexity, bits per byte and next-token accuracy on held-out documents.

Every document is predicted from its own past alone: its first token from the end-of-text token. The end of text
that closes it is a target too, one per document, so that a document of n tokens gives n + 1 targets.

    loss          = −Σ log p(target | its document so far) / targets      nats
    perplexity    = exp(loss)
    bits per byte = −Σ log₂ p(target | …) / UTF-8 bytes of the text       the end of text stands for no byte

Where a directory was prepared with a mask, only the tokens that it counts are targets. A run of them within a document
is an answer; it is right if every token of it is the most probable one. A document whose first token does not count is
read as it stands, with no end of text before it, as a prompt is when text is generated.

Attention that was trained on windows of some length knows no places beyond it. With ``context_length`` every document
is read in pieces of so many tokens, each from an empty state and the token before it: the same conditions for all.

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
from switchmamba.evaluation.documents import TokenisedDocument, open_documents
from switchmamba.generation.generate import refuse_unsuitable
from switchmamba.models.language_model import LanguageModel

IGNORED = -100
"""Target of a column that fills a row up, or that the mask leaves out."""

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
        tokens: number of targets, the end of text of each document included unless a mask leaves it out.
        bytes: of text in UTF-8 that the targets stand for.
        documents: how many; ``max_tokens`` may have cut the last one.
        answers: with a mask, how many answers.
        answer_accuracy: with a mask, share of answers that were right as a whole.
        context_length: most tokens that a target was predicted from; None: its document's whole past.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    bytes: int
    documents: int
    answers: int | None = None
    answer_accuracy: float | None = None
    context_length: int | None = None


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str | Path,
    *,
    split: Split = "validation",
    field: str = "text",
    max_tokens: int | None = None,
    context_length: int | None = None,
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
        max_tokens: stop after this many tokens, in the middle of a document if need be.
        context_length: read longer documents in pieces of so many tokens; None: whole.
        batch_size: rows computed at once. Like ``chunk_size``, the columns computed at once, it changes time
            and memory, not the result.
        allow_non_causal: accept a model that sees the targets; its loss then means little.
        allow_batch_dependence: accept a model whose rows change each other; the result then depends on the batch.
        progress: called with the number of tokens done, and of all tokens if that is known.

    Raises:
        ConfigError: an argument out of range, or a model that should not be evaluated.
        DataError: no document, one that cannot be read, or a directory prepared with another tokenizer; no target
            counts, or none that stands for text.
        NonFiniteError: the loss is no number.
    """
    refuse_unsuitable(model, tokenizer, allow_non_causal, allow_batch_dependence)
    limits = {"max_tokens": max_tokens, "context_length": context_length}
    for name, value in (limits | {"batch_size": batch_size, "chunk_size": chunk_size}).items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    documents = open_documents(source, split, field)
    known = [number for number in (documents.num_tokens, max_tokens) if number is not None]
    expected = min(known) if documents.num_tokens is not None else None
    bytes_per_token_V = _bytes_per_token(tokenizer)
    loss_sum, correct, targets, num_bytes, num_documents, done = 0.0, 0, 0, 0, 0, 0
    answers, right_answers = 0, 0
    for group in _groups(_cut(documents.tokenised(tokenizer), max_tokens), batch_size, chunk_size):
        rows = [_row(row, tokenizer.end_of_text_id, context_length) for row in group]
        rows = [row for row in rows if len(row.targets_N)]
        # First tokens that do not count are read, but are no targets.
        done += sum(len(d.ids) for row in group for d in row) - sum(len(row.targets_N) for row in rows)
        num_documents += sum(map(len, group))
        num_bytes += sum(
            int(bytes_per_token_V[row.targets_N[row.targets_N != IGNORED]].sum()) for row in rows
        )
        for score in _score_rows(model, rows, chunk_size):
            loss_sum += score.loss_sum
            correct += score.correct
            targets += score.targets
            done += score.tokens
            if progress is not None:
                progress(done, expected)
        for row in rows if documents.masked else ():
            asked, right = _count_answers(row)
            answers, right_answers = answers + asked, right_answers + right
    if not num_documents:
        raise DataError(f"{source}: no document to evaluate on")
    if not num_bytes:
        raise DataError(
            f"{source}: the mask counts no target that stands for text in {done} tokens; raise max_tokens, or prepare "
            "the data again"
        )
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
        answers=answers if documents.masked else None,
        answer_accuracy=right_answers / answers if documents.masked else None,
        context_length=context_length,
    )


def _bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of text that each token stands for: a byte-level BPE's tokens spell the text, byte for byte."""
    counts_V = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    counts_V[tokenizer.end_of_text_id] = 0
    return counts_V


# Arranging documents in rows


class _Row(NamedTuple):
    """Documents one after another: inputs, targets, the document and the piece of one that each column belongs to.

    Both are counted over the row. ``right_N`` is filled in.
    """

    tokens_N: IntArray
    targets_N: IntArray
    document_ids_N: IntArray
    piece_ids_N: IntArray
    right_N: npt.NDArray[np.bool_]


def _row(
    documents: Sequence[TokenisedDocument], end_of_text_id: int, context_length: int | None = None
) -> _Row:
    tokens: list[IntArray] = []
    targets: list[IntArray] = []
    for ids, mask in documents:
        inputs = np.concatenate([[end_of_text_id], ids[:-1]]).astype(np.int32)
        outputs = ids.astype(np.int32)
        if mask is not None:
            outputs[mask == 0] = IGNORED
        first = 0 if outputs[0] != IGNORED else 1
        tokens.append(inputs[first:])
        targets.append(outputs[first:])
    lengths = [len(part) for part in targets]
    document_ids_N = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    piece_ids_N = document_ids_N
    if context_length is not None:
        begins_N = np.concatenate([np.arange(length) % context_length == 0 for length in lengths])
        piece_ids_N = begins_N.cumsum(dtype=np.int32) - 1
    return _Row(
        np.concatenate(tokens),
        np.concatenate(targets),
        document_ids_N,
        piece_ids_N,
        np.zeros(len(document_ids_N), np.bool_),
    )


def _count_answers(row: _Row) -> tuple[int, int]:
    """Return how many runs of counted targets there are within documents, and how many are right as a whole."""
    counted_N = row.targets_N != IGNORED
    goes_on_N = np.zeros_like(counted_N)
    goes_on_N[1:] = counted_N[:-1] & (row.document_ids_N[1:] == row.document_ids_N[:-1])
    starts_N = counted_N & ~goes_on_N
    wrong_answers = np.unique(np.cumsum(starts_N)[counted_N & ~row.right_N])
    return int(starts_N.sum()), int(starts_N.sum()) - len(wrong_answers)


def _cut(documents: Iterable[TokenisedDocument], max_tokens: int | None) -> Iterator[TokenisedDocument]:
    """Pass on the first ``max_tokens`` tokens."""
    left = max_tokens
    for ids, mask in documents:
        yield TokenisedDocument(ids[:left], None if mask is None else mask[:left])
        if left is not None:
            left -= len(ids)
            if left <= 0:
                return


def _groups(
    documents: Iterable[TokenisedDocument], batch_size: int, chunk_size: int
) -> Iterator[list[list[TokenisedDocument]]]:
    """Arrange documents in groups of up to ``batch_size`` rows.

    A row holds documents that fit into a chunk together (each goes to the first row with room), or one longer
    document. The two kinds are in groups of their own: only long rows need a state.
    """
    short: list[list[TokenisedDocument]] = []
    long: list[list[TokenisedDocument]] = []

    def has_room(row: list[TokenisedDocument], document: TokenisedDocument) -> bool:
        return sum(len(other.ids) for other in row) + len(document.ids) <= chunk_size

    for document in documents:
        if len(document.ids) > chunk_size:
            long.append([document])
            if len(long) == batch_size:
                yield long
                long = []
            continue
        room = next((row for row in short if has_room(row, document)), None)
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
    """Sums over the targets of one chunk: −log p in nats, right predictions, targets; and tokens, counted or not."""

    loss_sum: float
    correct: int
    targets: int
    tokens: int


@torch.inference_mode()
def _score_rows(model: LanguageModel, rows: Sequence[_Row], chunk_size: int) -> Iterator[_Score]:
    """Score all columns of ``rows``, one chunk of them at a time, and fill in ``right_N``.

    A row leaves when it has ended.
    """
    device = model.device
    state = None
    start = 0
    while rows:
        width = min(chunk_size, max(len(row.targets_N) for row in rows) - start)
        tokens_BL, targets_BL, document_ids_BL = (
            torch.from_numpy(columns_BL).to(device) for columns_BL in _columns(rows, start, width)
        )
        hidden_BLD, state, _ = model.hidden_states(tokens_BL, document_ids_BL, state, allow_non_causal=True)
        counted_BL = targets_BL != IGNORED
        loss_T, right_T = score_tokens(model, hidden_BLD[counted_BL], targets_BL[counted_BL])
        right_BL = torch.zeros_like(counted_BL).masked_scatter_(counted_BL, right_T).cpu().numpy()
        parts = [row.right_N[start : start + width] for row in rows]
        for part, right_L in zip(parts, right_BL, strict=True):
            part[:] = right_L[: len(part)]
        yield _Score(
            loss_T.double().sum().item(), int(right_BL.sum()), len(loss_T), sum(len(part) for part in parts)
        )
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
        document_ids_BL[i, :count] = row.piece_ids_N[part]
        document_ids_BL[i, count:] = row.piece_ids_N[-1] + 1
    return tokens_BL, targets_BL, document_ids_BL


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
