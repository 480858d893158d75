"""Which document is held out: by a hash of its content, by its place at the tail of the text, or by its file."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from switchmamba.data.chat import Segment
from switchmamba.data.corpus import Document

Split = Literal["train", "validation"]

SPLITS: tuple[Split, ...] = ("train", "validation")

_CUT_SEARCH_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """A document, or a piece of one, and the split it belongs to; the other fields as in Document."""

    split: Split
    text: str
    num_bytes: int
    bytes_read: int
    segments: tuple[Segment, ...] | None = None


def _whole(split: Split, document: Document) -> Part:
    return Part(split, document.text, document.num_bytes, document.bytes_read, document.segments)


def all_to(split: Split, documents: Iterable[Document]) -> Iterator[Part]:
    """Put every document into ``split``."""
    for document in documents:
        yield _whole(split, document)


def by_content(documents: Iterable[Document], fraction: float, seed: int) -> Iterator[Part]:
    """Hold out the documents whose hash, keyed by ``seed``, is below ``fraction`` of its range.

    Equal documents stay together, so none is in both splits, and adding documents moves no other.
    """
    key = f"switchmamba split {seed}".encode()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=8, key=key).digest()
        yield _whole("validation" if int.from_bytes(digest, "big") < fraction * 2**64 else "train", document)


def by_last(documents: Iterable[Document], fraction: float, total: int) -> Iterator[Part]:
    """Hold out the last ``fraction`` of ``total`` documents, at least one, uncut."""
    cut = total - max(1, round(fraction * total))
    for number, document in enumerate(documents):
        yield _whole("train" if number < cut else "validation", document)


def by_tail(documents: Iterable[Document], fraction: float, total_bytes: int) -> Iterator[Part]:
    """Hold out the last ``fraction`` of ``total_bytes`` of text, cutting the document there in two.

    The cut falls after a line's end if there is one in the 4 KiB before it.
    """
    cut = total_bytes - max(1, round(fraction * total_bytes))
    start = 0
    for document in documents:
        head, tail = _cut(document.text.encode(), cut - start)
        if head:
            yield Part("train", head.decode(), len(head), document.bytes_read)
        if tail:
            yield Part("validation", tail.decode(), len(tail), document.bytes_read)
        start += document.num_bytes


def _cut(text: bytes, at: int) -> tuple[bytes, bytes]:
    """Cut UTF-8 at or before ``at``, which may lie outside, without cutting a character."""
    if 0 < at < len(text):
        after_line = text.rfind(b"\n", max(0, at - _CUT_SEARCH_BYTES), at) + 1
        while text[at] & 0b1100_0000 == 0b1000_0000:  # a continuation byte
            at -= 1
        at = after_line or at
    at = max(at, 0)
    return text[:at], text[at:]
