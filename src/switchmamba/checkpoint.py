"""Verified directories: written whole or not at all, checked byte for byte before use.

A checkpoint ``X`` is written as ``X.tmp-<id>/``: files, fsync, ``manifest.json`` last (size and sha256 of
each file, and a sha256 of itself), fsync, rename to ``X``, fsync of the parent. So a directory named
``X`` is complete whenever the process was killed, and nothing is ever overwritten. A reader verifies
every byte first: safetensors itself notices neither a flipped bit nor a zeroed page. Only JSON and
safetensors are read; formats that can execute code are refused by name.

This module is a leaf: it knows nothing of models or training, and imports torch only to read tensors.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from safetensors import SafetensorError

from switchmamba.errors import CheckpointError, SwitchMambaError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("switchmamba")

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
UNSAFE_SUFFIXES = frozenset(
    {
        ".bin",
        ".ckpt",
        ".dill",
        ".dll",
        ".joblib",
        ".npy",
        ".npz",
        ".pickle",
        ".pkl",
        ".pt",
        ".pth",
        ".py",
        ".so",
    }
)
"""Kinds of files that may carry code or pickled objects; a directory that holds one is refused unopened."""

ALIGNMENT = 64
"""Bytes at whose multiples torch puts tensors: a cache line."""

_MANIFEST_LIMIT = 16 * 2**20
_HEADER_LIMIT = 16 * 2**20
_BLANK = "0" * 64
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP_NAME = re.compile(r"step-(\d{1,15})")
_PARTIAL_NAME = re.compile(r"(.+)\.tmp-\d+-[0-9a-f]{8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

Content = bytes | Callable[[Path], None]
"""A file's bytes, or a function that writes the file at the path it is given."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a verified directory holds: its files by name, and the fields that its writer added."""

    files: Mapping[str, FileRecord]
    extra: Mapping[str, Any]


# Writing


def write_directory(path: Path, files: Mapping[str, Content], manifest_extra: Mapping[str, Any]) -> Manifest:
    """Write ``files`` as the new verified directory ``path``, atomically.

    Args:
        path: must not exist; missing parents are made.
        files: plain file names to contents.
        manifest_extra: JSON values kept in the manifest.

    Raises:
        CheckpointError: ``path`` exists already.
        SwitchMambaError: the disk is full or cannot be written; nothing is left behind.
    """
    with new_directory(path) as partial:
        for name in files:
            _check_name(path, name)
        records = {name: _write_file(partial / name, content) for name, content in files.items()}
        _write_file(partial / MANIFEST, _encode_manifest(Manifest(records, dict(manifest_extra))))
    return Manifest(records, dict(manifest_extra))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a partial directory that becomes ``path`` when the block ends, and is removed if the block raises.

    Raises:
        CheckpointError: ``path`` exists already.
        SwitchMambaError: the disk is full or cannot be written; nothing is left behind.
    """
    if os.path.lexists(path):
        raise CheckpointError(
            f"{path} exists already; checkpoints are never overwritten: choose another name"
        )
    partial = partial_path(path)
    try:
        remove_partial_directories(path.parent, path.name)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        partial.rename(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise SwitchMambaError(
            f"{path}: cannot be written ({reason}); earlier checkpoints are intact: free space and try again"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Remove a verified directory; a reader sees it whole or not at all."""
    partial = partial_path(path)
    path.rename(partial)
    shutil.rmtree(partial)


def remove_partial_directories(parent: Path, name: str | None = None) -> None:
    """Remove what killed writers of ``name`` (None: of anything) left in ``parent``.

    The caller must be the only writer there.
    """
    for child in list(parent.iterdir()) if parent.is_dir() else []:
        match = _PARTIAL_NAME.fullmatch(child.name)
        if match and name in (None, match[1]):
            logger.warning("removing %s, left by an interrupted write", child)
            shutil.rmtree(child)


def partial_path(path: Path) -> Path:
    """Return the name of a directory that is to become ``path``; as it is, it counts as left by a killed writer."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _write_file(path: Path, content: Content) -> FileRecord:
    if callable(content):
        path.touch()  # with the user's mode, which the file keeps though safetensors puts a private one in its place
        mode = stat.S_IMODE(path.stat().st_mode)
        content(path)
        path.chmod(mode)
    else:
        path.write_bytes(content)
    _fsync(path)
    return _record(path)


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode_manifest(manifest: Manifest) -> bytes:
    # The checksum covers every byte of the manifest, itself blanked; it stands first: the first blank is it.
    text = json.dumps(
        {
            "manifest_sha256": _BLANK,
            "format_version": FORMAT_VERSION,
            "files": {name: vars(record) for name, record in manifest.files.items()},
            "extra": manifest.extra,
        },
        indent=2,
    )
    return text.replace(_BLANK, hashlib.sha256(text.encode()).hexdigest(), 1).encode()


# Verifying


def verify_directory(path: Path) -> Manifest:
    """Check every file of the directory ``path`` against its manifest, opening nothing else; return that.

    Raises:
        CheckpointError: naming the file that is missing, damaged, unlisted or of an unsafe kind.
    """
    if path.is_file():
        raise CheckpointError(f"{path}: {_foreign_file(path)}")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in UNSAFE_SUFFIXES:
                raise CheckpointError(f"{file}: {_foreign_file(file)}")
        manifest = _read_manifest(path / MANIFEST)
        for name, record in manifest.files.items():
            _verify_file(path / name, record)
        for file in sorted(path.iterdir()):
            if file.suffix in {".safetensors", ".json", ".jinja"} and file.name not in {
                *manifest.files,
                MANIFEST,
            }:
                raise CheckpointError(f"{file}: not listed in {MANIFEST}; remove it")
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
    return manifest


def newest_valid(path: Path) -> Path:
    """Return the newest checkpoint that verifies: of a RUN, of a ``checkpoints/`` directory, or ``path``.

    A damaged step is refused with a warning that names the file, and the one before it is tried. A directory
    that was asked for by its own name is never replaced by another.

    Raises:
        CheckpointError: no checkpoint there, or none that verifies.
    """
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = step_directories(directory)
    if not steps and directory == path:
        if (path / "metrics.jsonl").is_file():
            raise CheckpointError(f"{path}: no checkpoint yet")
        if path.is_dir() and not _looks_like_a_checkpoint(path):
            raise CheckpointError(
                f"{path}: neither a run nor a checkpoint: checkpoints/ and {MANIFEST} are missing; "
                "name what `switchmamba train --out` wrote"
            )
        verify_directory(path)
        return path
    for step in reversed(steps):
        try:
            verify_directory(step)
        except CheckpointError as error:
            logger.warning("refused a damaged checkpoint: %s; trying the one before it", error)
        else:
            return step
    if steps:
        raise CheckpointError(
            f"{directory}: all {len(steps)} checkpoints are damaged; restore one from a copy"
        )
    raise CheckpointError(f"{directory}: no checkpoint yet")


def step_directories(directory: Path) -> list[Path]:
    """Return the ``step-N`` directories in ``directory``, oldest first, unverified."""
    if not directory.is_dir():
        return []
    found = [child for child in directory.iterdir() if _STEP_NAME.fullmatch(child.name) and child.is_dir()]
    return sorted(found, key=step_number)


def _looks_like_a_checkpoint(path: Path) -> bool:
    """Say whether a directory is worth verifying: as a checkpoint, or one of another program, which is refused."""
    try:
        children = list(path.iterdir())
    except OSError:
        return True  # verifying says why
    return any(child.name == MANIFEST or child.suffix.lower() in UNSAFE_SUFFIXES for child in children)


def saved_step(path: Path) -> int | None:
    """Return the step that the verified directory ``path`` was saved after; None if it is not a training run's."""
    step = read_json(path / MANIFEST).get("extra", {}).get("step")
    return step if isinstance(step, int) else None


def step_number(path: Path) -> int:
    """Return N of ``step-N``."""
    match = _STEP_NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _check_name(path: Path, name: str) -> None:
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(f"{path}: {name!r} is not a plain file name; refused")
    if Path(name).suffix.lower() in UNSAFE_SUFFIXES:
        raise CheckpointError(f"{path / name}: {_foreign_file(Path(name))}")


def _foreign_file(path: Path) -> str:
    if path.suffix.lower() in UNSAFE_SUFFIXES:
        return (
            f"{path.suffix} files can execute code and are never opened; checkpoints are safetensors and JSON"
        )
    return "is a file; a checkpoint is a directory (a run, or its checkpoints/step-N)"


def _verify_file(path: Path, record: FileRecord) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(f"{path}: not a regular file; refused")
    if not path.exists():
        raise CheckpointError(f"{path}: missing, although {MANIFEST} lists it")
    if path.stat().st_size != record.size:
        raise CheckpointError(f"{path}: damaged: {path.stat().st_size} bytes instead of {record.size}")
    if _record(path) != record:
        raise CheckpointError(f"{path}: damaged: its sha256 differs from {MANIFEST}")


def _read_manifest(path: Path) -> Manifest:
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: missing; {path.parent} is no complete checkpoint")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise CheckpointError(f"{path}: larger than {_MANIFEST_LIMIT} bytes; refused")
    raw = path.read_bytes()
    fields = _parse_object(path, raw)
    checksum = fields.get("manifest_sha256")
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise CheckpointError(f"{path}: damaged or foreign: it has no manifest_sha256")
    if hashlib.sha256(raw.replace(checksum.encode(), _BLANK.encode(), 1)).hexdigest() != checksum:
        raise CheckpointError(f"{path}: damaged: its sha256 differs from manifest_sha256")
    if fields.get("format_version") != FORMAT_VERSION:
        version = fields.get("format_version")
        raise CheckpointError(
            f"{path}: format_version {version!r} is unknown; this program reads {FORMAT_VERSION}"
        )
    files, extra = fields.get("files"), fields.get("extra")
    if not isinstance(files, dict) or not isinstance(extra, dict):
        raise CheckpointError(f"{path}: files and extra must be objects")
    for name in files:
        _check_name(path.parent, name)
    return Manifest({name: _parse_record(path, name, value) for name, value in files.items()}, extra)


def _parse_record(path: Path, name: str, value: Any) -> FileRecord:
    if (
        not isinstance(value, dict)
        or type(value.get("size")) is not int
        or not isinstance(value.get("sha256"), str)
    ):
        raise CheckpointError(f"{path}: the entry of {name} has no size and sha256")
    return FileRecord(value["size"], value["sha256"])


# Reading files of a verified directory


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, refusing duplicate keys."""
    try:
        return _parse_object(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file into CPU tensors by name; header checked first, NaN and infinity refused.

    Raises:
        CheckpointError: naming the file and, where it is at fault, the tensor.
    """
    check_tensor_file(path)

    import torch
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; refused")
    return {name: aligned(tensor) for name, tensor in tensors.items()}


def aligned(tensor: "Tensor") -> "Tensor":
    """Return a CPU tensor whose values begin at a multiple of 64 bytes, as all that torch allocates; copied if need be.

    A file is mapped into memory as it lies. At another alignment MKL's products round differently on AMD's
    processors, so a loaded model would not repeat the saved one's bits; and vectors across cache lines read slower.
    """
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def check_tensor_file(path: Path) -> None:
    """Check a safetensors file's header without reading its data: size, keys, types, shapes, offsets.

    Duplicate names, headers over 16 MiB, gaps and overlaps are refused.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: {_foreign_file(path)}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(
                    f"{path}: header of {length} bytes; at most {min(size - 8, _HEADER_LIMIT)} fit"
                )
            header = _parse_object(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    spans = [_check_tensor(path, name, entry) for name, entry in header.items() if name != "__metadata__"]
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: header describes {end} bytes of data, the file has {size - 8 - length}"
        )


def _check_tensor(path: Path, name: str, entry: Any) -> tuple[int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in _DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name}: shape or data_offsets are not lists of sizes")
    count = 1
    for dimension in shape:
        count *= dimension
    if offsets[1] - offsets[0] != count * _DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name}: its shape {shape} does not fill its data_offsets {offsets}"
        )
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name in _duplicates(key for key, _ in pairs):
            raise CheckpointError(f"{path}: duplicate key {name!r}; refused")
        return dict(pairs)

    try:
        value = json.loads(raw, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _duplicates(names: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield name
        seen.add(name)
