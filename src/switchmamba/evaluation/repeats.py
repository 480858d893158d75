"""How well a model copies from its context: loss and accuracy on real text that comes a second time.

Planted repeats. From held-out documents text [A][S][G] is taken as it stands, and S is written once more behind it:

    [A: prefix tokens] [S: span tokens] [G: gap tokens] [S: span tokens]

Nothing but the first S makes the second one predictable there. The same tokens are counted at both places, without the
first ``skip`` of each: nobody can know that a repeat begins, nor, after a token or two, always which. The first place
is the control. Every gap uses the same spans, so gaps differ by the distance alone.

Natural repeats. Of every token t_i of a window of held-out text, the longest n-gram t_{i−n+1} … t_i that occurred in
the window before (it may overlap): n = 0 is a token that is new there, n ≥ 8 one that a copier of the last seven would
have got right. A token's class says that copying was right, not only that it was possible, so the classes compare
models, not text with text. Compare Arora et al. 2023 (arXiv 2312.04927), who look at bigrams.

Windows begin with a token of text: a model that was trained with its state reset at document boundaries has never read
on behind an end of text. Both serve the conjecture of MoE-Mamba (arXiv 2401.04081, §4.6) that a state-space model
predicts well and copies badly.

Suffixes: B rows, L length, W windows, S span, D d_model, T targets.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from switchmamba.config import Config
from switchmamba.data.sampler import permutation
from switchmamba.data.split import Split
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError, DataError, NonFiniteError
from switchmamba.evaluation.documents import TokenIds, open_documents
from switchmamba.evaluation.perplexity import IGNORED, score_tokens
from switchmamba.generation.generate import refuse_unsuitable
from switchmamba.models.language_model import LanguageModel

CLASSES = (0, 1, 2, 4, 8, 16)
"""Lower bounds of the classes of natural repeats, in tokens of the longest n-gram that occurred before."""

REPEATED = 8
"""From this n on a target counts as a natural repeat."""

NATURAL_TOKENS = 65_536
"""Natural targets, at most."""

_SPANS, _WINDOWS = 0, 1  # what is drawn: the two permutations must differ

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Score(Config):
    """Next-token prediction on some targets.

    Attributes:
        targets: how many.
        loss: mean, nats.
        accuracy: share of targets that were the most probable token.
    """

    targets: int
    loss: float
    accuracy: float


class Occurrence(Score):
    """The spans at one of their two places; ``targets`` leaves out the first ``skip`` tokens of each.

    Attributes:
        loss_by_position: mean over spans for each of their tokens, the skipped ones too.
        accuracy_by_position: likewise.
    """

    loss_by_position: list[float]
    accuracy_by_position: list[float]


class PlantedRepeat(Config):
    """Spans that come twice, ``gap`` tokens of real text apart; ``first`` is the control."""

    gap: int
    first: Occurrence
    second: Occurrence


class RepeatedNgram(Score):
    """Targets whose longest repeated n-gram has at least so many tokens, and fewer than the next class asks for."""

    at_least: int


class Repeats(Config):
    """What came out.

    Attributes:
        context_length: of the longest window, tokens read.
        span: tokens of a planted repeat.
        prefix: real text before it, tokens.
        skip: first tokens of a span that are not counted.
        seed: of the choice of spans and windows.
        planted: by gap; without those that do not fit into the context or into any document.
        natural: every natural target in one class; empty classes are left out.
        repeated: natural targets that end an n-gram of eight tokens or more that occurred before.
        elsewhere: all other natural targets.
        tokens_read: by the model, in all.
    """

    context_length: int
    span: int
    prefix: int
    skip: int
    seed: int
    planted: list[PlantedRepeat]
    natural: list[RepeatedNgram]
    repeated: Score | None
    elsewhere: Score | None
    tokens_read: int


def repeats(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str | Path,
    *,
    split: Split = "validation",
    field: str = "text",
    context_length: int = 1024,
    gaps: Sequence[int] = (32, 128, 512),
    span: int = 32,
    prefix: int = 64,
    skip: int = 4,
    spans: int = 64,
    max_tokens: int = NATURAL_TOKENS,
    batch_size: int = 16,
    seed: int = 0,
    allow_non_causal: bool = False,
    allow_batch_dependence: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Repeats:
    """Measure how well ``model`` copies, on the documents of ``source``.

    Args:
        model: in ``eval()`` mode; it runs on its device, in the caller's autocast if there is one.
        tokenizer: the model's own.
        source: as for :func:`~switchmamba.evaluation.perplexity.evaluate`, also ``split`` and ``field``; all of its
            tokens count, whatever a mask says.
        context_length: most tokens read at once, from an empty state.
        gaps: tokens between the end of a span and its repeat; those that do not fit are left out.
        span: tokens of a planted repeat.
        prefix: tokens of its own document before it.
        skip: first tokens of a span that are not counted.
        spans: how many, at most; they do not overlap.
        max_tokens: natural targets, at most: whole windows, drawn from all documents.
        batch_size: rows at once.
        seed: of the choice of spans and windows, 0 ≤ seed < 2^63.
        allow_non_causal: accept a model that sees the targets; its result then means little.
        allow_batch_dependence: accept a model whose rows change each other.
        progress: called with the number of tokens read, and of all.

    Raises:
        ConfigError: an argument out of range, or a model that should not be evaluated.
        DataError: no document, one that cannot be read, or a directory prepared with another tokenizer.
        NonFiniteError: a loss is no number.
    """
    refuse_unsuitable(model, tokenizer, allow_non_causal, allow_batch_dependence)
    at_least = {
        "context_length": (context_length, 1),
        "span": (span, 1),
        "prefix": (prefix, 1),
        "skip": (skip, 0),
        "spans": (spans, 1),
        "max_tokens": (max_tokens, 1),
        "batch_size": (batch_size, 1),
        "seed": (seed, 0),
    }
    for name, (value, lowest) in at_least.items():
        if value < lowest:
            raise ConfigError(f"{name} = {value} must be at least {lowest}")
    if skip >= span:
        raise ConfigError(f"skip = {skip} leaves nothing of span = {span}; it must be less")
    if min(gaps, default=0) < 0:
        raise ConfigError(f"gaps = {list(gaps)} must not be negative")
    documents = [d.ids[:-1] for d in open_documents(source, split, field).tokenised(tokenizer)]
    fitting = [gap for gap in sorted(set(gaps)) if prefix + 2 * span + gap <= context_length]
    gaps, places = choose_spans([len(d) for d in documents], fitting, span, prefix, spans, seed)
    windows = choose_windows(documents, context_length, max_tokens, seed)
    if not windows:
        raise DataError(f"{source}: no document of two tokens to evaluate on")
    rows_of_gap = {
        gap: [_planted_row(documents[d], start, gap, span, prefix) for d, start in places] for gap in gaps
    }
    total = sum(len(row) - 1 for rows in (windows, *rows_of_gap.values()) for row in rows)
    scorer = _Scorer(model, batch_size, total, progress)
    planted = []
    for gap, rows in rows_of_gap.items():
        first = prefix - 1 + np.arange(span)  # the target of column i is token i + 1
        scores = scorer.score(rows, np.concatenate([first, first + span + gap]))
        loss_W2S, right_W2S = scores.loss.reshape(-1, 2, span), scores.right.reshape(-1, 2, span)
        planted.append(
            PlantedRepeat(
                gap=gap,
                first=_occurrence(loss_W2S[:, 0], right_W2S[:, 0], skip),
                second=_occurrence(loss_W2S[:, 1], right_W2S[:, 1], skip),
            )
        )
    scores = scorer.score(windows)
    longest_T = np.concatenate([longest[1:] for longest in longest_repeats(windows)])
    return Repeats(
        context_length=context_length,
        span=span,
        prefix=prefix,
        skip=skip,
        seed=seed,
        planted=planted,
        natural=_by_class(scores, longest_T),
        repeated=_score(scores.where(longest_T >= REPEATED)),
        elsewhere=_score(scores.where(longest_T < REPEATED)),
        tokens_read=total,
    )


# Choosing text


def choose_spans(
    lengths: Sequence[int], gaps: Sequence[int], span: int, prefix: int, count: int, seed: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Draw up to ``count`` spans that do not overlap, from documents of ``lengths`` tokens without the end of text.

    Returns the ``gaps`` (ascending) for which some document is long enough, and for each span its document and
    its start there. Behind each lies text for the largest of these gaps.
    """
    lengths_ = np.asarray(lengths, np.int64)
    longest = int(lengths_.max(initial=0))
    gaps = [gap for gap in gaps if prefix + span + gap <= longest]
    if not gaps:
        return [], []
    starts = np.maximum(
        0, (lengths_ - prefix - gaps[-1]) // span
    )  # of each document: prefix, prefix + span, …
    ends = np.cumsum(starts)
    drawn = permutation(int(ends[-1]), seed, _SPANS)[:count]
    owners = ends.searchsorted(drawn, side="right")
    places = prefix + span * (drawn - (ends - starts)[owners])
    return gaps, list(zip(owners.tolist(), places.tolist(), strict=True))


def _planted_row(document: TokenIds, start: int, gap: int, span: int, prefix: int) -> IntArray:
    real = document[start - prefix : start + span + gap]
    return np.concatenate([real, document[start : start + span]]).astype(np.int64)


def choose_windows(
    documents: Sequence[TokenIds], context_length: int, max_tokens: int, seed: int
) -> list[IntArray]:
    """Cut documents into windows of up to ``context_length`` targets and draw some, ``max_tokens`` targets at most.

    A window has one token more than targets: the token before them. So every token but a document's first is a target
    of one window. The first window drawn is taken in any case, cut short if need be.
    """
    counts = np.array([-(-(len(document) - 1) // context_length) for document in documents], np.int64)
    ends = np.cumsum(counts)
    windows: list[IntArray] = []
    left = max_tokens
    for number in permutation(int(ends[-1]) if len(ends) else 0, seed, _WINDOWS).tolist():
        owner = int(ends.searchsorted(number, side="right"))
        start = (number - int(ends[owner] - counts[owner])) * context_length
        window = documents[owner][start : start + context_length + 1].astype(np.int64)
        if windows and len(window) - 1 > left:
            break
        windows.append(window[: left + 1])
        left -= len(window) - 1
    return windows


def longest_repeats(windows: Sequence[IntArray]) -> list[IntArray]:
    """Of every token of every window, the length of the longest n-gram ending there that also ended earlier in it.

    run(i, j) = (t_i = t_j) · (run(i−1, j−1) + 1) is the length of the match that ends at i and at j < i; the result
    is its maximum over j. Time grows with the square of the length.
    """
    length = max(map(len, windows), default=0)
    tokens_WL = np.full((len(windows), length), -1, np.int64)
    for i, window in enumerate(windows):
        tokens_WL[i, : len(window)] = window
    longest_WL = np.zeros_like(tokens_WL)
    run = np.zeros((len(windows), 0), np.int64)
    for i in range(1, length):
        run = np.pad(run, ((0, 0), (1, 0))) + 1
        run *= tokens_WL[:, :i] == tokens_WL[:, i : i + 1]
        longest_WL[:, i] = run.max(axis=1)
    return [longest[: len(window)] for longest, window in zip(longest_WL, windows, strict=True)]


# Scoring


class _Scores(NamedTuple):
    """Of targets: −log p in nats, and whether they were the most probable token."""

    loss: FloatArray
    right: BoolArray

    def where(self, chosen: BoolArray) -> "_Scores":
        return _Scores(self.loss[chosen], self.right[chosen])


class _Scorer:
    """Reads rows of tokens, each from an empty state, and scores their targets."""

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._model, self._batch_size, self._progress = model, batch_size, progress
        self._done, self._total = 0, total

    def score(self, rows: Sequence[IntArray], columns: IntArray | None = None) -> _Scores:
        """Score the targets (the tokens but the first) of all rows, one after another; only ``columns`` if given."""
        losses: list[FloatArray] = [np.empty(0)] * len(rows)
        rights: list[BoolArray] = [np.empty(0, np.bool_)] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of a batch are filled up
        for start in range(0, len(rows), self._batch_size):
            own = by_length[start : start + self._batch_size]
            batch = [rows[i] for i in own]
            loss, right = self._score_batch(batch, columns)
            counts = [len(row) - 1 if columns is None else len(columns) for row in batch]
            cuts = np.cumsum(counts)[:-1]
            for i, own_loss, own_right in zip(own, np.split(loss, cuts), np.split(right, cuts), strict=True):
                losses[i], rights[i] = own_loss, own_right
            if self._progress is not None:
                self._done += sum(len(row) - 1 for row in batch)
                self._progress(self._done, self._total)
        scores = _Scores(np.concatenate(losses), np.concatenate(rights))
        if not np.isfinite(scores.loss).all():
            raise NonFiniteError("a loss is no number: the weights are damaged or overflow in their dtype")
        return scores

    @torch.inference_mode()
    def _score_batch(self, rows: Sequence[IntArray], columns: IntArray | None) -> _Scores:
        device = self._model.device
        length = max(map(len, rows)) - 1
        tokens_BL = np.zeros((len(rows), length), np.int64)
        targets_BL = np.full_like(tokens_BL, IGNORED)
        document_ids_BL = np.ones_like(tokens_BL)
        for i, row in enumerate(rows):
            count = len(row) - 1
            tokens_BL[i, :count] = row[:-1]
            targets_BL[i, :count] = row[1:]
            document_ids_BL[i, :count] = 0
        tokens, targets, document_ids = (
            torch.from_numpy(array_BL).to(device) for array_BL in (tokens_BL, targets_BL, document_ids_BL)
        )
        hidden_BLD = self._model.hidden_states(tokens, document_ids).hidden
        if columns is not None:
            chosen = torch.from_numpy(columns).to(device)
            hidden_BLD, targets = hidden_BLD[:, chosen], targets[:, chosen]
        counted_BL = targets != IGNORED
        loss_T, right_T = score_tokens(self._model, hidden_BLD[counted_BL], targets[counted_BL])
        return _Scores(loss_T.double().cpu().numpy(), right_T.cpu().numpy())


def _occurrence(loss_WS: FloatArray, right_WS: BoolArray, skip: int) -> Occurrence:
    return Occurrence(
        targets=loss_WS[:, skip:].size,
        loss=float(loss_WS[:, skip:].mean()),
        accuracy=float(right_WS[:, skip:].mean()),
        loss_by_position=loss_WS.mean(axis=0).tolist(),
        accuracy_by_position=right_WS.mean(axis=0).tolist(),
    )


def _score(scores: _Scores) -> Score | None:
    if not scores.loss.size:
        return None
    return Score(
        targets=scores.loss.size, loss=float(scores.loss.mean()), accuracy=float(scores.right.mean())
    )


def _by_class(scores: _Scores, longest_T: IntArray) -> list[RepeatedNgram]:
    class_T = np.searchsorted(CLASSES, longest_T, side="right") - 1
    found = ((bound, _score(scores.where(class_T == i))) for i, bound in enumerate(CLASSES))
    return [
        RepeatedNgram(at_least=bound, **score.model_dump()) for bound, score in found if score is not None
    ]
