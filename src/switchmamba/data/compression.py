"""Decompressed byte streams that notice truncation: .gz (RFC 1952), .xz, .zst (RFC 8878)."""

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

ByteStream = io.BufferedIOBase | BinaryIO

COMPRESSIONS = (".gz", ".xz", ".zst")
"""Suffixes of the compressions that :func:`decompressed` reads."""

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged or truncated file raises."""

# A zstandard block of 4 bytes can stand for 128 KiB: feeding 1 KiB at a time bounds what a call yields to 32 MiB.
_ZSTD_INPUT_BYTES = 1024


def decompressed(file: BinaryIO, name: Path) -> ByteStream:
    """Return ``file`` decompressed as the suffix of ``name`` says; reading may raise ``READ_ERRORS``."""
    match name.suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            return io.BufferedReader(_ZstdStream(file), buffer_size=2**17)
        case _:
            return file


class _ZstdStream(io.RawIOBase):
    """Frames of zstandard, one after another; the library's own reader takes a truncated one for the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """Say that this stream can be read."""
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Fill ``buffer`` with decompressed bytes; 0 at the end, EOFError where a frame breaks off."""
        while not self._text:
            if not self._compressed:
                self._compressed = self._file.read(_ZSTD_INPUT_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count
