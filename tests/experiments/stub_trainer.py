"""Stands in for ``switchmamba train`` and ``experiment analyse``: writes what they would write, in milliseconds.

A learning rate of 9 diverges, 8 fails, 7 dies without a word, 6 cannot be analysed, 5 is analysed without an answer, 4
takes half a second to end after its last checkpoint; ``training.steps`` × 10 ms is how long a run takes.
"""

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path


def analyse(directory: Path, name: str) -> int:
    run = directory / "runs" / name
    if "learning_rate=6" in name:
        print("error: the data is gone", file=sys.stderr)
        return 1
    if "learning_rate=5" in name:
        return 0
    steps = json.loads((run / "config.json").read_text())["training"]["steps"]
    path = directory / "analysis" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": steps}))
    return 0


def main(arguments: list[str]) -> int:
    if arguments[:2] == ["experiment", "analyse"]:
        return analyse(Path(arguments[2]), arguments[4])
    options = {a.removeprefix("--"): b for a, b in pairwise(arguments) if a.startswith("--")}
    run = Path(options["out"])
    rate, steps = float(options["training.learning_rate"]), int(options["training.steps"])
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    run.mkdir(parents=True, exist_ok=True)
    metrics = run / "metrics.jsonl"
    first = len(metrics.read_text().splitlines()) + 1 if metrics.exists() else 1
    (run / "config.json").write_text(json.dumps({"training": {"steps": steps}}))
    with (run / "starts").open("a") as file:
        file.write(f"{first} {options['threads']} {os.environ.get('KMP_BLOCKTIME')}\n")
    for step in range(first, steps + 1):
        time.sleep(0.01)
        if step == 3 and rate == 9:
            print("error: the loss is nan: NaN or infinity comes first out of layers.0", file=sys.stderr)
            return 1
        if step == 3 and rate == 8:
            print("noise\nerror: no space left on device", file=sys.stderr)
            return 1
        if step == 3 and rate == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        record = {
            "step": step,
            "tokens": step * 8,
            "loss": 5 - rate,
            "loss_ema": 5 - rate,
            "tokens_per_second": 800,
        }
        with metrics.open("a") as file:
            file.write(json.dumps(record | {"routers": [], "validation_loss": 5 - rate}) + "\n")
        if asked or step == steps:
            (run / "checkpoints" / f"step-{step}").mkdir(parents=True)
            time.sleep(0.5 if rate == 4 else 0)
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
