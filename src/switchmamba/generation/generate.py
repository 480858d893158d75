"""Decoding: read the prompts in chunks, then one token for every row at a time.

Memory does not grow with the prompt: only the state and one chunk live at once, and only the last position
meets the head. Prompts of different lengths are padded on the left, and a row that has ended leaves the
batch, so that the work shrinks. The last token of a sequence is always the one that the state has not seen
yet: a prompt, a stopped generation and a saved one continue in the same way.

Suffixes: B rows, L length, D d_model, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import ConfigError
from switchmamba.generation.decode_graph import DecodeGraph
from switchmamba.generation.sampling import choose, row_generator
from switchmamba.generation.settings import SamplingSettings
from switchmamba.generation.stop import StopMatcher
from switchmamba.layers.interface import PADDING_ID
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.state import ModelState
from switchmamba.ops.cuda_graph import CannotCaptureError

logger = logging.getLogger("switchmamba")

FinishReason = Literal["end_of_text", "stop", "length", "interrupted"]


@dataclass(frozen=True)
class Continuation:
    """Everything needed to go on with a row as if it had never stopped.

    Attributes:
        state: of this one row, without ``token``.
        token: the row's last token, which the model has not seen yet.
        generator: the row's random numbers, as far as they were used.
    """

    state: ModelState
    token: int
    generator: torch.Generator


@dataclass(frozen=True)
class Completion:
    """What came after one prompt.

    Attributes:
        text: without the stop text or the end of text.
        token_ids: all tokens drawn, those of a stop text included, the end of text not.
        finish_reason: the model ended its document, a stop text appeared, ``max_tokens`` were drawn, or
            :meth:`Generation.interrupt` was called.
        continuation: where the row stands now.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    continuation: Continuation


@dataclass(frozen=True)
class Piece:
    """Text that row ``row`` has just gained: whole characters, certainly not part of a stop text."""

    row: int
    text: str


@dataclass(frozen=True)
class Result:
    """All completions in the order of the prompts, and what they cost.

    Attributes:
        completions: one per prompt.
        prompt_tokens: tokens read, without padding.
        prompt_seconds: until the first token of every row was drawn.
        drawn_tokens: all tokens drawn, each end of text included.
        decoded_tokens: those after the first one of each row, which ``decode_seconds`` counts.
        decode_seconds: what they took; time spent by the consumer of the pieces is in neither figure.
    """

    completions: tuple[Completion, ...]
    prompt_tokens: int
    prompt_seconds: float
    drawn_tokens: int
    decoded_tokens: int
    decode_seconds: float

    def __add__(self, other: "Result") -> "Result":
        """Join two batches."""
        return Result(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens of all rows together, per second; 0 if nothing was read."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens of all rows together, per second; 0 if at most one per row was drawn."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    settings: SamplingSettings | None = None,
    *,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    continuations: Sequence[Continuation] | None = None,
    first_row: int = 0,
    chunk_size: int = 1024,
    allow_non_causal: bool = False,
    allow_batch_dependence: bool = False,
) -> "Generation":
    """Continue each prompt; iterate over the result for text as it comes, or ask it for its ``result``.

    Args:
        model: in ``eval()`` mode, so that no expert drops a token.
        tokenizer: the model's own.
        prompts: texts or token ids. An empty one stands for the beginning of a document: the end of text.
        settings: how tokens are chosen; None: drawn from the model's own distribution with seed 0.
        max_tokens: most tokens drawn per row; 0 only reads the prompts.
        stop: texts that end a row.
        continuations: where earlier rows stood, one per prompt; a prompt is then read after what its row has
            seen (an empty one adds nothing), random numbers go on where they were, and ``settings.seed`` has
            no effect. In a batch the prompts must then have equally many tokens.
        first_row: number of the first prompt for the random numbers: row i draws from stream (seed, first_row
            + i), so that a long list of prompts can be cut into batches of any size.
        chunk_size: prompt tokens per row that are read at once.
        allow_non_causal: accept a model whose layers look ahead; its text is not what it learned.
        allow_batch_dependence: accept a model whose rows change each other.

    Raises:
        ConfigError: an argument out of range, or a model that must not generate, before anything is read.
        NonFiniteError: while iterating, when logits are no numbers.
    """
    refuse_unsuitable(model, tokenizer, allow_non_causal, allow_batch_dependence)
    if max_tokens < 0 or chunk_size < 1:
        raise ConfigError(f"max_tokens = {max_tokens} and chunk_size = {chunk_size} must be at least 0 and 1")
    if not prompts:
        raise ConfigError("no prompt; an empty text stands for the beginning of a document")
    if continuations is not None and len(continuations) != len(prompts):
        raise ConfigError(f"{len(continuations)} continuations for {len(prompts)} prompts; give one for each")
    settings = settings or SamplingSettings()
    rows = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if continuations is None:
            ids, generator = ids or [tokenizer.end_of_text_id], row_generator(settings.seed, first_row + i)
        else:
            ids, generator = [continuations[i].token, *ids], continuations[i].generator.clone_state()
        rows.append(_Row(i, ids, generator, tokenizer, StopMatcher(stop), max_tokens))
    state = None if continuations is None else ModelState.stack([c.state for c in continuations])
    if state is not None and len({len(row.ids) for row in rows}) > 1:
        raise ConfigError(
            "prompts that continue earlier rows cannot be padded; give one, or equally many tokens in each"
        )
    return Generation(model, tokenizer.vocab_size, settings, rows, state, chunk_size)


def refuse_unsuitable(
    model: LanguageModel, tokenizer: Tokenizer, allow_non_causal: bool, allow_batch_dependence: bool
) -> None:
    """Raise ConfigError for a foreign tokenizer, and a model whose logits depend on more than a row's past."""
    entries, capacity = tokenizer.vocab_size, model.config.vocab_size
    if entries > capacity:
        raise ConfigError(f"the tokenizer has {entries} entries, the model {capacity}; use the model's own")
    if model.training:
        raise ConfigError("the model is in training mode, where experts drop tokens; call model.eval() first")
    if not (model.causal or allow_non_causal):
        raise ConfigError(
            f"the model is not causal ({model.why_not_causal}); its logits know the tokens that they are to predict, "
            "and token by token it computes something else: allow_non_causal (--allow-non-causal) accepts that"
        )
    if not (model.batch_invariant or allow_batch_dependence):
        raise ConfigError("the rows of a batch change each other; allow_batch_dependence accepts it")


class _Row:
    """One sequence on its way: its tokens in, its text out."""

    def __init__(
        self,
        index: int,
        ids: list[int],
        generator: torch.Generator,
        tokenizer: Tokenizer,
        matcher: StopMatcher,
        max_tokens: int,
    ) -> None:
        self.index, self.ids, self.generator = index, ids, generator
        self.prompt_length = len(ids)
        self.finish_reason: FinishReason | None = None if max_tokens else "length"
        self._pieces: list[str] = []
        self._length_limit = len(ids) + max_tokens
        self._end_of_text_id = tokenizer.end_of_text_id
        self._decoder = tokenizer.stream_decoder()
        self._matcher = matcher

    def accept(self, token: int) -> str:
        """Take the next token; return the text that is certain now. The last one sets ``finish_reason``."""
        self.ids.append(token)
        if token == self._end_of_text_id:
            piece = self._finish("end_of_text")
        else:
            piece = self._matcher.push(self._decoder.push(token))
            if self._matcher.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) == self._length_limit:
                piece += self._finish("length")
        self._pieces.append(piece)
        return piece

    def interrupt(self) -> str:
        """End here; return the text that was held back."""
        piece = self._finish("interrupted")
        self._pieces.append(piece)
        return piece

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        rest = self._matcher.push(self._decoder.flush())
        return rest + self._matcher.flush()

    def completion(self, state: ModelState) -> Completion:
        """Return what the row has become; ``state`` is its own, one row."""
        assert self.finish_reason is not None
        drawn = self.ids[self.prompt_length :]
        visible = drawn[:-1] if self.finish_reason == "end_of_text" else drawn
        continuation = Continuation(state, self.ids[-1], self.generator)
        return Completion("".join(self._pieces), tuple(visible), self.finish_reason, continuation)


_STEADY_STEPS = 16
"""Steps with the same rows before a graph is captured, which takes as long as a few dozen of them."""


class Generation(Iterator[Piece]):
    """A batch that is being decoded; :func:`generate` makes it.

    Iterating computes and yields the pieces of all rows as they come; :attr:`result` computes what is left.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocab_size: int,
        settings: SamplingSettings,
        rows: list[_Row],
        state: ModelState | None,
        chunk_size: int,
    ) -> None:
        self._model, self._settings, self._rows, self._chunk_size = model, settings, rows, chunk_size
        self._vocab_size = vocab_size  # the model's may be larger, rounded up: those logits are no tokens
        self._device = model.device
        self._completions: dict[int, Completion] = {}
        self._prompt_seconds = self._decode_seconds = 0.0
        self._decoded_tokens = 0
        self._graph: DecodeGraph | None = None
        self._can_be_captured = DecodeGraph.serves(model)
        self._steady_steps = 0  # since the rows last changed
        self._interrupted = False
        self._pieces = self._run(state)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def interrupt(self) -> None:
        """Let every row end with the token it is at; may be called while another one is being computed."""
        self._interrupted = True

    @property
    def result(self) -> Result:
        """Everything, once all rows have ended; computes what has not been iterated over."""
        for _ in self:
            pass
        return Result(
            completions=tuple(self._completions[row.index] for row in self._rows),
            prompt_tokens=sum(row.prompt_length for row in self._rows),
            prompt_seconds=self._prompt_seconds,
            drawn_tokens=sum(len(row.ids) - row.prompt_length for row in self._rows),
            decoded_tokens=self._decoded_tokens,
            decode_seconds=self._decode_seconds,
        )

    def _run(self, state: ModelState | None) -> Iterator[Piece]:
        # The clock runs while this computes, not while the consumer handles a piece.
        started = perf_counter()
        rows = self._rows
        state = read_prompts(self._model, [row.ids for row in rows], state, self._chunk_size)
        document_ids_B1 = _unless_inside_documents(state.document_id_B.clamp(min=0)[:, None], state)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the clock is read next
        self._prompt_seconds = perf_counter() - started
        while True:
            if self._interrupted:
                yield from [Piece(row.index, row.interrupt()) for row in rows if row.finish_reason is None]
            started = perf_counter()
            rows, state = self._let_finished_leave(rows, state)
            if not rows:
                return
            logits_BV, state = self._step(rows, document_ids_B1, state)
            document_ids_B1 = None
            tokens = choose(logits_BV, self._settings, [row.generator for row in rows]).tolist()
            pieces = [Piece(row.index, row.accept(token)) for row, token in zip(rows, tokens, strict=True)]
            seconds = perf_counter() - started
            if len(rows[0].ids) == rows[0].prompt_length + 1:
                self._prompt_seconds += seconds
            else:
                self._decode_seconds += seconds
                self._decoded_tokens += len(tokens)
            yield from (piece for piece in pieces if piece.text)

    @torch.inference_mode()
    def _step(
        self, rows: list[_Row], document_ids_B1: Tensor | None, state: ModelState
    ) -> tuple[Tensor, ModelState]:
        """Feed every row's last token; return the logits (B, V) of the next one.

        On a GPU a captured graph takes over as soon as the rows have stayed the same for a while.
        """
        if self._graph is not None and state is not self._graph.state:
            self._graph, self._steady_steps = None, 0
        if self._graph is None and self._steady_steps >= _STEADY_STEPS and self._can_be_captured:
            self._try_to_capture(state)
        self._steady_steps += 1
        tokens_B1 = torch.tensor([row.ids[-1:] for row in rows])
        if self._graph is not None:
            return self._graph.step(tokens_B1[:, 0])[:, : self._vocab_size], self._graph.state
        tokens_B1 = tokens_B1.to(self._device)
        hidden_B1D, state, _ = self._model.hidden_states(
            tokens_B1, document_ids_B1, state, observe_routers=False, allow_non_causal=True
        )
        return self._model.head(hidden_B1D[:, -1])[:, : self._vocab_size], state

    def _try_to_capture(self, state: ModelState) -> None:
        try:
            self._graph = DecodeGraph(self._model, state)
        except CannotCaptureError as reason:
            self._can_be_captured = False
            logger.warning(
                "a decoding step of this model cannot be captured, it runs launch by launch: %s", reason
            )

    @torch.inference_mode()
    def _let_finished_leave(self, rows: list[_Row], state: ModelState) -> tuple[list[_Row], ModelState]:
        """Keep the completions of rows that have ended; return the other rows and their state."""
        staying = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if len(staying) == len(rows):
            return rows, state
        for i, row in enumerate(rows):
            if row.finish_reason is not None:
                own = state.select(torch.tensor([i], device=self._device))
                self._completions[row.index] = row.completion(own)
        return [rows[i] for i in staying], state.select(
            torch.tensor(staying, dtype=torch.int64, device=self._device)
        )


@torch.inference_mode()
def read_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: ModelState | None, chunk_size: int
) -> ModelState:
    """Read all but the last token of each prompt, a row each; return the state.

    Shorter prompts are padded on the left. A row that has read nothing but padding has a negative document id.

    Args:
        prompts: token ids, one at least in each.
        state: of as many rows, where the prompts go on; they must then be equally long. None: from the beginning.
        chunk_size: tokens per row that are read at once.
    """
    device = model.device
    sequences = [torch.tensor(prompt) for prompt in prompts]
    length = max(len(sequence) for sequence in sequences)
    if state is None:
        length = max(length, 2)  # a lone token is padded, so that there is a state to begin with
    document_id_B = torch.zeros(len(sequences), dtype=torch.int64, device=device)
    if state is not None:
        document_id_B = state.document_id_B.clamp(min=0)
    padding_BL = torch.tensor([[length - len(s)] for s in sequences]) > torch.arange(length)
    tokens_BL = torch.stack([F.pad(sequence, (length - len(sequence), 0)) for sequence in sequences])
    tokens_BL, padding_BL = tokens_BL.to(device), padding_BL.to(device)
    document_ids_BL = document_id_B[:, None].masked_fill(padding_BL, PADDING_ID)
    for start in range(0, length - 1, chunk_size):
        chunk = slice(start, min(start + chunk_size, length - 1))
        document_ids = _unless_inside_documents(document_ids_BL[:, chunk], state)
        state = model.hidden_states(
            tokens_BL[:, chunk], document_ids, state, observe_routers=False, allow_non_causal=True
        ).state
    assert state is not None
    return state


def _unless_inside_documents(document_ids_BL: Tensor, state: ModelState | None) -> Tensor | None:
    """Return None, the fast case, if every row goes on in its document: no padding, or all behind it."""
    before_B = document_ids_BL[:, 0] if state is None else state.document_id_B
    return None if bool((before_B >= 0).all()) else document_ids_BL
