"""Damage to a checkpoint directory, as disks, copies and people inflict it.

    python -m tests.faults.corruption --cases 10000

damages checkpoints at random and counts how many are refused by the name of the damaged file.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from switchmamba.checkpoint import newest_valid, verify_directory, write_directory
from switchmamba.errors import CheckpointError

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


def try_cases(directory: Path, cases: int, seed: int) -> Counter[str]:
    """Damage copies of a checkpoint and count the refusals by kind; fails at the first case that is not refused."""
    generator = random.Random(seed)
    run = directory / "run" / "checkpoints"
    for step in (1, 2):
        files = {
            "config.json": b'{"model": {}}',
            "tokenizer.json": generator.randbytes(3000).hex().encode(),
            "model.safetensors": generator.randbytes(20_000) + bytes(10_000),
            "optimizer.safetensors": generator.randbytes(40_000),
            "training.json": b'{"step": %d}' % step,
        }
        write_directory(run / f"step-{step}", files, {"step": step})
    pristine = directory / "pristine"
    shutil.copytree(run / "step-2", pristine)
    refused: Counter[str] = Counter()
    for _ in range(cases):
        kind = generator.choice(KINDS)
        shutil.rmtree(run / "step-2")
        shutil.copytree(pristine, run / "step-2")
        names = damage(run / "step-2", kind, generator)
        try:
            verify_directory(run / "step-2")
        except CheckpointError as error:
            assert any(str(run / "step-2" / name) in str(error) for name in names), f"{kind}: {error}"
        else:
            raise AssertionError(f"{kind} of {names} went unnoticed")
        assert newest_valid(directory / "run") == run / "step-1"
        refused[kind] += 1
    return refused


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        refused = try_cases(Path(directory), arguments.cases, arguments.seed)
    for kind, count in sorted(refused.items()):
        sys.stdout.write(f"{kind}: {count} refused by name\n")
    sys.stdout.write(f"{refused.total()} of {arguments.cases} refused, each with the step before it used\n")


if __name__ == "__main__":
    main()
