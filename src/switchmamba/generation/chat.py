"""A conversation with a model: every message is read once, by a template, and the recurrent state stays between turns.

What is read and what is written are encoded apart, as in training (``data/chat.py``). An answer that was cut short is
closed by the template's end of turn before the next message is read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchmamba.checkpoint import MANIFEST, read_json
from switchmamba.data.chat import ChatTemplate, Message, encode_segment, read_messages
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import CheckpointError, DataError
from switchmamba.generation.generate import Completion, Continuation, Generation, generate, refuse_unsuitable
from switchmamba.generation.saved_state import load_state, save_state
from switchmamba.generation.settings import SamplingSettings
from switchmamba.models.language_model import LanguageModel


class Chat:
    """A conversation in progress.

    Attributes:
        messages: all of it; of an answer that was cut short what there is.
        system: what a new conversation begins with; None: nothing.
        tokens_read: how many tokens of prompts the model has read, answers not counted.
        completion: the last answer; None before the first one.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        settings: SamplingSettings | None = None,
        *,
        max_tokens: int = 512,
        system: str | None = None,
        allow_non_causal: bool = False,
    ) -> None:
        """Begin with nothing read.

        Args:
            model: in ``eval()`` mode.
            tokenizer: the model's own.
            template: what the model was trained with.
            settings: how tokens are chosen; None: drawn from the model's own distribution with seed 0.
            max_tokens: most tokens of one answer.
            system: as the attribute.
            allow_non_causal: accept a model whose layers look ahead.

        Raises ConfigError for a model that must not generate.
        """
        refuse_unsuitable(model, tokenizer, allow_non_causal, allow_batch_dependence=True)
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._settings, self._max_tokens = settings or SamplingSettings(), max_tokens
        self._allow_non_causal = allow_non_causal
        self._running: Generation | None = None
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, and begin one with ``system``."""
        self.messages: list[Message] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )
        self.tokens_read = 0
        self.completion: Completion | None = None
        self._continuation: Continuation | None = None
        self._read, self._closed = 0, True

    def answer(self, text: str) -> Iterator[str]:
        """Read a message of the user and yield the answer as it comes.

        The conversation goes on by both once the answer has ended, and stays as it was if the iteration is given up.
        Raises DataError if the template refuses the message.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        segment = self._template.prompt(messages, self._read, self._closed)
        ids = encode_segment(self._tokenizer, segment)
        self._running = generate(
            self._model,
            self._tokenizer,
            [ids],
            self._settings,
            max_tokens=self._max_tokens,
            stop=() if self._template.stop is None else (self._template.stop,),
            continuations=None if self._continuation is None else [self._continuation],
            allow_non_causal=self._allow_non_causal,
            allow_batch_dependence=True,
        )
        for piece in self._running:
            yield piece.text
        (completion,) = self._running.result.completions
        self.completion, self._continuation = completion, completion.continuation
        self._closed = completion.finish_reason == ("end_of_text" if self._template.stop is None else "stop")
        self.tokens_read += len(ids)
        self.messages = [*messages, {"role": "assistant", "content": completion.text.rstrip()}]
        self._read = len(self.messages)

    def interrupt(self) -> None:
        """Let the answer that is being written end where it is; a signal handler may call it."""
        if self._running is not None:
            self._running.interrupt()

    def save(self, path: Path) -> None:
        """Write conversation and state as the new directory ``path``; DataError before the first answer."""
        if self._continuation is None:
            raise DataError("nothing has been said yet that could be saved")
        talk = {
            "messages": [dict(message) for message in self.messages],
            "closed": self._closed,
            "tokens_read": self.tokens_read,
            "chat_template_sha256": self._template.sha256,
        }
        save_state(path, self._model, self._continuation, {"chat": talk})

    def load(self, path: Path) -> None:
        """Go on with what :meth:`save` wrote, for the same model and template; nothing is read again.

        Raises CheckpointError for anything else; the conversation then stays as it was.
        """
        if not (path / MANIFEST).is_file():
            raise CheckpointError(f"{path}: no saved conversation; /save makes one")
        continuation = load_state(path, self._model)
        talk: Any = read_json(path / MANIFEST)["extra"].get("chat")
        if not isinstance(talk, dict) or not {"closed", "tokens_read", "chat_template_sha256"} <= talk.keys():
            raise CheckpointError(f"{path}: a generation's state, not a conversation; /save makes one")
        if talk["chat_template_sha256"] != self._template.sha256:
            raise CheckpointError(f"{path}: a conversation by another template; load it with that one")
        try:
            messages = read_messages(talk, str(path))
        except DataError as error:
            raise CheckpointError(str(error)) from None
        self.messages, self._read, self._closed = messages, len(messages), bool(talk["closed"])
        self._continuation, self.tokens_read = continuation, int(talk["tokens_read"])
        self.system = messages[0]["content"] if messages[0]["role"] == "system" else None
        self.completion = None
