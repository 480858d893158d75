"""Correctness on a GPU, then speed: operations, mixers, decoding, training, whole commands.

    python -m benchmarks.gpu_check                                    # everything, in about ten minutes
    python -m benchmarks.gpu_check --only checks,operations --workers 16
    python -m benchmarks.gpu_check --only training --preset mamba-25m --out runs/gpu.json

Parts: ``checks`` (every backend of every operation against the reference in fp64), ``models`` (against fp64 on the CPU,
step by step, training), ``cli`` (prepare, train, evaluate, generate), then ``operations``, ``mixers``, ``mamba2``,
``training`` and ``decode``, which are timed. What is wrong is not timed, unless ``--time-anyway`` asks for it to find
out why. Results go to a JSON file and a Markdown table beside it; what is not run keeps what the file holds of it.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: repeatable matrix products

import torch

from benchmarks.gpu_cases import Finding
from benchmarks.gpu_report import Row, as_dicts, show, write

PARTS = ("checks", "models", "cli", "operations", "mixers", "mamba2", "training", "decode")
RESULTS = Path(__file__).parent / "results" / "gpu.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile and check")
    parser.add_argument("--device", default="cuda", help="cpu tries the checks without a GPU")
    parser.add_argument("--operations", help="check only these, separated by commas")
    parser.add_argument("--preset", help="train only this one")
    parser.add_argument("--time-anyway", action="store_true", help="time although something is wrong")
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["environment"] = environment(device)
    print(results["environment"], flush=True)
    operations = options.operations.split(",") if options.operations else None
    right = check(parts, device, options.workers, operations, results, options.out)
    if not right and not options.time_anyway:
        sys.exit("something is wrong: nothing is timed")
    timed: dict[str, Callable[[], Sequence[Row]]] = {
        "operations": lambda: _module("operations").measure(device),
        "mixers": lambda: _module("operations").measure_mixers(device),
        "mamba2": lambda: _module("mamba2").measure(device),
        "training": lambda: train(device, options.preset, results),
        "decode": decode,
    }
    for part, measure in timed.items():
        if part in parts:
            new = as_dicts(measure())
            names = {row["what"] for row in new}
            kept = [row for row in results.get(f"rows {part}", ()) if row["what"] not in names]
            results[f"rows {part}"] = kept + new
            write(results, options.out)
    print(f"written: {options.out} and {options.out.with_suffix('.md')}")


def check(
    parts: Sequence[str],
    device: torch.device,
    workers: int,
    operations: Sequence[str] | None,
    results: dict[str, Any],
    out: Path,
) -> bool:
    """Run the parts that look for errors; what was checked in an earlier run into the same file counts too."""
    correctness = _module("correctness")
    if "checks" in parts:
        findings = correctness.check_operations(device, workers, operations)
        right = correctness.report_findings(findings)
        if operations is not None:
            kept = [f for f in results.get("checks", ()) if f["operation"] not in operations]
            right &= all(not f["problems"] and f["error"] <= f["allowed"] for f in kept)
            findings = [Finding(**f) for f in kept] + findings
        results["checks"] = [asdict(finding) for finding in findings]
        results["checks correct"] = right
        write(results, out)
    if "models" in parts:
        results["models"] = correctness.check_models(device)
        results["models correct"] = all(row["correct"] for row in results["models"].values())
        write(results, out)
    if "cli" in parts:
        results["cli"] = correctness.check_command_line()
        results["cli correct"] = all(row["exit_code"] == 0 for row in results["cli"])
        write(results, out)
    return all(correct for name, correct in results.items() if name.endswith(" correct"))


def train(device: torch.device, preset: str | None, results: dict[str, Any]) -> list[Row]:
    rows, profiles = _module("training").measure(device, preset)
    new = {(profile["preset"], profile["batch"]) for profile in profiles}
    kept = [p for p in results.get("profiles", ()) if (p["preset"], p["batch"]) not in new]
    results["profiles"] = kept + profiles
    return rows


def decode() -> list[Row]:
    """Time decoding with a captured graph; ``benchmarks.gpu_decode`` by itself also measures long contexts."""
    module = _module("decode")
    module.check()
    model = module.build("moe-mamba-25m", torch.bfloat16)
    rows = []
    for batch, target in module.TARGETS.items():
        speed = module.decode_speed(model, batch)["tokens_per_second"]
        peer = {1: 574.0, 64: 34_900.0}.get(batch)
        name = "mamba_ssm, Mamba 25M, CUDA graph" if peer else ""
        rows.append(
            show(
                Row(
                    f"decoding moe-mamba-25m, batch {batch}",
                    speed,
                    "tok/s",
                    peer=peer,
                    peer_name=name,
                    target=target,
                )
            )
        )
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    found = {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.import_module("triton").__version__
    return found


def _module(name: str) -> Any:
    """Import a part only when it runs: each works without the others."""
    return importlib.import_module(f"benchmarks.gpu_{name}")


if __name__ == "__main__":
    main()
