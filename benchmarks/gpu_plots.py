"""Draw what benchmarks.gpu_decode measured over the length of the context.

python -m benchmarks.gpu_plots --results benchmarks/results/gpu_decode.json --out docs/decode-over-context.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "decode_microseconds": ("Decoding one token, batch 1", "µs"),
    "state_mb": ("State of one sequence", "MB"),
    "prefill_tokens_per_second": ("Reading the prompt, batch 1", "tokens/s"),
    "prefill_peak_mb": ("Memory to read the prompt, beside the weights", "MB"),
}


def label(preset: str, rows: list[dict[str, Any]]) -> str:
    """Name a model; one whose state grows cannot be captured in a CUDA graph, so its host is part of its times."""
    grows = rows[-1]["state_mb"] > rows[0]["state_mb"]
    return f"{preset}, without a CUDA graph" if grows else f"{preset}, as a CUDA graph"


def draw(context: dict[str, list[dict[str, Any]]], gpu: str, out: Path) -> None:
    """One panel per quantity, one line per model, both axes logarithmic."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (name, (title, unit)) in zip(axes.flat, PANELS.items(), strict=True):
        for preset, rows in context.items():
            axis.plot(
                [row["length"] for row in rows],
                [row[name] for row in rows],
                marker="o",
                label=label(preset, rows),
            )
        axis.set(title=title, xlabel="tokens of context", ylabel=unit, xscale="log", yscale="log")
        low, high = axis.get_ylim()
        if high < 10 * low:  # a flat line looks flat
            axis.set_ylim(low / 3, high * 3)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"{gpu}, bf16")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu_decode.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/decode-over-context.png"))
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    draw(results["context"], results["gpu"], options.out)


if __name__ == "__main__":
    main()
