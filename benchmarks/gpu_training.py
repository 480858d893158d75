"""Training steps on a GPU: tokens per second, MFU, milliseconds per part, and what loading the data costs.

Steps are queued as the trainer queues them, by a captured graph: the host waits for step n when step n + 1 is on its
way. Batches come from shards on disk through the trainer's own sampler, inside the timed loop.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_report import Row, show
from switchmamba.config import validate
from switchmamba.data.sampler import Sampler
from switchmamba.layers.feed_forward.moe import mixtures
from switchmamba.models.accounting import account
from switchmamba.models.language_model import LanguageModel
from switchmamba.models.presets import presets
from switchmamba.training.config import RunConfig, resolve
from switchmamba.training.optimizer import build_optimizer
from switchmamba.training.step_graph import StepGraph
from switchmamba.training.train_step import LaunchedStep, launch_step
from switchmamba.training.utilisation import mfu, peak_flops

CASES = (
    ("moe-mamba-25m", 64, 1_000_000),
    ("moe-mamba-25m", 128, 1_000_000),
    ("moe-mamba-25m", 256, 1_000_000),
    ("mamba-25m", 64, 900_000),
    ("mamba-25m", 128, 900_000),
    ("moe-mamba-100m", 64, None),
)
"""Preset, sequences per step and the target in tokens per second; 64 is the batch of the paper's 25M models."""
PEERS = {
    "moe-mamba-25m": (300_000, "HF Jamba, V=32k, batch 32"),
    "mamba-25m": (378_000, "mamba_ssm, V=32k, batch 32"),
}
PARTS = (
    "scan",
    "convolution",
    "projections",
    "experts",
    "router",
    "head",
    "norm and elementwise",
    "embedding",
    "optimizer",
    "copies",
    "other",
)
_RULES = (
    ("optimizer", r"optimizer|adamw|foreach|multi_tensor|linalg_vector_norm"),
    ("head", r"sumoflosses|tokenlosses|cross_entropy"),
    (
        "experts",
        r"expert|_expand|_contract|_pull_back|_weight_gradient|_gather$|_send$|_count$|_place$|_accumulate$|_drop$",
    ),
    ("scan", r"selective_?scan|_scan|ssd"),
    ("convolution", r"conv"),
    ("norm and elementwise", r"residual_?norm|layer_norm|rms_norm"),
    ("embedding", r"embedding"),
    ("copies", r"memcpy|memset"),
)
"""Part and pattern; the first that fits the names of a kernel, its operation and the operations around it."""


def measure(
    device: torch.device, only: str | None = None, steps: int = 20
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Train each preset, or ``only`` one, on shards of random tokens."""
    rows, profiles = [], []
    for preset, batch, target in CASES:
        if only is not None and preset != only:
            continue
        found = train(preset, batch, device, steps)
        peer, peer_name = PEERS.get(preset, (None, ""))
        rows.append(
            show(
                Row(
                    f"training {preset}, context {found['length']}, batch {batch}",
                    found["tokens_per_second"],
                    "tok/s",
                    peer=peer,
                    peer_name=peer_name,
                    target=target,
                    note=f"{100 * found['mfu']:.1f}% MFU, {found['peak_gb']:.1f} GB",
                )
            )
        )
        for part, taken in found["parts"].items():
            print(f"    {taken:8.2f} ms  {part}", flush=True)
        print(f"    {found['ms_per_step']:8.2f} ms  a step by the clock. {found['loading']}", flush=True)
        profiles.append(found)
    return rows, profiles


def train(preset: str, batch_size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """Time ``steps`` steps after a few others, and profile one more."""
    tables = presets[preset]
    config = resolve(validate(RunConfig, tables, source=preset), tables["model"]["vocab_size"], "cuda")
    training = config.training.model_copy(update={"batch_size": batch_size, "micro_batch_size": batch_size})
    length = config.data.context_length
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    model = LanguageModel(config.model).to(device)
    optimizer = build_optimizer(model, training)
    graph = StepGraph(model, optimizer, training)
    loading, launching, losses, queued = 0.0, 0.0, [], None
    with tempfile.TemporaryDirectory() as folder:
        documents = MappedDocuments(
            Path(folder, "tokens"), batch_size * length * (steps + 8), config.model.vocab_size
        )
        sampler = Sampler(documents, length, 0, reset_state=config.data.reset_state)

        def launch(step: int) -> LaunchedStep:
            nonlocal loading, launching
            start = perf_counter()
            batch = sampler.batch(step * batch_size, batch_size)
            loading += perf_counter() - start
            launched = graph.launch(batch, 1e-4)
            launching += perf_counter() - start
            return launched

        for step in range(6):
            losses.append(launch(step).result().loss)
        torch.cuda.reset_peak_memory_stats()
        loading = launching = 0.0
        torch.cuda.synchronize()
        start = perf_counter()
        for step in range(6, 6 + steps):
            launched = launch(step)
            if queued is not None:
                losses.append(queued.result().loss)
            queued = launched
        loading_ms, launching_ms = 1000 * loading / steps, 1000 * launching / steps
        assert queued is not None
        losses.append(queued.result().loss)
        seconds = (perf_counter() - start) / steps
        # One launch after the other once more: a replayed graph does not say which operation a kernel belongs to.
        peak_gb = torch.cuda.max_memory_reserved() / 1e9  # with what the graph holds
        graph = queued = launched = None  # its memory is needed
        torch.cuda.empty_cache()
        batch = sampler.batch((6 + steps) * batch_size, batch_size)
        parts, kernels, longest = profile(
            lambda: launch_step(model, optimizer, batch, training, 1e-4),
            config.model.vocab_size,
            _router_widths(config),
        )
    tokens_per_second = batch_size * length / seconds
    flops = account(config.model).training_flops_per_token(length)
    return {
        "preset": preset,
        "batch": batch_size,
        "length": length,
        "tokens_per_second": tokens_per_second,
        "ms_per_step": 1000 * seconds,
        "mfu": mfu(tokens_per_second, flops, peak_flops(device, torch.bfloat16)),
        "peak_gb": peak_gb,
        "first_and_last_loss": [losses[0], losses[-1]],
        "parts": parts,
        "kernels": kernels,
        "longest": longest,
        "loading_ms": loading_ms,
        "launching_ms": launching_ms,
        "loading": f"The host needs {launching_ms:.0f} ms for a step, {loading_ms:.1f} of them to load the batch, "
        "while the device works on the step before.",
    }


class MappedDocuments:
    """Documents of random tokens in a memory-mapped file, as prepared shards are: uint16, some hundred tokens each."""

    def __init__(self, path: Path, tokens: int, vocab_size: int) -> None:
        generator = np.random.default_rng(0)
        generator.integers(0, vocab_size, tokens, dtype=np.uint16).tofile(path)
        self.vocab_size = vocab_size
        cuts = np.cumsum(generator.integers(50, 1000, tokens // 500))
        self.document_offsets = np.concatenate([[0], cuts[cuts < tokens], [tokens]]).astype(np.int64)
        self._tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def document(self, index: int) -> np.ndarray:
        first, last = self.document_offsets[index : index + 2]
        return self._tokens[first:last]


def _router_widths(config: RunConfig) -> frozenset[int]:
    return frozenset(moe.num_experts for moe in mixtures(config.model))


def profile(
    step: Callable[[], Any], vocab_size: int, router_widths: frozenset[int]
) -> tuple[dict[str, float], int, dict[str, float]]:
    """Return milliseconds per part of one step, the number of kernels, and milliseconds of the longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        step()
        torch.cuda.synchronize()
    parts: Counter[str] = Counter(dict.fromkeys(PARTS, 0.0))
    longest: Counter[str] = Counter()
    kernels, starts, ends = 0, [], []
    attributed: Counter[str] = Counter()
    everything: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            everything[event.name] += event.device_time_total / 1000
            kernels += 1
            starts.append(event.time_range.start)
            ends.append(event.time_range.end)
        for kernel in event.kernels:
            taken = kernel.duration / 1000
            part = part_of(kernel.name, _names(event), _sizes(event), vocab_size, router_widths)
            parts[part] += taken
            attributed[kernel.name] += taken
            longest[f"{part}: {kernel.name[:90]}"] += taken
    for name, taken in everything.items():  # kernels that no operation of torch stands around
        rest = taken - attributed[name]
        if rest > 1e-3 and not name.startswith(("Optimizer.", "ProfilerStep")):
            part = part_of(name, "", frozenset(), vocab_size, router_widths)
            parts[part] += rest
            longest[f"{part}: {name[:90]}"] += rest
    longest["(nothing: the device waits while it is profiled)"] = (max(ends) - min(starts)) / 1000 - sum(
        parts.values()
    )
    return {part: parts[part] for part in PARTS}, kernels, dict(longest.most_common(60))


def part_of(
    kernel: str, operations: str, sizes: frozenset[int], vocab_size: int, router_widths: frozenset[int]
) -> str:
    """Say which part of the step a kernel belongs to."""
    names = f"{kernel} {operations}".lower()
    for part, pattern in _RULES:
        if re.search(pattern, names):
            return part
    if vocab_size in sizes:
        return "head"
    if sizes & router_widths:
        return "router"
    if re.search(r"aten::(add)?mm|linear|matmul", names):
        return "projections"
    return "norm and elementwise" if "aten::" in names else "other"


def _names(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return " ".join(names)


def _sizes(event: Any) -> frozenset[int]:
    """Return every size of every tensor that the operation, or the one around it, was given."""
    found: set[int] = set()
    for shapes in (event.input_shapes, event.cpu_parent.input_shapes if event.cpu_parent else None):
        for shape in shapes or ():
            found |= {size for size in shape if isinstance(size, int)}
    return frozenset(found)
