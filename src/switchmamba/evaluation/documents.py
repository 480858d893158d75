"""The documents that a model is evaluated on: raw text, or a split of a prepared directory. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from switchmamba.data.corpus import Corpus
from switchmamba.data.index import INDEX_FILE
from switchmamba.data.shards import TokenShards
from switchmamba.data.split import Split
from switchmamba.data.tokenizer import Tokenizer
from switchmamba.errors import DataError

TokenIds = npt.NDArray[np.unsignedinteger[Any]]


class TokenisedDocument(NamedTuple):
    """A document.

    Attributes:
        ids: of its tokens, the end of text at last.
        mask: for each of them 0 or 1, uint8: does it count as a target; None: all do.
    """

    ids: TokenIds
    mask: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class PreparedDocuments:
    """A split of a directory that ``switchmamba data prepare`` wrote."""

    shards: TokenShards

    @property
    def num_tokens(self) -> int | None:
        """Tokens of all documents, each one's end of text included."""
        return self.shards.num_tokens

    @property
    def masked(self) -> bool:
        """Say whether documents come with masks."""
        return self.shards.masked

    def tokenised(self, tokenizer: Tokenizer) -> Iterator[TokenisedDocument]:
        """Iterate over the documents, each closed by the end of text; files are checked first.

        Raises DataError for damaged files, and for tokens of another tokenizer.
        """
        if self.shards.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{self.shards.directory}: prepared with another tokenizer than the checkpoint's; "
                f"prepare it with the checkpoint's tokenizer.json, or evaluate on the raw text"
            )
        self.shards.verify()
        return (
            TokenisedDocument(self.shards.document(i), self.shards.mask(i))
            for i in range(self.shards.num_documents)
        )


@dataclass(frozen=True)
class RawDocuments:
    """Text files."""

    corpus: Corpus

    @property
    def num_tokens(self) -> int | None:
        """Unknown before the text is read."""
        return None

    @property
    def masked(self) -> bool:
        """Text has no masks."""
        return False

    def tokenised(self, tokenizer: Tokenizer) -> Iterator[TokenisedDocument]:
        """Iterate over the documents, each closed by the end of text; DataError names what cannot be read."""
        closing = np.array([tokenizer.end_of_text_id], dtype=np.uint32)
        for document in self.corpus.documents():
            yield TokenisedDocument(np.concatenate([*tokenizer.encode_batch([document.text]), closing]))


Documents = PreparedDocuments | RawDocuments


def open_documents(source: str | Path, split: Split = "validation", field: str = "text") -> Documents:
    """Open ``source``: a prepared directory (its ``split``), or text files, directories and globs.

    ``field`` names the text's field in .jsonl records. DataError says why nothing can be read there.
    """
    if (Path(source) / INDEX_FILE).is_file():
        return PreparedDocuments(TokenShards.open(source, split))
    return RawDocuments(Corpus([source], field=field))
