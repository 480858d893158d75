"""Damage to a checkpoint directory, as disks, copies and people inflict it.

    python -m tests.faults.corruption --cases 10000

damages checkpoints at random and counts how many are refused by the name of the damaged file.
"""

import random
from pathlib import Path

KINDS = ("truncate", "flip", "zero page", "swap", "remove", "append", "foreign")
_PAGE = 4096


def damage(directory: Path, kind: str, generator: random.Random) -> set[str]:
    """Damage one file of ``directory`` (two for "swap"); return the names an honest refusal may give."""
    names = sorted(p.name for p in directory.iterdir())
    file = directory / generator.choice(names)
    raw = bytearray(file.read_bytes())
    if kind == "truncate":
        file.write_bytes(raw[: generator.randrange(len(raw))])
    elif kind == "flip":
        raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        file.write_bytes(raw)
    elif kind == "zero page":
        start = generator.randrange(0, len(raw), _PAGE)
        page = raw[start : start + _PAGE]
        if not any(page):  # already zero: zeroing it would change nothing
            return damage(directory, kind, generator)
        raw[start : start + _PAGE] = bytes(len(page))
        file.write_bytes(raw)
    elif kind == "swap":
        other = directory / generator.choice([name for name in names if name != file.name])
        if raw == other.read_bytes():
            return damage(directory, kind, generator)
        file.write_bytes(other.read_bytes())
        other.write_bytes(raw)
        # A foreign manifest condemns the directory before its files are looked at.
        return {"manifest.json"} if "manifest.json" in (file.name, other.name) else {file.name, other.name}
    elif kind == "remove":
        file.unlink()
    elif kind == "append":
        file.write_bytes(raw + generator.randbytes(generator.randrange(1, 100)))
    elif kind == "foreign":
        name = generator.choice(["model.pt", "pytorch_model.bin", "optimizer.pkl", "extra.safetensors"])
        (directory / name).write_bytes(b"anything")
        return {name}
    return {file.name}
