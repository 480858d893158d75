"""A run that takes a second: a tiny MoE-Mamba on a few kilobytes of text."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from switchmamba.checkpoint import step_directories
from switchmamba.config import Tables, apply_overrides, validate
from switchmamba.data.prepare import prepare
from switchmamba.training.config import RunConfig

TIMINGS = frozenset({"tokens_per_second", "mfu", "peak_memory"})
"""What differs between two equal runs."""

TABLES: Tables = {
    "model": {
        "vocab_size": 1,
        "d_model": 16,
        "num_blocks": 2,
        "pattern": ["mamba", "moe"],
        "layers": {
            "mamba": {"kind": "mamba", "d_state": 4},
            "moe": {
                "kind": "moe",
                "num_experts": 4,
                "d_expert": 16,
                "activation": "relu",
                "capacity_factor": 1.25,
                "router": {"kind": "top_k", "top_k": 1},
            },
        },
    },
    "data": {"context_length": 16, "reset_state": True},
    "training": {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 3,
        "validate_every": 5,
        "validation_batches": 2,
        "checkpoint_every": 3,
        "keep_checkpoints": 2,
        "device": "cpu",
    },
}


def tiny_tables(*overrides: tuple[str, Any]) -> Tables:
    """Return the run's tables with dotted names set."""
    return apply_overrides(TABLES, overrides)


def tiny_config(*overrides: tuple[str, Any]) -> RunConfig:
    """Return the run's configuration with dotted names set."""
    return validate(RunConfig, tiny_tables(*overrides), source="tiny")


def prepare_tiny_data(directory: Path, text: str = "the cat sat on the mat; ") -> Path:
    """Write shards of forty short documents under ``directory``."""
    texts = directory / "texts"
    texts.mkdir(parents=True)
    for i in range(40):
        (texts / f"{i:02}.txt").write_text(f"{i}: {text * (1 + i % 4)}\n")
    prepare([texts], "bpe:280", directory / "data", validation_fraction=0.2)
    return directory / "data"


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_timings(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without what no two runs share."""
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_run(run: Path, reference: Path, skipped: Collection[str] = ()) -> None:
    """Assert that two finished runs agree bit for bit in everything but timings and the ``skipped`` files."""
    assert without_timings(read_lines(run)) == without_timings(read_lines(reference))
    last = step_directories(reference / "checkpoints")[-1].name
    names = {path.name for path in (reference / "checkpoints" / last).iterdir()}
    for name in names - {"manifest.json", *skipped}:
        ours, theirs = (path / "checkpoints" / last / name for path in (run, reference))
        assert ours.read_bytes() == theirs.read_bytes(), name
