"""Documents from text files, one at a time, and exact complaints about those that cannot be used.

A .txt file is one document; a line of a .jsonl file is one, in a field that can be chosen. Both may be
compressed (.gz, .xz, .zst). Directories are read whole, in sorted order, hidden files left out; globs may
contain ``**``. Memory is bounded by one record.
"""

import glob
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchmamba.config import nearest
from switchmamba.data.chat import ChatTemplate, Segment, odd_turn, read_messages
from switchmamba.data.compression import COMPRESSIONS, READ_ERRORS, ByteStream, decompressed
from switchmamba.data.defaults import MAX_RECORD_BYTES
from switchmamba.errors import ConfigError, DataError

_SKIP_BYTES = 2**20
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: never empty, always expressible in UTF-8.
        num_bytes: length of the text in UTF-8.
        place: ``path`` or ``path, line n``, for messages.
        bytes_read: bytes on disk, compressed, that were read up to here over all files.
        segments: of a conversation its parts; ``text`` is then all of it without ends of text.
    """

    text: str
    num_bytes: int
    place: str
    bytes_read: int
    segments: tuple[Segment, ...] | None = None


class Corpus:
    """The documents of some files.

    Args:
        inputs: files, directories and globs. A file that several of them name is read once.
        field: which field of a .jsonl record holds the text.
        max_record_bytes: the largest .txt file (decompressed) or .jsonl line accepted.
        text_suffixes: further suffixes, such as ``.md``, to be read like .txt.
        chat_template: records of .jsonl files are conversations; other files are then of no known kind.

    Attributes:
        files: size on disk by path, in the order of reading.
        num_bytes: sum of the sizes.
        ignored: how many files in directories are of no known kind, by suffix; hidden ones are not counted.

    Raises:
        ConfigError: a suffix lacks its dot.
        DataError: an input does not exist, is of an unknown kind, or matches nothing.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        field: str = "text",
        max_record_bytes: int = MAX_RECORD_BYTES,
        text_suffixes: Sequence[str] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        undotted = [suffix for suffix in text_suffixes if not suffix.startswith(".")]
        if undotted:
            raise ConfigError(f"--text-suffix {undotted[0]} must begin with a dot: .{undotted[0]}")
        self._field = field
        self._max_record_bytes = max_record_bytes
        self._chat_template = chat_template
        self._text_suffixes = (".txt", *text_suffixes) if chat_template is None else ()
        self.ignored: Counter[str] = Counter()
        self.files = {path: path.stat().st_size for name in inputs for path in self._resolve(name)}
        self.num_bytes = sum(self.files.values())

    def documents(
        self, skip: Callable[[DataError], None] | None = None, bytes_before: int = 0
    ) -> Iterator[Document]:
        """Iterate over all documents; what cannot be used is raised, or handed to ``skip`` and left out.

        ``bytes_before`` is added to every ``bytes_read``.
        """
        for path, size in self.files.items():
            yield from self.file_documents(path, skip, bytes_before)
            bytes_before += size

    def file_documents(
        self, path: Path, skip: Callable[[DataError], None] | None = None, bytes_before: int = 0
    ) -> Iterator[Document]:
        """Iterate over the documents of one of ``files``, as :meth:`documents` does."""
        for record in self._records(path, bytes_before):
            if isinstance(record, Document):
                yield record
            elif skip is None:
                raise record
            else:
                skip(record)

    def _records(self, path: Path, bytes_before: int) -> Iterator[Document | DataError]:
        is_jsonl = _suffix(path) == ".jsonl"
        empty = True
        try:
            with _reading(str(path)), path.open("rb") as file:
                stream = decompressed(file, path)
                for raw in self._lines(stream, path) if is_jsonl else self._whole(stream, path):
                    empty = False
                    try:
                        document = self._document(raw, is_jsonl, bytes_before + file.tell())
                    except DataError as error:
                        yield error
                    else:
                        yield document
        except DataError as error:
            yield error
        else:
            if empty:
                yield DataError(f"{path}: empty, holds no document")

    def _whole(self, stream: ByteStream, path: Path) -> Iterator["_Record"]:
        content = stream.read(self._max_record_bytes + 1)
        if content:
            yield _Record(str(path), 0, content)

    def _lines(self, stream: ByteStream, path: Path) -> Iterator["_Record"]:
        start = 0
        for number in itertools.count(1):
            place = f"{path}, line {number}"
            with _reading(place):
                line = stream.readline(self._max_record_bytes + 1)
                end = start + len(line)
                rest = line
                while len(line) > self._max_record_bytes and not rest.endswith(b"\n") and rest:
                    rest = stream.readline(_SKIP_BYTES)
                    end += len(rest)
            if not line:
                return
            if not line.isspace():
                yield _Record(place, start, line.removesuffix(b"\n"))
            start = end

    def _document(self, record: "_Record", is_jsonl: bool, bytes_read: int) -> Document:
        place, content = record.place, record.content
        if len(content) > self._max_record_bytes:
            raise DataError(f"{place}: over the limit of {self._max_record_bytes} bytes (max-record-bytes)")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 at byte {record.start + error.start}") from None
        if record.start == 0:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        segments = None
        if self._chat_template is not None:
            segments = _conversation(_object(text, "the field 'messages'", place), self._chat_template, place)
            text = "".join(segment.text for segment in segments)
        elif is_jsonl:
            text = _field(_object(text, f"a field {self._field!r}", place), self._field, place)
        if not text:
            raise DataError(f"{place}: empty document")
        try:
            return Document(text, len(text.encode()), place, bytes_read, segments)
        except UnicodeEncodeError:
            raise DataError(f"{place}: holds a lone surrogate, which UTF-8 cannot express") from None

    def _resolve(self, name: str | Path) -> list[Path]:
        path = Path(name)
        if path.is_file():
            self._require_known(path)
            return [path]
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
            found = [file for file in files if self._is_known(file)]
            if not found:
                raise DataError(f"{path}: no file here is {self._known_kinds()}; see --text-suffix")
            self.ignored.update(_suffix(file) for file in files if not self._is_known(file))
            return found
        # Path.glob refuses absolute patterns.
        matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]  # noqa: PTH207
        if not matches:
            raise DataError(f"{name}: no such file, directory or glob match")
        return [file for match in matches for file in self._resolve(match)]

    def _is_known(self, path: Path) -> bool:
        return _suffix(path) in (".jsonl", *self._text_suffixes) and path.is_file()

    def _require_known(self, path: Path) -> None:
        if not self._is_known(path):
            raise DataError(
                f"{path}: unknown kind of file; known are {self._known_kinds()}; see --text-suffix"
            )

    def _known_kinds(self) -> str:
        return f"{', '.join((*self._text_suffixes, '.jsonl'))}, bare or with {', '.join(COMPRESSIONS)}"


@dataclass(frozen=True)
class _Record:
    """Raw bytes of a document or of the JSON around it, and where in the decompressed file they start.

    A record over the limit comes cut off one byte beyond it.
    """

    place: str
    start: int
    content: bytes


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{place}: cannot be read: {reason}") from None


def _conversation(record: dict[str, Any], template: ChatTemplate, place: str) -> tuple[Segment, ...]:
    messages = read_messages(record, place)
    try:
        return tuple(template.segments(messages))
    except DataError as error:
        odd = odd_turn(messages)
        raise DataError(f"{place}: {error}{f'; {odd}' if odd else ''}") from None


def _object(line: str, expected: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: invalid JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets a thousand deep
        raise DataError(f"{place}: JSON beyond the parser's limits") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: holds a JSON {type(record).__name__}, not an object with {expected}")
    return record


def _field(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise DataError(f"{place}: no field {field!r}{nearest(field, sorted(record))}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} is {type(text).__name__}, not a string")
    return text


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
