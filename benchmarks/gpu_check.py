"""Correctness on a GPU, then speed: operations, whole models, the command line, training.

    python -m benchmarks.gpu_check --out gpu.json                     # everything, in about ten minutes
    python -m benchmarks.gpu_check --out gpu.json --only checks,times --workers 8

Parts: ``checks`` (every backend of every operation against the reference in fp64), ``models`` (against fp64 on the CPU,
decoding, training), ``cli`` (prepare, train, evaluate, generate), ``times`` (operations) and ``training`` (tokens/s).
What is wrong is not timed, unless ``--time-anyway`` asks for it to find out why. Times are medians of CUDA events over
several sets of inputs, so that caches are cold.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: repeatable matrix products

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Finding, cases, check, distance
from switchmamba.config import validate
from switchmamba.data.sampler import Batch
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.presets import presets
from switchmamba.ops import causal_conv1d, expert_feed_forward, linear_cross_entropy, selective_scan
from switchmamba.training.config import RunConfig, TrainingConfig, resolve
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.train_step import train_step

PARTS = ("checks", "models", "cli", "times", "training")
SIX_BLOCKS = {
    "vocab_size": 8000,
    "d_model": 256,
    "num_blocks": 6,
    "pattern": ["mamba", "moe"],
    "layers": {
        "mamba": {"kind": "mamba"},
        "moe": {"kind": "moe", "num_experts": 8, "d_expert": 512, "activation": "swiglu"},
    },
}
SCAN_SHAPES = {
    (64, 1024, 1024): (1.120, 5.675),
    (32, 1024, 1536): (0.840, 4.268),
    (8, 2048, 2048): (0.592, 2.888),
    (1, 65536, 1024): (1.460, 7.177),
}
"""(B, L, d_inner): forward and forward + backward of mamba_ssm's CUDA kernel on an H200, ms."""
CONVOLUTION_PEER = (0.076, 0.264)
"""The same of causal_conv1d's CUDA kernel at (64, 1024, 1024)."""
EXPERT_SHAPES = {
    (512, 1536, 42): (0.985, 2.159),
    (768, 2304, 42): (1.529, 3.668),
    (1024, 2048, 64): (1.765, 4.261),
    (512, 1536, 256): (1.114, 2.673),
}
"""(d_model, d_expert, experts): the same of torch's grouped_mm with eager sorting, 65,536 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile and check")
    parser.add_argument("--device", default="cuda", help="cpu tries the checks without a GPU")
    parser.add_argument("--batches", default="16,32,64", help="sequences per step of the training part")
    parser.add_argument("--time-anyway", action="store_true", help="time although something is wrong")
    options = parser.parse_args()
    parts = options.only.split(",")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    results: dict[str, Any] = {"environment": environment(device)}
    print(results["environment"], flush=True)
    correct = True

    def save() -> None:
        results["correct"] = correct
        options.out.write_text(json.dumps(results, indent=2) + "\n")

    if "checks" in parts:
        findings = check_operations(device, options.workers)
        results["checks"] = [asdict(finding) for finding in findings]
        correct &= report_findings(findings)
        save()
    if "models" in parts:
        results["models"] = check_models(device)
        correct &= all(row["correct"] for row in results["models"].values())
        save()
    if "cli" in parts:
        results["cli"] = check_command_line()
        correct &= all(row["exit_code"] == 0 for row in results["cli"])
        save()
    if not correct and not options.time_anyway:
        sys.exit("something is wrong: nothing is timed")
    if "times" in parts:
        results["times"] = time_operations(device)
        save()
    if "training" in parts:
        batches = [int(batch) for batch in options.batches.split(",")]
        results["training"] = [
            time_training(name, batches, device) for name in ("moe-mamba-25m", "mamba-25m")
        ]
        save()
    sys.exit(not correct)


def environment(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def check_operations(device: torch.device, workers: int) -> list[Finding]:
    """Check all cases in several processes: most of the time goes into compiling kernels."""
    start = perf_counter()
    numbers = range(len(cases()))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.map(_check_case, numbers, [device] * len(numbers))
        findings = [finding for row in found for finding in row]
    print(f"{len(findings)} checks in {perf_counter() - start:.0f} s", flush=True)
    return findings


def _check_case(number: int, device: torch.device) -> list[Finding]:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    case = cases()[number]
    try:
        return check(case, device)
    except Exception as error:  # the other cases go on
        return [Finding(case.name, case.operation, "?", "?", problems=[f"{type(error).__name__}: {error}"])]


def report_findings(findings: Sequence[Finding]) -> bool:
    """Print the worst case of each operation, backend and dtype, and everything that is wrong."""
    print(f"{'operation':22}{'backend':10}{'dtype':10}{'cases':>5}  worst error / allowed")
    groups = sorted({(f.operation, f.backend, f.dtype) for f in findings})
    for group in groups:
        rows = [f for f in findings if (f.operation, f.backend, f.dtype) == group]
        worst = max(rows, key=lambda f: f.error / f.allowed)
        what = f"{worst.error:.1e} / {worst.allowed:.1e}  {worst.quantity} ({worst.case})"
        print(f"{group[0]:22}{group[1]:10}{group[2]:10}{len(rows):5}  {what}")
    wrong = [finding for finding in findings if not finding.correct]
    for f in wrong:
        where = f"{f.operation}, {f.backend}, {f.case}: {f.quantity}"
        print(f"WRONG  {where} {f.error:.1e} / {f.allowed:.1e} {'; '.join(f.problems)}")
    print("all correct" if not wrong else f"{len(wrong)} of {len(findings)} wrong", flush=True)
    return not wrong


def check_models(device: torch.device) -> dict[str, dict[str, Any]]:
    """Compare whole models with fp64 on the CPU, decode step by step, and train in bf16."""
    tiny = LanguageModel.from_preset("moe-mamba-tiny").config
    six = validate(ModelConfig, SIX_BLOCKS, source="benchmark")
    rows: dict[str, dict[str, Any]] = {}
    for name, config in (("moe-mamba-tiny", tiny), ("six blocks", six)):
        rows[f"{name}: logits and gradients"] = compare_with_fp64(config, device)
        rows[f"{name}: step by step"] = compare_steps_with_full(config, device)
        rows[f"{name}: bf16 training"] = train_twice(config, device)
    for name, row in rows.items():
        print(f"{'' if row['correct'] else 'WRONG  '}{name}: {row}", flush=True)
    return rows


def compare_with_fp64(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    tokens, targets = torch.randint(0, config.vocab_size, (2, 2, 100))
    document_ids = (torch.rand(2, 100) < 0.05).long().cumsum(1)

    def outcome(model: LanguageModel, where: torch.device) -> dict[str, Tensor]:
        logits = model(tokens.to(where), document_ids.to(where)).logits
        F.cross_entropy(logits.flatten(0, 1), targets.to(where).flatten()).backward()
        gradients = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach().double().cpu()} | gradients

    cpu = torch.device("cpu")
    truth = outcome(copy.deepcopy(model).double(), cpu)
    reference, found = outcome(copy.deepcopy(model), cpu), outcome(model.to(device), device)
    errors = {n: distance(found[n], truth[n]) for n in truth}
    allowed = {n: 3 * distance(reference[n], truth[n]) + 2e-6 for n in truth}
    worst = max(truth, key=lambda n: errors[n] / allowed[n])
    return {
        "correct": found.keys() == truth.keys() and errors[worst] <= allowed[worst],
        "logits": errors["logits"],
        "worst": worst,
        "error": errors[worst],
        "allowed": allowed[worst],
    }


@torch.inference_mode()
def compare_steps_with_full(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LanguageModel(config).eval().to(device)
    tokens = torch.randint(0, config.vocab_size, (3, 60), device=device)
    full = model(tokens).logits
    out = model(tokens[:, :37])
    pieces = [out.logits]
    for t in range(37, 60):
        out = model(tokens[:, t : t + 1], state=out.state)
        pieces.append(out.logits)
    error = distance(torch.cat(pieces, dim=1).double(), full.double())
    return {"correct": error < 1e-5, "error": error}


def train_twice(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Take 20 steps on one batch with bf16 autocast, twice: the loss must fall; say whether the bits repeat."""
    training = TrainingConfig(batch_size=8, learning_rate=1e-3, precision="bf16", device=device.type)
    batch = random_batch(8, 256, config.vocab_size, torch.device("cpu"))
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = LanguageModel(config).to(device)
        optimizer = build_optimizer(model, training)
        runs.append([train_step(model, optimizer, batch, training, 1e-3).loss for _ in range(20)])
    first, last = runs[0][0], runs[0][-1]
    return {
        "correct": last < first,
        "first loss": first,
        "last loss": last,
        "repeats": runs[0] == runs[1],
    }


def random_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    tokens = torch.randint(0, vocab_size, (rows, length + 1), device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def check_command_line() -> list[dict[str, Any]]:
    """Prepare, train, evaluate and generate as a user would."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text, data, run = (Path(folder, name) for name in ("text.txt", "data", "run"))
        text.write_text("".join(Path(path).read_text() for path in (argparse.__file__, json.__file__)))
        tiny = ["--training.batch_size", "4", "--data.context_length", "128"]
        for command in (
            ["doctor"],
            ["data", "prepare", "--input", str(text), "--tokenizer", "bpe:300", "--out", str(data)],
            ["train", "moe-mamba-tiny", "--data", str(data), "--out", str(run), "--steps", "5", *tiny],
            ["evaluate", str(run), "--data", str(data)],
            ["generate", str(run), "--prompt", "import ", "--max-tokens", "20"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "switchmamba", *command], capture_output=True, text=True, check=False
            )
            ending = done.stdout[-1500:] if done.returncode == 0 else done.stderr[-3000:]
            rows.append({"command": " ".join(command[:2]), "exit_code": done.returncode, "output": ending})
            print(f"switchmamba {rows[-1]['command']}: exit code {done.returncode}\n{ending}", flush=True)
    return rows


def time_operations(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for shape, peer in SCAN_SHAPES.items():
        rows.append(time_row("selective_scan", shape, scan_inputs(*shape, device), _scan, peer, "mamba_ssm"))
    shape, inputs = (64, 1024, 1024), convolution_inputs(device)
    rows.append(time_row("causal_conv1d", shape, inputs, _convolution, CONVOLUTION_PEER, "causal_conv1d"))
    for shape, peer in EXPERT_SHAPES.items():
        inputs = expert_inputs(*shape, device)
        rows.append(time_row("expert_feed_forward", shape, inputs, _experts, peer, "eager grouped_mm"))
        d_model, d_expert, _ = shape
        rows[-1]["tflops"] = 6 * 2 * 65536 * d_model * d_expert / rows[-1]["forward_backward_ms"] / 1e9
        dense = [
            [x, w1[0].detach().requires_grad_(), w2[0].detach().requires_grad_()]
            for x, _, _, w1, w2 in inputs
        ]
        rows.append(time_row("dense feed-forward", shape, dense, _dense, None, ""))
        print(f"    {rows[-2]['tflops']:.0f} TFLOP/s forward and backward")
        del inputs, dense
    rows.append(time_head(device))
    return rows


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    return selective_scan(x, dt, A, B, C, D, z, bias, dt_softplus=True)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, "silu")


def _experts(x: Tensor, index: Tensor, weight: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return expert_feed_forward(x, index, weight, w1, w2, "relu")


def _dense(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1)), w2)


def scan_inputs(rows: int, length: int, channels: int, device: torch.device) -> list[list[Tensor]]:
    """B and C are slices of a projection's output, as in a Mamba layer; three sets."""
    per_step, sets = (rows, length, channels), []
    for _ in range(3):
        BC = torch.randn(rows, length, 32 + 32, device=device, dtype=torch.bfloat16)
        x, dt, z = (torch.randn(per_step, device=device, dtype=torch.bfloat16) for _ in range(3))
        A = -torch.arange(1.0, 17.0, device=device).repeat(channels, 1)
        D, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)
        tensors = [x, dt, A, BC[..., 32:48].detach(), BC[..., 48:].detach(), D, z, bias]
        sets.append([tensor.requires_grad_() for tensor in tensors])
    return sets


def convolution_inputs(device: torch.device) -> list[list[Tensor]]:
    return [
        [
            torch.randn(64, 1024, 2048, device=device, dtype=torch.bfloat16)[..., :1024].requires_grad_(),
            torch.randn(1024, 4, device=device, requires_grad=True),
            torch.randn(1024, device=device, requires_grad=True),
        ]
        for _ in range(3)
    ]


def expert_inputs(d_model: int, d_expert: int, experts: int, device: torch.device) -> list[list[Tensor]]:
    sets = []
    for _ in range(3):
        x = torch.randn(65536, d_model, device=device, dtype=torch.bfloat16)
        w1 = torch.randn(experts, d_expert, d_model, device=device, dtype=torch.bfloat16) / d_model**0.5
        w2 = torch.randn(experts, d_model, d_expert, device=device, dtype=torch.bfloat16) / d_expert**0.5
        index = torch.randint(0, experts, (65536, 1), device=device)
        weight = torch.rand(65536, 1, device=device)
        sets.append(
            [x.requires_grad_(), index, weight.requires_grad_(), w1.requires_grad_(), w2.requires_grad_()]
        )
    return sets


def time_row(
    operation: str,
    shape: tuple[int, ...],
    sets: Sequence[Sequence[Tensor]],
    run: Callable[..., Tensor],
    peer: tuple[float, float] | None,
    peer_name: str,
) -> dict[str, Any]:
    """Time the forward pass alone, and forward and backward together."""
    with torch.no_grad():
        forward = milliseconds([lambda inputs=inputs: run(*inputs) for inputs in sets])  # type: ignore[misc]
        dy = torch.randn_like(run(*sets[0]))

    def both(inputs: Sequence[Tensor]) -> None:
        torch.autograd.grad(run(*inputs), [t for t in inputs if t.requires_grad], dy)

    total = milliseconds([lambda inputs=inputs: both(inputs) for inputs in sets])  # type: ignore[misc]
    row = {"operation": operation, "shape": shape, "forward_ms": forward, "forward_backward_ms": total}
    beside = ""
    if peer is not None:
        row |= {"peer": peer_name, "peer_forward_ms": peer[0], "peer_forward_backward_ms": peer[1]}
        beside = f"   {peer_name} {peer[0]:.3f} / {peer[1]:.3f}: {peer[0] / forward:.2f} × and {peer[1] / total:.2f} ×"
    print(f"{operation} {shape}: forward {forward:.3f} ms, with backward {total:.3f}{beside}", flush=True)
    return row


def milliseconds(calls: Sequence[Callable[[], Any]], warm_up: int = 5, repeats: int = 21) -> float:
    """Median time of a call on the GPU; the calls take turns."""
    times = []
    for i in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(start.elapsed_time(end))
    return median(times)


def time_head(device: torch.device) -> dict[str, Any]:
    x = torch.randn(65536, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(50257, 512, device=device, dtype=torch.bfloat16) / 8).requires_grad_()
    target = torch.randint(0, 50257, (65536,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = milliseconds(
        [lambda: torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))], 2, 7
    )
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    print(
        f"linear_cross_entropy 65536 × 512 × 50257: {taken:.1f} ms, {peak:.2f} GB beside the inputs",
        flush=True,
    )
    return {"operation": "linear_cross_entropy", "forward_backward_ms": taken, "peak_gb": peak}


def time_training(preset: str, batches: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Train on random tokens at each batch size that fits."""
    found: dict[str, Any] = {"preset": preset, "batches": {}}
    for rows in batches:
        try:
            row = time_training_at(preset, rows, device)
        except torch.cuda.OutOfMemoryError:
            print(f"{preset}, batch {rows}: out of memory", flush=True)
            break
        found["batches"][rows] = row
        print(f"{preset}, batch {rows}, bf16:", {n: v for n, v in row.items() if n != "profile"}, flush=True)
    for name, taken in row["profile"].items() if found["batches"] else ():
        print(f"    {taken:8.2f} ms  {name}")
    return found


def time_training_at(preset: str, rows: int, device: torch.device) -> dict[str, Any]:
    """Time ten steps of ``rows`` sequences, and profile one more."""
    tables = presets[preset]
    config = resolve(validate(RunConfig, tables, source=preset), tables["model"]["vocab_size"], "cuda")
    training = config.training.model_copy(update={"batch_size": rows, "micro_batch_size": rows})
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = LanguageModel(config.model).to(device)
    optimizer = build_optimizer(model, training)
    length = config.data.context_length
    batch = random_batch(rows, length, config.model.vocab_size, torch.device("cpu"))

    def step() -> float:
        return train_step(model, optimizer, batch, training, 1e-4).loss

    losses = [step() for _ in range(3)]
    torch.cuda.synchronize()
    start = perf_counter()
    losses += [step() for _ in range(10)]
    torch.cuda.synchronize()
    seconds = (perf_counter() - start) / 10
    return {
        "tokens_per_second": rows * length / seconds,
        "ms_per_step": 1000 * seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_and_last_loss": [losses[0], losses[-1]],
        "profile": profile(step),
    }


def profile(step: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds on the GPU per kernel name of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    taken = {event.key[:100]: event.self_device_time_total / 1000 for event in recorded.key_averages()}
    return dict(sorted(taken.items(), key=lambda item: -item[1])[:30])


if __name__ == "__main__":
    main()
