"""Training, forward and decode of a 25.6M-parameter MoE-Mamba on a CPU, beside Hugging Face's Jamba and Mixtral.

    make bench-cpu            # ours alone, or with the peers where transformers (and mambapy) are installed
    python -m benchmarks.cpu --threads 2 --repeats 5

All three have d_model 256, 6 blocks, 8 SwiGLU experts of width 512 (one per token), a vocabulary of 8000 and fp32
weights. Jamba runs with mamba.py's scan. The systems take turns inside each round, so that a busy machine hurts all of
them alike; the table gives medians and ratios. Before anything is timed, our model must agree with itself decoded step
by step in fp64.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from switchmamba.config import validate
from switchmamba.models.accounting import account
from switchmamba.models.config import ModelConfig
from switchmamba.models.language_model import LanguageModel
from switchmamba.ops import linear_cross_entropy

VOCABULARY, D_MODEL, BLOCKS, EXPERTS, D_EXPERT = 8000, 256, 6, 8, 512
OURS = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "num_blocks": BLOCKS,
    "pattern": ["mamba", "moe"],
    "norm": "layernorm",  # as in the paper; on a CPU torch fuses it, and RMSNorm it does not
    "layers": {
        "mamba": {"kind": "mamba"},
        "moe": {"kind": "moe", "num_experts": EXPERTS, "d_expert": D_EXPERT, "activation": "swiglu"},
    },
}
RESULTS = Path(__file__).parent / "results"


@dataclass
class System:
    """A model under test: how it computes a loss and logits."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Any]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def train(self, tokens: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(tokens).backward()
        self.optimizer.step()

    def forward(self, tokens: Tensor) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.logits(tokens)


def switchmamba() -> System:
    torch.manual_seed(0)
    model = LanguageModel(validate(ModelConfig, OURS, source="benchmark"))

    def loss(tokens: Tensor) -> Tensor:
        hidden, _, stats = model.hidden_states(tokens[:, :-1])
        balance = torch.stack([s.load_balance_loss for s in stats]).mean()
        return (
            linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
            + 0.01 * balance
        )

    return System("switchmamba", model, loss, lambda tokens: model(tokens))


def peers() -> list[System]:
    """Return Mixtral and Jamba, if transformers is installed."""
    try:
        from transformers import JambaConfig, JambaForCausalLM, MixtralConfig, MixtralForCausalLM
    except ImportError:
        print("transformers is not installed: measuring switchmamba alone (pip install 'switchmamba[bench]')")
        return []
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_EXPERT,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 2**17,
        "pad_token_id": None,
        "use_cache": False,
    }
    mixtral = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=EXPERTS))
    jamba = JambaForCausalLM(
        JambaConfig(
            **common,
            num_experts=EXPERTS,
            expert_layer_period=1,
            expert_layer_offset=0,
            attn_layer_period=2 * BLOCKS,
            attn_layer_offset=2 * BLOCKS - 1,
            use_mambapy=True,
        )
    )

    def system(name: str, model: Any) -> System:
        return System(
            name, model, lambda t: model(t, labels=t).loss, lambda t: model(t, output_router_logits=False)
        )

    return [system("HF Mixtral", mixtral), system("HF Jamba", jamba)]


def check() -> None:
    """Refuse to time a wrong model: the whole sequence and one token at a time must agree in fp64."""
    model = switchmamba().model.double().eval()
    tokens = torch.randint(0, VOCABULARY, (2, 40))
    with torch.no_grad():
        whole, state, steps = model(tokens).logits, None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], state=state)
            state = out.state
            steps.append(out.logits)
    error = float((torch.cat(steps, 1) - whole).norm() / whole.norm())
    if not error < 1e-10:
        raise SystemExit(f"step by step and whole differ by {error:.1e}: not timing a wrong model")


def seconds(run: Callable[[], None]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def compare(systems: list[System], shape: tuple[int, int], mode: str, repeats: int) -> dict[str, float]:
    """Return each system's tokens per second, median over interleaved rounds. Slow systems get fewer rounds."""
    batch, length = shape
    times: dict[str, list[float]] = {system.name: [] for system in systems}
    for _ in range(repeats + 1):
        tokens = torch.randint(0, VOCABULARY, (batch, length))
        for system in systems:
            taken = times[system.name]
            if len(taken) < 3 or sum(taken) < 60:
                taken.append(seconds(lambda s=system, t=tokens: getattr(s, mode)(t)))  # type: ignore[misc]
    return {name: batch * length / median(taken[1:] or taken) for name, taken in times.items()}


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that autograd keeps between forward and backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    kept = sum(storages.values())
    del result
    return kept


def lengths(ours: System, mixtral: System | None, longest: int) -> list[dict[str, float]]:
    """Return training and forward time and memory per token over the length, at batch 1."""
    rows = []
    length = 256
    while length <= longest:
        tokens = torch.randint(0, VOCABULARY, (1, length))
        row: dict[str, float] = {"length": length}
        row["saved_bytes_per_token"] = saved_bytes(lambda t=tokens: ours.loss(t), ours.model) / length  # type: ignore[misc]
        for system in [ours] + ([mixtral] if mixtral and length <= 8192 else []):
            for mode in ("train", "forward"):
                taken = [seconds(lambda s=system, m=mode, t=tokens: getattr(s, m)(t)) for _ in range(3)]  # type: ignore[misc]
                row[f"{system.name} {mode}"] = length / min(taken)
        rows.append(row)
        print("  " + "  ".join(f"{name} {value:,.0f}" for name, value in row.items()), flush=True)
        length *= 2
    return rows


_DECODE_GOALS = {"after 4096 tokens, median": " (target 150)", "after 4096 tokens, best": " (target 150)"}


def decode(ours: System, tokens: int) -> dict[str, float]:
    """Return tokens per second of greedy decode at batch 1, near the start and after 4096 tokens of context.

    The median and the best of eight rounds: a step is short, and a shared machine's other work is seen in it.
    """
    model = ours.model.eval()
    assert isinstance(model, LanguageModel)
    rates = {}
    with torch.inference_mode():
        for context in (16, 4096):
            out = model(torch.randint(0, VOCABULARY, (1, context)))
            token, state = out.logits[:, -1:].argmax(-1), out.state
            speeds = []
            for _ in range(9):
                start = perf_counter()
                for _ in range(tokens):
                    out = model(token, state=state, observe_routers=False)
                    token, state = out.logits[:, -1:].argmax(-1), out.state
                speeds.append(tokens / (perf_counter() - start))
            rates[f"after {context} tokens, median"] = median(speeds[1:])
            rates[f"after {context} tokens, best"] = max(speeds[1:])
            rates[f"state bytes after {context} tokens"] = state.num_bytes
    return rates


def explain_memory(config: ModelConfig) -> str:
    counted = account(config)
    parts = ", ".join(f"{kind} {values}" for kind, values in {
        layer.kind: cost.activation_values for layer, cost in zip(counted.layers, counted.costs, strict=True)
    }.items())  # fmt: skip
    return (
        f"expected from the configuration: {4 * counted.activation_values_per_token:,} bytes per token "
        f"(values per layer: {parts}; one residual and one norm of {config.d_model} per step)"
    )


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


TARGETS = {
    ("train", "8 × 256"): {"HF Mixtral": 0.6, "HF Jamba": 15},
    ("train", "2 × 1024"): {"HF Mixtral": 0.6, "HF Jamba": 5},
    ("forward", "8 × 256"): {"HF Mixtral": 0.6, "HF Jamba": 20},
    ("forward", "2 × 1024"): {"HF Mixtral": 0.6, "HF Jamba": 20},
}


def ratio_table(speeds: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    rows = [
        "| mode | batch × length | system | tokens/s | ours is | target |",
        "|---|---|---|---:|---:|---:|",
    ]
    for mode, shapes in speeds.items():
        for shape, systems in shapes.items():
            ours = systems["switchmamba"]
            for name, rate in systems.items():
                target = TARGETS[mode, shape].get(name)
                ratio = "" if name == "switchmamba" else f"{ours / rate:.2f} ×"
                verdict = (
                    ""
                    if target is None
                    else f"≥ {target} ×: {'reached' if ours / rate >= target else 'missed'}"
                )
                rows.append(f"| {mode} | {shape} | {name} | {rate:,.0f} | {ratio} | {verdict} |")
    return rows


def report(results: dict[str, Any]) -> str:
    rows = [
        "# CPU benchmark",
        "",
        f"`python -m benchmarks.cpu --threads {results['threads']}` on {results['cpu']}, {results['threads']} threads, "
        f"torch {results['torch']}, fp32, 25.6M parameters (d_model 256, 6 blocks, 8 SwiGLU experts of 512, V = 8000; "
        "LayerNorm in ours, RMSNorm in the peers).",
        "",
        *ratio_table(results["speeds"]),
        "",
        "## Length, batch 1",
        "",
    ]
    columns = sorted(
        {
            name
            for row in results["lengths"]
            for name in row
            if name not in ("length", "saved_bytes_per_token")
        }
    )
    rows.append(
        "| length | kept for backward, bytes per token | "
        + " | ".join(f"{c}, tokens/s" for c in columns)
        + " |"
    )
    rows.append("|---:|---:|" + "---:|" * len(columns))
    for row in results["lengths"]:
        cells = [f"{row[c]:,.0f}" if c in row else "–" for c in columns]
        rows.append(
            f"| {row['length']:,} | {row['saved_bytes_per_token']:,.0f} | " + " | ".join(cells) + " |"
        )
    rows += ["", results["memory"], "", "## Decode, batch 1", "", "| | |", "|---|---:|"]
    rows += [
        f"| {'' if 'bytes' in name else 'tokens/s '}{name}{_DECODE_GOALS.get(name, '')} | {value:,.0f} |"
        for name, value in results["decode"].items()
    ]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    systems = [switchmamba(), *peers()]
    speeds: dict[str, dict[str, dict[str, float]]] = {"train": {}, "forward": {}}
    for shape in ((8, 256), (2, 1024)):
        for mode, shapes in speeds.items():
            shapes[f"{shape[0]} × {shape[1]}"] = compare(systems, shape, mode, options.repeats)
            print(
                mode, shape, {k: round(v) for k, v in shapes[f"{shape[0]} × {shape[1]}"].items()}, flush=True
            )
    ours = systems[0]
    results = {
        "cpu": cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "speeds": speeds,
        "lengths": lengths(ours, next((s for s in systems if s.name == "HF Mixtral"), None), options.longest),
        "memory": explain_memory(ours.model.config),  # type: ignore[arg-type]
        "decode": decode(ours, 50),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "cpu.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
