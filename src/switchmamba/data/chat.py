"""Conversations as tokens: a chat template (Jinja, as Hugging Face has it), and which tokens the assistant writes.

A template turns messages, each with ``role`` and ``content``, into one text. It sees ``messages``,
``add_generation_prompt``, ``eos_token`` and ``bos_token``, both the end of text, and must be additive: what it writes
for the first n messages begins what it writes for n + 1. Then a conversation falls into what is read and what the
assistant writes, and a chat reads each message once.

The assistant's turn ends with ``{{ eos_token }}``, the end of text, or with a text of the template's own. The end of
text is the better choice where a tokenizer has no other special token, as ours have not: no message can spell it, it is
one token, and whatever generates stops there by itself. Roles are plain text here, so a message can imitate them.

Templates run in Jinja's sandbox. Each part of a conversation is encoded by itself, in training and in a chat alike.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from switchmamba.config import nearest
from switchmamba.data.tokenizer import END_OF_TEXT, TokenIds, Tokenizer
from switchmamba.errors import ConfigError, DataError

CHAT_TEMPLATE = "chat_template.jinja"
"""The template's file in prepared data and in checkpoints; Hugging Face's own name for it."""

ROLES = ("system", "user", "assistant")

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{ "" if loop.first else "\\n\\n" }}{{ message["role"] | capitalize }}:{{ "\\n" ~ message["content"] }}
{%- if message["role"] == "assistant" %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\n\\nAssistant:\\n" }}{% endif -%}
"""

Message = Mapping[str, str]
"""``role``, one of :data:`ROLES`, and ``content``."""


class Segment(NamedTuple):
    """A part of a conversation: texts with an end of text between each two, and whether the assistant writes it."""

    texts: tuple[str, ...]
    counted: bool

    @property
    def text(self) -> str:
        """All of it without the ends of text."""
        return "".join(self.texts)


class ChatTemplate:
    """A template that has been tried on a conversation.

    Attributes:
        source: the Jinja text.
        stop: the text that ends the assistant's turn; None: the end of text does.
    """

    def __init__(self, source: str = DEFAULT_TEMPLATE, name: str = "the default chat template") -> None:
        """Compile ``source``; ``name`` names it in the ConfigError for what cannot be used."""
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source, self.name = source, name
        if END_OF_TEXT in source:
            raise ConfigError(
                f"{name}: spells {END_OF_TEXT}, which is then plain text; write {{{{ eos_token }}}}"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from None
        self._closing, self._end = self._find_end()
        self.stop: str | None = None if self._end == _MARK else self._end.strip()

    @property
    def sha256(self) -> str:
        """Of the source in UTF-8."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @classmethod
    def from_file(cls, path: Path) -> "ChatTemplate":
        """Read a template; ConfigError says what is wrong with it."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot read the chat template: {error}") from None

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Cut a conversation into what is read and what the assistant writes, its end of turn included.

        Raises DataError if the template refuses the messages, or writes something that is not additive.
        """
        segments: list[Segment] = []
        written = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True)
            answer = self._render(messages[: i + 1])
            self._require_beginning(written, before)
            self._require_beginning(before, answer)
            end = self._end_of_answer(answer)
            segments += [_segment(before[len(written) :], False), _segment(answer[len(before) : end], True)]
            written = answer[:end]
        whole = self._render(messages)
        self._require_beginning(written, whole)
        segments.append(_segment(whole[len(written) :], False))
        return [segment for segment in segments if segment.counted or len(segment.texts) > 1 or segment.text]

    def prompt(self, messages: Sequence[Message], read: int = 0, closed: bool = True) -> Segment:
        """Return what has to be read before the assistant answers the last of ``messages``.

        Args:
            messages: the whole conversation.
            read: how many of them have been read or written already, the last of these an answer.
            closed: of that answer its end of turn too; False: it was cut short.

        Raises DataError as :meth:`segments`.
        """
        start = ""
        if read:
            answer = self._render(messages[:read])
            end = self._end_of_answer(answer)
            start = answer[: end if closed else end - len(self._end)]
        whole = self._render(messages, add_generation_prompt=True)
        self._require_beginning(start, whole)
        return _segment(whole[len(start) :], False)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=[{**message, "content": _unmarked(message["content"])} for message in messages],
                add_generation_prompt=add_generation_prompt,
                eos_token=_MARK,
                bos_token=_MARK,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"{self.name} refuses the conversation: {error}") from None

    def _find_end(self) -> tuple[str, str]:
        """Return what the template writes behind an answer, and the part of it that ends the turn."""
        probe = "\x03probe\x03"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            before, whole = self._render(messages[:1], add_generation_prompt=True), self._render(messages)
            self._require_beginning(before, whole)
        except DataError as error:
            raise ConfigError(str(error)) from None
        _, found, closing = whole[len(before) :].rpartition(probe)
        end = _MARK if closing.startswith(_MARK) else closing.rstrip()
        if not found or not end.strip() or (_MARK in end and end != _MARK):
            raise ConfigError(
                f"{self.name}: does not end the assistant's turn in a way that can be recognised; write "
                "{{ eos_token }}, or a text, right behind its content"
            )
        return closing, end

    def _end_of_answer(self, rendered: str) -> int:
        """Return where the turn ends in a text that ends with an answer."""
        if not rendered.endswith(self._closing):
            raise DataError(f"{self.name}: ends some answers otherwise than others")
        return len(rendered) - len(self._closing) + len(self._end)

    def _require_beginning(self, beginning: str, whole: str) -> None:
        if not whole.startswith(beginning):
            raise DataError(
                f"{self.name}: is not additive: with a further message, or without the prompt for an answer, it writes "
                "the earlier ones otherwise"
            )


_MARK = "\x02end of text\x03"
"""Stands for the end of text while a template is at work; no message can hold it (:func:`_unmarked`)."""

_STANDS_FOR = {"\x02": "\ue002\ue000", "\ue002": "\ue002\ue001"}


def _unmarked(content: str) -> str:
    """Return a text without control character 2, in which :func:`_marked` finds the original."""
    return "".join(_STANDS_FOR.get(c, c) for c in content) if {"\x02", "\ue002"} & set(content) else content


def _segment(rendered: str, counted: bool) -> Segment:
    texts = [
        part.replace("\ue002\ue000", "\x02").replace("\ue002\ue001", "\ue002")
        for part in rendered.split(_MARK)
    ]
    return Segment(tuple(texts), counted)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON as it is; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


# Records


def read_messages(record: Mapping[str, Any], place: str) -> list[Message]:
    """Return the messages of a JSON object: ``messages``, or ``prompt`` and ``completion``.

    Raises DataError naming ``place`` and the field at fault.
    """
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: field 'messages' is {_kind(messages)}, not a list of messages")
        found = [_message(message, f"{place}: messages[{i}]") for i, message in enumerate(messages)]
    elif "prompt" in record or "completion" in record:
        for field in ("prompt", "completion"):
            if field not in record:
                raise DataError(f"{place}: no field {field!r} beside the other one")
            if not isinstance(record[field], str):
                raise DataError(
                    f"{place}: field {field!r} is {_kind(record[field])}, not a string; turns go into 'messages'"
                )
        found = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    else:
        has = ", ".join(sorted(record)) or "none"
        raise DataError(f"{place}: neither field 'messages' nor 'prompt' and 'completion'; it has {has}")
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f"{place}: no message has role 'assistant', so there is nothing to learn")
    return found


def odd_turn(messages: Sequence[Message]) -> str:
    """Say where roles come in an order that templates seldom take; "" where user and assistant alternate.

    A system message may begin. Our own template takes any order.
    """
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[first:], first):
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        if role != expected:
            begins = ", ".join(roles[: i + 1])
            return f"messages[{i}] is of role {role!r} where {expected!r} is due (it begins {begins})"
    return ""


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place} is {_kind(message)}, not an object with 'role' and 'content'")
    for field in ("role", "content"):
        if field not in message:
            raise DataError(f"{place} has no field {field!r}{nearest(field, sorted(map(str, message)))}")
        if not isinstance(message[field], str):
            raise DataError(f"{place}.{field} is {_kind(message[field])}, not a string")
    if message["role"] not in ROLES:
        raise DataError(f"{place}.role is {message['role']!r}{nearest(message['role'], ROLES)}")
    return {"role": message["role"], "content": message["content"]}


def _kind(value: Any) -> str:
    return "empty" if value in ([], {}) else type(value).__name__


# Tokens


def encode_segment(tokenizer: Tokenizer, segment: Segment) -> list[int]:
    """Return the tokens of one segment."""
    ids, _ = encode_conversations(tokenizer, [[segment]])[0]
    return [int(token) for token in ids]


def encode_conversations(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Segment]]
) -> list[tuple[TokenIds, npt.NDArray[np.bool_]]]:
    """Return of each conversation its tokens and, for each of them, whether it counts."""
    texts = [text for segments in conversations for segment in segments for text in segment.texts]
    encoded = iter(tokenizer.encode_batch(texts))
    end_of_text = np.array([tokenizer.end_of_text_id], np.uint32)
    found = []
    for segments in conversations:
        ids: list[TokenIds] = [np.empty(0, np.uint32)]
        counted: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)]
        for segment in segments:
            for i in range(len(segment.texts)):
                part = next(encoded)
                part = part if i == 0 else np.concatenate([end_of_text, part])
                ids.append(part)
                counted.append(np.full(len(part), segment.counted))
        found.append((np.concatenate(ids), np.concatenate(counted)))
    return found
