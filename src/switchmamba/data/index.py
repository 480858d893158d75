"""``index.json``: what a directory of token shards holds, and how it was made.

The index bears a sha256 of itself beside those of its files, so a flipped bit in either is noticed. Files are
plain little-endian arrays: tokens as uint16 or uint32, document offsets as int64, masks as one byte a token.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from switchmamba.config import Config
from switchmamba.data.split import Split
from switchmamba.errors import DataError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT: Literal["switchmamba-tokens"] = "switchmamba-tokens"
VERSION: Literal[1] = 1

Dtype = Literal["uint16", "uint32"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class OffsetsRecord(Config):
    """A file of num_documents + 1 int64: where in the split each document starts, and where the last ends."""

    file: FileName
    sha256: Sha256


class MaskRecord(Config):
    """A file of as many bytes as its shard has tokens: 1 where the token counts as a target, else 0."""

    file: FileName
    sha256: Sha256


class ShardRecord(Config):
    """A file of token ids: whole documents, one after another, each closed by the end of text.

    Without a ``mask`` every token counts as a target.
    """

    file: FileName
    sha256: Sha256
    tokens: Positive
    documents: Positive
    text_bytes: Count
    mask: MaskRecord | None = None


class SplitRecord(Config):
    """A split: its shards and sums over them; ``text_bytes`` is UTF-8 without end-of-text tokens.

    ``targets`` is how many tokens count as targets where the shards have masks: then all of them have one.
    """

    tokens: Positive
    documents: Positive
    text_bytes: Count
    offsets: OffsetsRecord
    shards: tuple[ShardRecord, ...]
    targets: Positive | None = None

    @model_validator(mode="after")
    def _all_shards_are_masked_or_none(self) -> Self:
        if any((shard.mask is None) != (self.targets is None) for shard in self.shards):
            raise ValueError(
                "either every shard has a mask, and the split says how many targets count, or none"
            )
        return self


SplitBy = Literal["content", "tail", "input", "none"]


class SourceRecord(Config):
    """Where the text came from and how it was divided.

    ``split_by`` says how the validation documents were chosen: ``content`` by a hash of seed and text,
    ``tail`` the end of the text (when the hash left a split empty), ``input`` from files named for it,
    ``none`` not at all. ``chat_template_sha256`` is there where the documents are conversations.
    """

    inputs: tuple[str, ...]
    validation_inputs: tuple[str, ...]
    field: str
    text_suffixes: tuple[str, ...]
    max_record_bytes: Count
    validation_fraction: float
    seed: Count
    split_by: SplitBy
    skipped: Count
    chat_template_sha256: Sha256 | None = None


class SyntheticRecord(Config):
    """Which task made the documents, and how long its examples are in each split; see ``data/synthetic.py``."""

    task: str
    vocabulary: Positive
    length: dict[Split, Positive]
    answer_tokens: Positive
    seed: Count


class Index(Config):
    """The whole index."""

    format: Literal["switchmamba-tokens"] = FORMAT
    version: Literal[1] = VERSION
    dtype: Dtype
    vocab_size: Positive
    end_of_text_id: Count
    tokenizer_sha256: Sha256
    splits: dict[Split, SplitRecord]
    source: SourceRecord | SyntheticRecord

    @property
    def chat_template_sha256(self) -> str | None:
        """Of the template that made the documents; None where they are no conversations."""
        return self.source.chat_template_sha256 if isinstance(self.source, SourceRecord) else None


def token_dtype(vocab_size: int) -> Dtype:
    """Return the smaller of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def encode_index(index: Index) -> bytes:
    """Return the bytes of index.json."""
    body = index.model_dump(mode="json", exclude_none=True)  # no masks: as before there were any
    return (json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n").encode()


def read_index(directory: Path) -> Index:
    """Read and check ``directory/index.json``; :class:`DataError` says what is wrong with it."""
    path = directory / INDEX_FILE
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = f"no {INDEX_FILE}" if directory.is_dir() else "no such directory"
        raise DataError(f"{directory}: {what}; prepare it with `switchmamba data prepare`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: damaged, not JSON; prepare the data again") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(
            f"{path}: not an index of token shards; prepare the data with `switchmamba data prepare`"
        )
    if body.get("version") != VERSION:
        raise DataError(
            f"{path}: version {body.get('version')!r}, this release reads {VERSION}; prepare the data again"
        )
    if body.pop("sha256", None) != _digest(body):
        raise DataError(f"{path}: damaged, its sha256 does not match; prepare the data again")
    try:
        return Index.model_validate_json(json.dumps(body))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        field = ".".join(map(str, detail["loc"]))
        raise DataError(f"{path}: {field}: {detail['msg']}; prepare the data again") from None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
