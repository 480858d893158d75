"""``make check-gguf``: llama.cpp loads what ``export --to gguf`` writes, and draws the native model's greedy tokens.

    python -m tests.interop.llama_cpp_check --python .venv-llama/bin/python

The other Python needs llama-cpp-python, whose installation compiles llama.cpp for minutes: so this is no test of
``make test``. In fp32 tokens must be equal and logits agree to 1e-4; of rounded files it says how they do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from switchmamba import load
from switchmamba.cli import main
from switchmamba.generation.generate import generate
from switchmamba.generation.settings import SamplingSettings
from switchmamba.interop.conversion import export_checkpoint
from switchmamba.interop.gguf import FILE_TYPES
from switchmamba.interop.verification import relative_difference
from tests.interop.native_models import save, tiny
from tests.interop.test_jamba import ATTENTION, DENSE, TOP_2
from tests.interop.test_mamba import MODELS as STACKS

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
TOLERANCE = 1e-4
"""Of llama.cpp's fp32 logits, whose products and exponentials are its own."""

COUNT = 64
TEXTS = [
    "The quick brown fox, isn't it?  Two  spaces\n\n\tand a tab; 3.14 of 2,000!",
    "äöü ß é 字漢 \U0001f642 — “quotes” …",
    "def f(x):\n    return x**2  # squared\n",
    "'s 't 'll don't I'VE\r\n\r\n   trailing   ",
]
DRAWN: dict[str, list[tuple[str, Any]]] = {
    "all experts": [],
    "raw top-2": [TOP_2],
    "odd sizes": [("layers.mamba.d_state", 5), ("layers.mamba.dt_rank", 3), ("d_model", 40)],
    "attention and dense": [
        ("pattern", ["mamba", "mlp", "attention", "moe", "mamba", "mlp"]),
        ("layers.mlp", DENSE),
        ("layers.attention", ATTENTION),
        TOP_2,
    ],
    "padded vocabulary": [("vocab_size", 320)],
}
"""Models with random weights, to be told apart from the trained one."""


def train(directory: Path) -> Path:
    """Train a small model on the documentation, so that one model says something."""
    run, data = directory / "run", directory / "data"
    text = ["--input", str(ROOT / "docs"), "--text-suffix", ".md", "--tokenizer", "bpe:1000"]
    assert main(["--quiet", "data", "prepare", *text, "--out", str(data)]) == 0
    words = ["train", "jamba-compat-tiny", "--data", str(data), "--out", str(run), "--steps", "200"]
    assert main(["--quiet", *words, "--model.d_model", "64", "--training.device", "cpu"]) == 0
    return run


def check(python: str, directory: Path) -> bool:
    """Export, ask llama.cpp, compare, print; say whether all is well."""
    natives = {name: save(directory / name, tiny("jamba-compat-tiny", *o)) for name, o in DRAWN.items()}
    natives |= {
        name: save(directory / name, tiny(preset, *overrides)) for name, (preset, overrides) in STACKS.items()
    }
    natives["trained"] = train(directory)
    files = {}
    for name, path in natives.items():
        for file_type in FILE_TYPES if name == "trained" else ("f32",):
            out = directory / f"{name} {file_type}"
            export_checkpoint(path, "gguf", out, {"file_type": file_type})
            files[f"{name} {file_type}"] = str(out / f"model-{file_type}.gguf")
    prompt = "the cat sat on the"
    task = json.dumps({"files": files, "prompt": prompt, "texts": TEXTS, "count": COUNT})
    done = subprocess.run([python, str(WORKER)], input=task, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python}: llama.cpp failed:\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout)
    print(f"llama-cpp-python {answer['version']}, torch {torch.__version__}")
    well = [
        report(natives[name.rpartition(" ")[0]], name, prompt, found)
        for name, found in answer["files"].items()
    ]
    return all(well)


@torch.no_grad()
def report(native: Path, name: str, prompt: str, answer: dict[str, Any]) -> bool:
    """Compare one file and print a line; say whether it is as it must be."""
    model, tokenizer = load(native)
    settings = SamplingSettings(temperature=0)
    (completion,) = generate(model, tokenizer, [prompt], settings, max_tokens=COUNT).result.completions
    ours = list(completion.token_ids)
    if completion.finish_reason == "end_of_text":
        ours.append(tokenizer.end_of_text_id)
    same = next(
        (i for i, pair in enumerate(zip(ours, answer["drawn"], strict=False)) if len(set(pair)) > 1),
        len(ours),
    )
    logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, :, : tokenizer.vocab_size]
    difference = relative_difference(torch.tensor(answer["logits"]), logits)
    texts = answer["texts"] == [tokenizer.encode(text) for text in TEXTS] and answer["back"] == TEXTS
    well = texts and answer["eos"] == tokenizer.end_of_text_id
    if name.endswith(" f32"):
        well = well and answer["drawn"] == ours and difference < TOLERANCE
    print(
        f"{'ok ' if well else 'BAD'} {name:24} texts {'equal' if texts else 'DIFFER'}, logits differ by "
        f"{difference:.1e}, the first {same} of {len(ours)} greedy tokens are equal"
    )
    return well


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment that has llama-cpp-python")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sys.exit(not check(arguments.python, Path(directory)))
