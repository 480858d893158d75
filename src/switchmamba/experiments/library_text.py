"""Real text that is on every machine with Python: the standard library's sources and the reference of ``help()``.

One document is one module or one topic of ``pydoc_data``. What is left out: tests, tables in the shape of
code, and packages that newer versions of Python no longer have. The order and the division into training
and held-out documents depend on names alone.
"""

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from switchmamba.data.prepare import PreparedSummary, Progress, prepare
from switchmamba.data.shard_writer import require_new
from switchmamba.errors import DataError

VOCABULARY = 4096
"""Entries of the tokenizer that is trained on it."""

MAX_BYTES = 8_000_000
"""More would only lengthen the tokenising."""

HELD_OUT_SHARE = 0.04
"""Share of the bytes that is held out, as whole documents."""

_LEFT_OUT = frozenset(
    {
        "__pycache__",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "distutils",
        "turtledemo",
        "ensurepip",
        "encodings",  # tables
        "pydoc_data",  # read as text, below
    }
)


@dataclass(frozen=True)
class LibraryText:
    """What was written.

    Attributes:
        train, validation: the two .jsonl files, with the fields ``name`` and ``text``.
        documents: number of documents in both.
        num_bytes: of their text.
    """

    train: Path
    validation: Path
    documents: int
    num_bytes: int


def prepare_library_text(
    text: Path, out: Path, progress: Callable[[Progress], None] | None = None
) -> PreparedSummary:
    """Write the text into ``text``, and ``out`` from it as :func:`switchmamba.data.prepare.prepare` does."""
    require_new(out)
    written = write_library_text(text)
    return prepare(
        [written.train],
        f"bpe:{VOCABULARY}",
        out,
        validation_inputs=[written.validation],
        progress=progress,
    )


def write_library_text(directory: Path, max_bytes: int = MAX_BYTES) -> LibraryText:
    """Write the two files into ``directory``; DataError if this Python comes without sources."""
    documents = library_documents(max_bytes)
    if sum(len(text) for _, text in documents) < 100_000:
        place = sysconfig.get_path("stdlib")
        raise DataError(
            f"{place}: this Python has no sources of its standard library; use an installation that has them"
        )
    held_out = _held_out(documents)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {split: directory / f"{split}.jsonl" for split in ("train", "validation")}
    for split, path in paths.items():
        chosen = [d for d in documents if (d[0] in held_out) == (split == "validation")]
        lines = (json.dumps({"name": name, "text": text}, ensure_ascii=False) for name, text in chosen)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    num_bytes = sum(len(text.encode()) for _, text in documents)
    return LibraryText(paths["train"], paths["validation"], len(documents), num_bytes)


def library_documents(max_bytes: int = MAX_BYTES) -> list[tuple[str, str]]:
    """Return (name, text) of each document in a fixed pseudo-random order, up to ``max_bytes`` of UTF-8."""
    chosen: list[tuple[str, str]] = []
    size = 0
    for name, text in sorted([*_modules(), *_topics()], key=lambda document: _rank(document[0])):
        size += len(text.encode())
        if size > max_bytes:
            break
        chosen.append((name, text))
    return chosen


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata") or name.parts[0].startswith(
            ("config-", "lib-dynload")
        )
        if generated or not _LEFT_OUT.isdisjoint(name.parts):
            continue
        with tokenize.open(path) as file:  # heeds the module's own declaration of its encoding
            text = file.read()
        if text.strip():
            yield name.as_posix(), text


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topic/{name}", text


def _held_out(documents: list[tuple[str, str]]) -> frozenset[str]:
    """Take the last documents of the order until they make up the share."""
    wanted = HELD_OUT_SHARE * sum(len(text) for _, text in documents)
    names: list[str] = []
    for name, text in reversed(documents):
        if wanted <= 0:
            break
        names.append(name)
        wanted -= len(text)
    return frozenset(names)


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
