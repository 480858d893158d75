"""Correctness on a GPU: every backend of every operation, whole models, the command line.

Operations are compared with the reference in fp64, in several processes because most of the time goes into compiling
kernels; models with fp64 on the CPU; and the commands are run as a user would.
"""

import argparse
import copy
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from benchmarks.gpu_cases import Finding, cases, check, distance
from switchmamba.config import validate
from switchmamba.data.sampler import Batch
from switchmamba.errors import NonFiniteError
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.training.config import TrainingConfig
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.step_graph import StepGraph
from switchmamba.training.train_step import LaunchedStep, launch_step, train_step

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


def check_operations(
    device: torch.device, workers: int, operations: Sequence[str] | None = None
) -> list[Finding]:
    """Check all cases, or those of some operations, in several processes."""
    start = perf_counter()
    numbers = [i for i, case in enumerate(cases()) if operations is None or case.operation in operations]
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
        rows[f"{name}: captured steps"] = compare_graph_with_launches(config, device)
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


def compare_graph_with_launches(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Take eight steps launch by launch and by a captured graph; then see that NaN stops both alike."""
    training = TrainingConfig(batch_size=8, learning_rate=1e-3, precision="bf16", device=device.type)
    batches = [random_batch(8, 256, config.vocab_size, torch.device("cpu")) for _ in range(8)]
    losses, stopped = [], []
    for captured in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(config).to(device)
        optimizer = build_optimizer(model, training)
        graph = StepGraph(model, optimizer, training)

        steps = graph.launch if captured else partial(_launch, model, optimizer, training)
        losses.append([steps(batch, 1e-3).result().loss for batch in batches])
        with torch.no_grad():
            model.embedding.weight[batches[0].tokens_BL[0, 0]] = torch.nan
        before = [parameter.detach().clone() for parameter in model.parameters()]
        queued = [steps(batch, 1e-3) for batch in batches[:2]]
        try:
            queued[0].result()
            stopped.append("went on")
        except NonFiniteError:
            same = zip(before, model.parameters(), strict=True)
            unchanged = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in same)
            stopped.append("stopped" if unchanged else "changed weights")
    return {
        "correct": losses[0] == losses[1] and stopped == ["stopped", "stopped"] and graph.captured,
        "losses": losses,
        "at NaN": stopped,
        "captured": graph.captured,
    }


def _launch(
    model: LanguageModel, optimizer: AdamW, training: TrainingConfig, batch: Batch, rate: float
) -> LaunchedStep:
    return launch_step(model, optimizer, batch, training, rate)


def random_batch(rows: int, length: int, vocab_size: int, device: torch.device) -> Batch:
    tokens = torch.randint(0, vocab_size, (rows, length + 1), device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def check_command_line() -> list[dict[str, Any]]:
    """Prepare, train, evaluate and generate as a user would."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text, data, run = (Path(folder, name) for name in ("text.txt", "data", "run"))
        text.write_text("".join(Path(path).read_text() for path in (argparse.__file__, json.__file__)))
        train = [
            "train",
            "moe-mamba-tiny",
            "--data",
            str(data),
            "--out",
            str(run),
            "--training.batch_size",
            "4",
        ]
        train += ["--data.context_length", "128", "--training.validate_every", "7"]
        train += ["--training.checkpoint_every", "5"]
        for command in (
            ["doctor"],
            ["data", "prepare", "--input", str(text), "--tokenizer", "bpe:300", "--out", str(data)],
            [*train, "--steps", "20"],
            [*train, "--steps", "40", "--resume"],
            ["evaluate", str(run), "--data", str(data)],
            [
                "generate",
                str(run),
                "--prompt",
                "import ",
                "--max-tokens",
                "80",
            ],  # the last of them by a graph
        ):
            done = subprocess.run(
                [sys.executable, "-m", "switchmamba", *command], capture_output=True, text=True, check=False
            )
            ending = done.stdout[-1500:] if done.returncode == 0 else done.stderr[-3000:]
            rows.append({"command": " ".join(command[:2]), "exit_code": done.returncode, "output": ending})
            print(f"switchmamba {rows[-1]['command']}: exit code {done.returncode}\n{ending}", flush=True)
    return rows
