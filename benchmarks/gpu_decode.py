"""Decoding and reading long prompts on one GPU: tokens per second, time and memory over the length of the context.

    python -m benchmarks.gpu_decode --out runs/gpu_decode.json

Decoding is greedy, in bf16, by a captured graph (:class:`switchmamba.generation.decode_graph.DecodeGraph`); before
anything is timed it must agree with the ordinary forward pass. The Transformer-MoE decodes with a key-value cache, step
by step without a graph, because its cache grows.
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switchmamba import LanguageModel
from switchmamba.generation.decode_graph import DecodeGraph
from switchmamba.models.state import ModelState
from switchmamba.ops.fused_step import experts_cuda

TARGETS = {1: 5_000, 64: 200_000, 1024: 1_000_000}
"""Tokens per second of moe-mamba-25m by batch size."""

CHUNK = 16_384
"""Tokens of a prompt read at once."""


def build(preset: str, dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LanguageModel.from_preset(preset).to(dtype).eval()


def check() -> dict[str, dict[str, float]]:
    """Compare the graph with the fp32 forward pass, at numbers of rows that take each way through the kernels.

    Where two experts are nearly level, bf16 may choose the other one, in either pass: so in bf16 the error of the
    median token counts, and may be twice the forward pass's. Greedy tokens must be those of the largest logits, and the
    same when computed again.
    """
    errors = {}
    for preset, numbers_of_rows in (("moe-mamba-tiny", (1, 5, 40, 100)), ("moe-mamba-25m", (1, 64, 1024))):
        model = build(preset, torch.float32)
        narrow = copy.deepcopy(model).to(torch.bfloat16)
        for rows in numbers_of_rows:
            tokens = torch.randint(0, model.config.vocab_size, (rows, 24), device="cuda")
            with torch.inference_mode():
                truth = model(tokens).logits[:, 8:]
                in_bf16 = median_error(narrow(tokens).logits[:, 8:], truth)
                graphs = {m: DecodeGraph(m, m(tokens[:, :8]).state) for m in (model, narrow)}
                found = {
                    m: torch.stack([graph.step(tokens[:, t]).clone() for t in range(8, 24)], 1)
                    for m, graph in graphs.items()
                }
            greedy = all(
                chooses_the_largest(m, m(tokens[:, :8]).state, tokens[:, 8]) for m in (model, narrow)
            )
            worst = float((found[model] - truth).norm() / truth.norm())
            in_graph = median_error(found[narrow], truth)
            errors[f"{preset}, {rows} rows"] = {"fp32": worst, "bf16": in_graph, "bf16 forward": in_bf16}
            if not (greedy and worst < 1e-5 and in_graph < 2 * in_bf16 + 1e-3):
                raise SystemExit(f"{preset}, {rows} rows: the graph is wrong, not timing it: {errors}")
    return errors


EXPERT_CASES = (
    # rows, experts, d_model, d_expert, top_k, activation, dtype, experts that may be chosen
    (64, 42, 512, 1536, 1, "relu", torch.bfloat16, 42),
    (1024, 42, 512, 1536, 1, "relu", torch.bfloat16, 42),
    (1024, 42, 512, 1536, 1, "relu", torch.bfloat16, 1),
    (300, 42, 512, 1536, 1, "relu", torch.bfloat16, 2),
    (17, 42, 512, 1536, 1, "relu", torch.float16, 42),
    (63, 5, 256, 512, 2, "swiglu", torch.bfloat16, 5),
    (1000, 6, 512, 1536, 2, "gelu", torch.float16, 2),
    (33, 256, 512, 1536, 1, "silu", torch.bfloat16, 256),
    (40, 8, 768, 2304, 1, "relu", torch.bfloat16, 8),
    (1000, 3, 128, 256, 1, "swiglu", torch.float16, 3),
)


def check_experts(device: str = "cuda") -> dict[str, float]:
    """Compare the experts' kernel of many rows with fp64: an error of rounding only, and the same bits twice."""
    errors = {}
    for rows, experts, d_model, d_expert, top_k, activation, dtype, chosen in EXPERT_CASES:
        gates = 2 if activation == "swiglu" else 1
        x = torch.randn(rows, d_model, device=device).to(dtype)
        residual = torch.randn_like(x) if top_k == 1 else None
        index = torch.randint(experts - chosen, experts, (rows * top_k,), device=device, dtype=torch.int32)
        scores = torch.rand(rows * top_k, device=device)
        w1 = (torch.randn(experts, gates * d_expert, d_model, device=device) * d_model**-0.5).to(dtype)
        w2 = (torch.randn(experts, d_model, d_expert, device=device) * d_expert**-0.5).to(dtype)
        reason = experts_cuda.unavailable(x, w1, w2, top_k)
        if reason is not None:
            raise SystemExit(f"the experts' kernel does not serve {rows} rows: {reason}")
        first, second = (
            experts_cuda.experts_products(x, index, scores, w1, w2, residual, activation) for _ in range(2)
        )
        truth = torch.zeros(rows * top_k, d_model, dtype=torch.float64, device=device)
        for e in range(experts):
            mine = index == e
            hidden = x.double().repeat_interleave(top_k, 0)[mine] @ w1[e].double().T
            if activation == "swiglu":
                hidden = F.silu(hidden[:, :d_expert]) * hidden[:, d_expert:]
            else:
                hidden = getattr(F, activation)(hidden)
            truth[mine] = scores[mine, None].double() * (hidden @ w2[e].double().T)
        if residual is not None:
            truth += residual.double()
        error = float((first - truth).norm() / truth.norm())
        errors[f"{rows} rows, {chosen} of {experts} experts, {activation}, {dtype}"] = error
        if not (bool((first == second).all()) and error < torch.finfo(dtype).eps):
            raise SystemExit(f"the experts' kernel is wrong, not timing it: {errors}")
    return errors


def chooses_the_largest(model: LanguageModel, state: ModelState, tokens_B: Tensor, steps: int = 16) -> bool:
    """Say whether greedy steps give the same tokens twice, those of the largest logits but for rounding."""
    first, second = (DecodeGraph(model, state).greedy_steps(tokens_B, steps) for _ in range(2))
    graph, largest = DecodeGraph(model, state), True
    for read_B, chosen_B in zip([tokens_B, *first[:-1]], first, strict=True):
        logits_BV = graph.step(read_B)
        short_B = logits_BV.amax(-1) - logits_BV.gather(1, chosen_B[:, None])[:, 0]
        largest &= bool((short_B <= 4 * torch.finfo(logits_BV.dtype).eps * logits_BV.abs().amax(-1)).all())
    return largest and bool((first == second).all())


def median_error(found_BLV: Tensor, truth_BLV: Tensor) -> float:
    """Return the relative error of the median token's logits."""
    difference_BL = (found_BLV.float() - truth_BLV).norm(dim=-1)
    return float((difference_BL / truth_BLV.norm(dim=-1)).median())


def decode_speed(model: LanguageModel, rows: int, prompt: int = 128, steps: int = 256) -> dict[str, float]:
    """Time ``steps`` greedy steps after a prompt of random tokens, three times; the median."""
    tokens = torch.randint(0, model.config.vocab_size, (rows, prompt), device="cuda")
    with torch.inference_mode():
        graph = DecodeGraph(model, model(tokens).state)
    first, seconds = tokens[:, -1], []
    graph.greedy_steps(first, 16)
    for _ in range(3):
        torch.cuda.synchronize()
        start = perf_counter()
        first = graph.greedy_steps(first, steps)[-1]
        torch.cuda.synchronize()
        seconds.append((perf_counter() - start) / steps)
    taken = median(seconds)
    return {"tokens_per_second": rows / taken, "microseconds_per_step": 1e6 * taken}


def read(model: LanguageModel, length: int) -> tuple[ModelState, dict[str, float]]:
    """Read a prompt of ``length`` random tokens in chunks; return the state, tokens per second and peak memory."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
    state = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    start = perf_counter()
    with torch.inference_mode():
        for first in range(0, length, CHUNK):
            state = model.hidden_states(
                tokens[:, first : first + CHUNK], None, state, observe_routers=False
            ).state
    torch.cuda.synchronize()
    seconds = perf_counter() - start
    assert state is not None
    return state, {
        "prefill_tokens_per_second": length / seconds,
        "prefill_peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
        "state_mb": state.num_bytes / 1e6,
    }


def decode_growing(model: LanguageModel, state: ModelState, steps: int = 32) -> float:
    """Return seconds per token of one row whose state grows."""
    token, seconds = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), []
    with torch.inference_mode():
        for _ in range(steps):
            torch.cuda.synchronize()
            start = perf_counter()
            out = model(token, state=state, observe_routers=False)
            token, state = out.logits[:, -1:].argmax(-1), out.state
            torch.cuda.synchronize()
            seconds.append(perf_counter() - start)
    return median(seconds)


def over_context(preset: str, lengths: list[int]) -> list[dict[str, float]]:
    model, rows = build(preset, torch.bfloat16), []
    for length in lengths:
        try:
            read(model, min(length, 2 * CHUNK))  # compiles what this length needs
            state, row = read(model, length)
            if model.state_grows:
                seconds = decode_growing(model, state)
            else:
                graph = DecodeGraph(model, state)
                first = torch.zeros(1, dtype=torch.int64, device="cuda")
                graph.greedy_steps(first, 16)
                torch.cuda.synchronize()
                start = perf_counter()
                graph.greedy_steps(first, 256)
                torch.cuda.synchronize()
                seconds = (perf_counter() - start) / 256
        except torch.cuda.OutOfMemoryError:
            print(f"{preset}, {length} tokens: out of memory", flush=True)
            break
        rows.append({"length": length, **row, "decode_microseconds": 1e6 * seconds})
        print(preset, {name: round(value, 1) for name, value in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_decode.json"))
    parser.add_argument("--longest", type=int, default=2**20)
    options = parser.parse_args()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "errors": check(),
        "expert_errors": check_experts(),
    }
    print(f"the graph agrees with the forward pass in {len(results['errors'])} cases", flush=True)
    model = build("moe-mamba-25m", torch.bfloat16)
    results["decode"] = {}
    for rows, target in TARGETS.items():
        row = decode_speed(model, rows)
        results["decode"][rows] = row | {"target": target}
        verdict = "reached" if row["tokens_per_second"] >= target else "missed"
        print(
            f"decode, batch {rows}: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['microseconds_per_step']:.0f} µs a step; target {target:,}: {verdict}",
            flush=True,
        )
    del model
    lengths = [n for n in (2**10, 2**12, 2**14, 2**16, 2**18, 2**20) if n <= options.longest]
    results["context"] = {
        "moe-mamba-25m": over_context("moe-mamba-25m", lengths),
        "transformer-moe-25m": over_context("transformer-moe-25m", [n for n in lengths if n <= 2**16]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
