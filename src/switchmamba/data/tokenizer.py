"""Text to token ids and back: byte-level BPE without unknown tokens, kept in a ``tokenizer.json``.

A thin wall around the ``tokenizers`` library. What it adds are guarantees: every text can be encoded and
comes back unchanged, a document cannot write the end-of-text token by spelling it, memory does not grow with
the length of a document, and the sha256 of a tokenizer is that of its file, byte for byte.

Source of the method: Radford et al. 2019 (GPT-2), §2.2.
"""

import codecs
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from switchmamba.errors import ConfigError, DataError

logger = logging.getLogger("switchmamba")

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it closes every document."""

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end of text."""

TokenIds = npt.NDArray[np.uint32]

_PIECE_CHARACTERS = 2**16
_GROUP_CHARACTERS = 2**20
_SAFE_CUT = re.compile(r"(?<=[^\W_])(?= [^\W_])|(?<=\S\n)(?=[^\W\d_])")
_PROBE = "Ab cd\nef é字\U0001f642 1\t\x00~"


class Tokenizer:
    """A byte-level BPE tokenizer with an end-of-text token.

    Build it with :meth:`from_file` or :meth:`train`. Encoding adds no special token: whoever needs the end of
    text appends ``end_of_text_id``.

    Attributes:
        content: the tokenizer.json.
        sha256: of the tokenizer.json, exactly as read or trained; :meth:`save` writes these bytes.
        vocab_size: one more than the largest id, the end of text included.
        end_of_text_id: id of ``<|endoftext|>``: 0 when trained here, 50256 in GPT-2's.
    """

    def __init__(self, content: bytes, source: str) -> None:
        """Take the bytes of a tokenizer.json; ``source`` names them in the error that refuses them."""
        self.content = content
        self._tokenizer = _parse(content, source)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.end_of_text_id: int = self._tokenizer.get_vocab(with_added_tokens=True)[END_OF_TEXT]
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._cut = _cut if _splits_words(self._tokenizer) else _whole
        if not self.decode(self.encode(_PROBE)).endswith(_PROBE):
            raise DataError(f"{source}: does not give back the text it encodes; a byte-level BPE is needed")

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a tokenizer.json; :class:`DataError` says what it lacks."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
        return cls(content, str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn byte pairs from ``texts``; neither their order nor the number of threads changes the file.

        The result has ``vocab_size`` entries, the end of text (id 0) included, or fewer when the texts hold
        no more pairs. Takes seconds for 32 MB of text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocabulary size {vocab_size} is under {MIN_VOCAB_SIZE}: the 256 bytes and {END_OF_TEXT}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer=trainer)
        trained = cls(tokenizer.to_str(pretty=True).encode(), "the trained tokenizer")
        if trained.vocab_size < vocab_size:
            logger.warning("the text holds pairs for %d entries, not %d", trained.vocab_size, vocab_size)
        return trained

    def save(self, path: Path | str) -> None:
        """Write the tokenizer.json and wait until it is on the disk."""
        with Path(path).open("wb") as file:
            file.write(self.content)
            file.flush()
            os.fsync(file.fileno())

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; a literal ``<|endoftext|>`` is ordinary text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encode many texts on all cores; one uint32 array each, equal to :meth:`encode`.

        The library's record of an encoding takes about 130 bytes per character, so long texts go through in
        pieces, cut where no token can span the cut.
        """
        encoded: list[list[TokenIds]] = [[] for _ in texts]
        pieces = ((row, piece) for row, text in enumerate(texts) for piece in self._cut(text))
        for group in _groups(pieces):
            try:
                encodings = self._tokenizer.encode_batch_fast([p for _, p in group], add_special_tokens=False)
            except TypeError:
                raise DataError("text holds a lone surrogate, which UTF-8 cannot express") from None
            for (row, _), encoding in zip(group, encodings, strict=True):
                encoded[row].append(np.array(encoding.ids, dtype=np.uint32))
        return [np.concatenate(pieces) if pieces else np.empty(0, np.uint32) for pieces in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are no UTF-8 become U+FFFD, the end of text is spelt out."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """Return a decoder for ids that come one by one."""
        return StreamDecoder(self)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes one token stands for; they need not be whole characters."""
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._bytes_by_id[token]

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            spelled = index in added or not all(symbol in _BYTE_OF_SYMBOL for symbol in token)
            table[index] = token.encode() if spelled else bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
        return table


class StreamDecoder:
    """Decodes ids one by one, holding bytes back until their character is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the characters that ``token`` completes, often none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return what is held back as U+FFFD; the decoder may then be used afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _parse(content: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 at byte {error.start}; a tokenizer.json is expected") from None
    except Exception as error:  # the library raises plain Exception for every fault in the file
        raise DataError(f"{source}: not a tokenizer.json: {' '.join(str(error).split())}") from None
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        raise DataError(f"{source}: the model is {type(model).__name__}; a byte-level BPE is needed")
    if model.unk_token is not None:
        raise DataError(f"{source}: has the unknown token {model.unk_token!r}; a byte-level BPE needs none")
    if model.dropout:
        raise DataError(f"{source}: dropout={model.dropout} makes encoding random; set it to null")
    id_counts = Counter(tokenizer.get_vocab(with_added_tokens=True).values()).most_common(1)
    if id_counts and id_counts[0][1] > 1:
        raise DataError(f"{source}: several tokens have the id {id_counts[0][0]}")
    missing = sorted(_BYTE_OF_SYMBOL.keys() - tokenizer.get_vocab(with_added_tokens=False).keys())
    if missing:
        raise DataError(f"{source}: no token for {len(missing)} of the 256 bytes; a byte-level BPE is needed")
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(f"{source}: no {END_OF_TEXT} token, which must close every document")
    # A file may ask for truncation, padding or markers, which would change documents behind our back.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if tokenizer.token_to_id(END_OF_TEXT) in tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids:
        raise DataError(f"{source}: a text can spell {END_OF_TEXT}; mark it special in added_tokens")
    return tokenizer


def _splits_words(tokenizer: tokenizers.Tokenizer) -> bool:
    """Say whether words are split before tokens are formed, as ``_SAFE_CUT`` supposes; GPT-like ones do."""
    spans = (
        [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str("ab cd\nef")]
        if tokenizer.pre_tokenizer
        else []
    )
    return {2, 6} <= {start for start, _ in spans}


def _cut(text: str) -> Iterator[str]:
    """Cut a text into pieces of some 64 K characters whose tokens are together the tokens of the whole."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def _whole(text: str) -> Iterator[str]:
    if text:
        yield text


def _groups(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[1])
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _byte_symbols() -> dict[str, int]:
    """Return the byte behind each of GPT-2's 256 symbols: printable bytes are themselves, others move up."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_symbols()
