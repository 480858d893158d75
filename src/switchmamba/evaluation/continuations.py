"""How probable continuations are after contexts: what multiple-choice tasks ask.

    log p(continuation | context) = Σ_t log p(token_t | context, tokens before t)        nats

A context that several continuations share is read once: its state is then copied to a row for each of them. Of a Mamba
that state has a fixed size, so a long context with many choices costs little more than the context alone.

Suffixes: B rows, L length, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.evaluation.perplexity import IGNORED, score_tokens
from switchmamba.generation.generate import read_prompts
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.state import ModelState


class Pair(NamedTuple):
    """Token ids of a context, one at least, and of what is to come after it, one at least."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """Of a continuation.

    Attributes:
        log_probability: nats.
        greedy: every token of it is the most probable one where it stands.
    """

    log_probability: float
    greedy: bool


def score_continuations(
    model: LanguageModel,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    chunk_size: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """Score each continuation after its context, in the order of ``pairs``.

    Args:
        model: in ``eval()`` mode, causal and batch invariant.
        batch_size: rows computed at once. Like ``chunk_size``, the tokens per row that are read at once, it changes
            time and memory, not the result beyond rounding.
        progress: called with the number of continuations scored, and of all.

    Raises ConfigError for an empty context or continuation.
    """
    for pair in pairs:
        if not pair.context or not pair.continuation:
            raise ConfigError(
                "a context and its continuation need a token each; the end of text can be a context"
            )
    by_context: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        by_context.setdefault(pair.context, []).append(i)
    # Contexts of like length together: padding costs as much as text.
    contexts = sorted(by_context, key=len, reverse=True)
    found: dict[int, Likelihood] = {}
    for first in range(0, len(contexts), batch_size):
        group = contexts[first : first + batch_size]
        state = read_prompts(model, group, None, chunk_size)
        rows = [(row, i) for row, context in enumerate(group) for i in by_context[context]]
        rows.sort(key=lambda pair: len(pairs[pair[1]].continuation))
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            own = state.select(torch.tensor([row for row, _ in part], device=state.position_B.device))
            scores = _score(model, [pairs[i] for _, i in part], own, chunk_size)
            found |= {i: score for (_, i), score in zip(part, scores, strict=True)}
            if progress is not None:
                progress(len(found), len(pairs))
    return [found[i] for i in range(len(pairs))]


@torch.inference_mode()
def _score(
    model: LanguageModel, pairs: Sequence[Pair], state: ModelState, chunk_size: int
) -> list[Likelihood]:
    """Score continuations from ``state``, which lacks the last token of each context."""
    inputs_BL = _filled([[pair.context[-1], *pair.continuation[:-1]] for pair in pairs], fill=0)
    targets_BL = _filled([pair.continuation for pair in pairs], fill=IGNORED)
    device = model.device
    log_p_B = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    greedy_B = torch.ones(len(pairs), dtype=torch.bool, device=device)
    for start in range(0, inputs_BL.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        tokens, targets = inputs_BL[:, chunk].to(device), targets_BL[:, chunk].to(device)
        # A context of one token left nothing but padding behind it: its document begins only here.
        document_ids = torch.zeros_like(tokens) if bool((state.document_id_B < 0).any()) else None
        hidden_BLD, state, _ = model.hidden_states(tokens, document_ids, state, observe_routers=False)
        counted = targets != IGNORED
        losses_T, right_T = score_tokens(model, hidden_BLD[counted], targets[counted])
        rows_T = counted.nonzero()[:, 0]
        log_p_B.index_add_(0, rows_T, -losses_T.double())
        greedy_B[rows_T[~right_T]] = False
    return [Likelihood(*row) for row in zip(log_p_B.tolist(), greedy_B.tolist(), strict=True)]


def _filled(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return rows of unequal length as (B, L) int64, filled up on the right: what is there reaches no earlier token."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.int64)
