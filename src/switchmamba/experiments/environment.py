"""What a measurement was made on, in one line each: hardware, software, text."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from switchmamba.data.shards import TokenShards


def hardware() -> str:
    """Name the processor, how many cores this process may use, the memory, and the GPUs."""
    import torch

    cores = available_cores()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{_processor()}, {cores} core{'s' if cores > 1 else ''}, {memory:.0f} GiB memory"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    return "; ".join(parts)


def software() -> str:
    """Name the versions that numbers depend on."""
    from switchmamba import __version__

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba", "numpy"))
    return f"switchmamba {__version__}, Python {platform.python_version()}, {packages}"


def corpus(data: Path) -> str:
    """Say how much text a prepared directory holds; DataError if it cannot be read."""
    train, held_out = TokenShards.open(data, "train"), TokenShards.open(data, "validation")
    size = (train.num_bytes + held_out.num_bytes) / 1e6
    return (
        f"{size:,.1f} MB of text in {train.num_documents + held_out.num_documents:,} documents: "
        f"{train.num_tokens:,} tokens for training and {held_out.num_tokens:,} held out "
        f"(vocabulary {train.vocab_size:,})."
    )


def corpus_sha256(data: Path) -> str:
    """Return a hash of a prepared directory: its tokenizer, and its documents in their order and shards."""
    splits = [TokenShards.open(data, split) for split in ("train", "validation")]
    hashes = [splits[0].tokenizer_sha256, *(split.sha256 for split in splits)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        names[0] if names and names[0] not in ("", "unknown") else platform.processor() or platform.machine()
    )
