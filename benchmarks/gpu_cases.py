"""Cases on which every operation's backends are held against the reference in fp64, outputs and all gradients.

A backend may err twice as much as the reference does in the same dtype, and a floor of a few roundings. It runs twice,
the second time in memory full of NaN, and must give the same bits.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from switchmamba.ops import (
    causal_conv1d,
    causal_conv1d_step,
    causal_conv1d_twice,
    expert_capacity,
    expert_feed_forward,
    gated_rms_norm,
    linear_cross_entropy,
    mamba2_inner,
    operations,
    residual_norm,
    selective_scan,
    selective_step,
    ssd_scan,
    ssd_step,
    switch_router,
)


def routed(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    """What of the router's results has a gradient."""
    found = switch_router(x, weight, backend)
    return found.weight_T1, found.probability_sum_E, found.squared_logsumexp_sum, found.x_TD


def convolved(twice: bool = False, **inputs: Any) -> Any:
    """Return what the convolution does, or that whose output goes two ways."""
    if not twice:
        return causal_conv1d(**inputs)
    del inputs["return_final_state"]
    return causal_conv1d_twice(**inputs)


def limited(expert_index: Tensor, backend: str, capacity: int | None = None, **inputs: Any) -> Tensor:
    """Return the experts' output, if asked for of those that keep no more than a capacity."""
    if capacity is not None:
        # Another operation, whose backends have other names; of the truth it must be the reference too.
        limit = "reference" if backend == "reference" else "auto"
        expert_index = expert_capacity(expert_index, len(inputs["w1"]), capacity, limit)
    return expert_feed_forward(expert_index=expert_index, backend=backend, **inputs)


OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        selective_scan,
        selective_step,
        causal_conv1d_step,
        linear_cross_entropy,
        ssd_scan,
        ssd_step,
        gated_rms_norm,
        mamba2_inner,
        residual_norm,
    )
} | {"switch_router": routed, "causal_conv1d": convolved, "expert_feed_forward": limited}
FLOORS = {torch.float32: 8 * 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Error that is always allowed: eight roundings in fp32, half a unit in the last place of the others' outputs."""


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Attributes:
        make: returns the keyword arguments, floating ones in fp64 on the CPU.
        dtype: of the arguments named in ``narrow``; the others are fp32.
        strides: None; "slices": channels are half of a wider tensor's; "transposed": channels lie apart.
        autocast: everything is fp32, and bf16 autocast is on.
    """

    name: str
    operation: str
    make: Callable[[], dict[str, Any]]
    dtype: torch.dtype = torch.float32
    narrow: frozenset[str] = frozenset()
    strides: str | None = None
    autocast: bool = False


@dataclass
class Finding:
    """The worst of what one case found for one backend; ``error`` and ``allowed`` are of the worst quantity."""

    case: str
    operation: str
    backend: str
    dtype: str
    quantity: str = ""
    error: float = 0.0
    allowed: float = 1.0
    problems: list[str] = field(default_factory=list)

    @property
    def correct(self) -> bool:
        return not self.problems and self.error <= self.allowed


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan(
    rows: int = 2,
    length: int = 63,
    channels: int = 48,
    states: int = 16,
    groups: int = 1,
    decay: float = 1.0,
    resets: bool = False,
    optional: bool = True,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "x": _random(rows, length, channels),
        "dt": _random(rows, length, channels) if optional else _random(rows, length, channels).abs(),
        "A": -decay * torch.rand(channels, states, dtype=torch.float64).mul(16),
        "B": _random(rows, length, groups, states),
        "C": _random(rows, length, groups, states),
        "return_final_state": True,
    }
    if groups == 1:
        inputs |= {name: inputs[name].squeeze(2) for name in "BC"}
    if optional:
        inputs |= {"D": _random(channels), "z": _random(rows, length, channels), "dt_softplus": True}
        inputs |= {"dt_bias": _random(channels) - 3, "initial_state": _random(rows, channels, states)}
    if resets:
        inputs["document_ids"] = (torch.rand(rows, length) < 0.1).long().cumsum(1)
    return inputs


def step(rows: int = 5, channels: int = 48, states: int = 16) -> dict[str, Any]:
    inputs = scan(rows, 1, channels, states)
    inputs["state"] = inputs.pop("initial_state")
    del inputs["return_final_state"]
    return {n: v.squeeze(1) if n in ("x", "dt", "z", "B", "C") else v for n, v in inputs.items()}


def convolution(
    rows: int = 2,
    length: int = 63,
    channels: int = 48,
    width: int = 4,
    resets: bool = False,
    optional: bool = True,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {"x": _random(rows, length, channels), "weight": _random(channels, width)}
    inputs["return_final_state"] = True
    if optional:
        inputs |= {"bias": _random(channels), "activation": "silu"}
        inputs["initial_state"] = _random(rows, width - 1, channels)
    if resets:
        inputs["document_ids"] = (torch.rand(rows, length) < 0.1).long().cumsum(1)
    return inputs


def convolution_step(rows: int = 5, channels: int = 48) -> dict[str, Any]:
    inputs = convolution(rows, 1, channels)
    inputs["state"] = inputs.pop("initial_state")
    del inputs["return_final_state"]
    return inputs | {"x": inputs["x"].squeeze(1)}


def experts(
    tokens: int = 1000,
    num_experts: int = 7,
    choices: int = 2,
    d_model: int = 64,
    d_expert: int = 96,
    activation: str = "relu",
    route: Callable[[int, int, int], Tensor] = lambda t, k, e: torch.randint(0, e + 1, (t, k)),
    capacity: int | None = None,
    d_out: int | None = None,
) -> dict[str, Any]:
    hidden = 2 * d_expert if activation == "swiglu" else d_expert
    return {
        "x": _random(tokens, d_model),
        "expert_index": route(tokens, choices, num_experts),
        "expert_weight": torch.rand(tokens, choices, dtype=torch.float64),
        "w1": _random(num_experts, hidden, d_model) / d_model**0.5,
        "w2": _random(num_experts, d_out or d_model, d_expert) / d_expert**0.5,
        "activation": activation,
        "capacity": capacity,
    }


def head(tokens: int = 1000, d_model: int = 64, vocabulary: int = 777) -> dict[str, Any]:
    target = torch.randint(0, vocabulary, (tokens,))
    target[::7] = -100
    return {"x": _random(tokens, d_model), "weight": _random(vocabulary, d_model) / 8, "target": target}


def ssd(
    rows: int = 2,
    length: int = 63,
    heads: int = 8,
    head_dim: int = 64,
    states: int = 128,
    groups: int = 1,
    decay: float = 1.0,
    resets: bool = False,
    optional: bool = True,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "x": _random(rows, length, heads, head_dim),
        "dt": _random(rows, length, heads) if optional else _random(rows, length, heads).abs() / 8,
        "A": -decay * (1 + 15 * torch.rand(heads, dtype=torch.float64)),
        "B": _random(rows, length, groups, states),
        "C": _random(rows, length, groups, states),
        "return_final_state": True,
    }
    if optional:
        inputs |= {"D": _random(heads), "dt_bias": _random(heads) - 3, "dt_softplus": True}
        inputs["initial_state"] = _random(rows, heads, head_dim, states)
    if resets:
        inputs["document_ids"] = (torch.rand(rows, length) < 0.02).long().cumsum(1)
    return inputs


def ssd_one(rows: int = 5, groups: int = 2) -> dict[str, Any]:
    inputs = ssd(rows, 1, groups=groups)
    inputs["state"] = inputs.pop("initial_state")
    del inputs["return_final_state"]
    return {n: v.squeeze(1) if n in ("x", "dt", "B", "C") else v for n, v in inputs.items()}


def inner(
    rows: int = 2, length: int = 65, heads: int = 8, groups: int = 1, resets: bool = False
) -> dict[str, Any]:
    channels, shared = 64 * heads, 2 * groups * 128
    inputs: dict[str, Any] = {
        "projected": _random(rows, length, 2 * channels + shared + heads),
        "conv_weight": _random(channels + shared, 4),
        "conv_bias": _random(channels + shared),
        "A": -(1 + 15 * torch.rand(heads, dtype=torch.float64)),
        "D": _random(heads),
        "dt_bias": _random(heads) - 3,
        "norm_weight": _random(channels),
        "d_state": 128,
        "num_groups": groups,
        "conv_state": _random(rows, 3, channels + shared),
        "ssm_state": _random(rows, heads, 64, 128),
    }
    if resets:
        inputs["document_ids"] = (torch.rand(rows, length) < 0.02).long().cumsum(1)
    return inputs


def norm(*shape: int, groups: int = 1) -> dict[str, Any]:
    return {"x": _random(*shape), "z": _random(*shape), "weight": _random(shape[-1]), "groups": groups}


def residual(*shape: int, branch: bool = True, centered: bool = True) -> dict[str, Any]:
    inputs = {"x": 3 * _random(*shape) + 1, "weight": _random(shape[-1]), "centered": centered}
    if branch:
        inputs["branch"] = _random(*shape)
    return inputs | ({"bias": _random(shape[-1])} if centered else {})


def routing(tokens: int = 1000, d_model: int = 64, experts: int = 42) -> dict[str, Any]:
    return {"x": _random(tokens, d_model), "weight": _random(experts, d_model) / d_model**0.5}


def cases() -> list[Case]:
    """Return all cases, the slowest to compile first."""
    every = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    narrow = {
        "selective": frozenset(("x", "dt", "B", "C", "z")),
        "causal": frozenset(("x", "initial_state", "state")),
        "expert": frozenset(("x", "w1", "w2")),
        "linear": frozenset(("x", "weight")),
        "ssd": frozenset(("x", "dt", "B", "C")),
        "gated": frozenset(("x", "z")),
        "mamba2": frozenset(("projected", "conv_state")),
        "residual": frozenset(("x", "branch")),
        "switch": frozenset(("x",)),
    }
    found: list[Case] = []

    def add(operation: str, name: str, make: Callable[[], dict[str, Any]], dtype: str, **how: Any) -> None:
        names = narrow[operation.split("_")[0]]
        found.append(Case(f"{name}, {dtype}", operation, make, every[dtype], names, **how))

    for dtype in every:
        add("selective_scan", "length 63", scan, dtype)
        add("selective_scan", "length 1", lambda: scan(length=1), dtype)
        add("selective_scan", "extreme decay", lambda: scan(decay=1e4), dtype)
        add(
            "selective_scan", "length 1000, documents, groups", lambda: scan(1, 1000, 96, 16, 3, resets=True), dtype
        )  # fmt: skip
        add("selective_step", "step", step, dtype)
        add("causal_conv1d", "length 63", convolution, dtype)
        add("causal_conv1d", "length 1", lambda: convolution(length=1), dtype)
        add("causal_conv1d", "length 1000, documents", lambda: convolution(2, 1000, 341, resets=True), dtype)
        add("causal_conv1d_step", "step", convolution_step, dtype)
    for dtype in ("fp32", "bf16"):
        add("selective_scan", "many rows and channels", lambda: scan(64, 24, 512), dtype)
        add("selective_scan", "slices", lambda: scan(2, 64, 96), dtype, strides="slices")
        add("linear_cross_entropy", "head", head, dtype)
    add("selective_scan", "transposed", lambda: scan(2, 63, 24), "fp32", strides="transposed")
    add("selective_scan", "nothing optional", lambda: scan(optional=False), "fp32")
    add("selective_scan", "341 channels, 5 states", lambda: scan(2, 63, 341, 5), "fp32")
    add("selective_scan", "few channels, 600 steps", lambda: scan(1, 600, 40, resets=True), "bf16")
    add("selective_scan", "200 states", lambda: scan(1, 20, 20, 200), "fp32")
    add("selective_scan", "64 states", lambda: scan(1, 40, 20, 64), "fp32")
    add("causal_conv1d", "slices", lambda: convolution(2, 64, 96), "bf16", strides="slices")
    for dtype in ("fp32", "bf16"):
        add(
            "causal_conv1d", "twice, documents", lambda: convolution(2, 200, 96, resets=True) | {"twice": True}, dtype
        )  # fmt: skip
    add("causal_conv1d", "transposed", lambda: convolution(2, 63, 24), "fp32", strides="transposed")
    add("causal_conv1d", "two taps, nothing optional", lambda: convolution(width=2, optional=False), "fp32")

    for dtype in every:
        add("ssd_scan", "length 63", ssd, dtype)
        add("ssd_scan", "length 1", lambda: ssd(length=1), dtype)
        add("ssd_scan", "extreme decay", lambda: ssd(length=130, decay=1e4), dtype)
        add("ssd_scan", "length 1000, documents, groups", lambda: ssd(1, 1000, groups=2, resets=True), dtype)
        add("ssd_scan", "many rows and heads", lambda: ssd(16, 130, 16), dtype)
        add("ssd_scan", "odd sizes", lambda: ssd(2, 65, 24, 24, 20, groups=3), dtype)
        add("ssd_step", "step", ssd_one, dtype)
        add("gated_rms_norm", "norm", lambda: norm(2, 65, 1024), dtype)
        add("gated_rms_norm", "many rows, groups", lambda: norm(3000, 96, groups=3), dtype)
    for dtype in every:
        add("linear_cross_entropy", "vocabulary 50257", lambda: head(300, 96, 50257), dtype)
        add("linear_cross_entropy", "token losses", lambda: head(1000) | {"reduction": "none"}, dtype)
        add("linear_cross_entropy", "one token, chunks of 7", lambda: head(1) | {"chunk_size": 7}, dtype)
        add("linear_cross_entropy", "chunks of 64", lambda: head(1000, 64, 4096) | {"chunk_size": 64}, dtype)
        add("residual_norm", "layer norm", lambda: residual(3, 333, 512), dtype)
        add("residual_norm", "rms norm", lambda: residual(63, 40, centered=False), dtype)
        add("residual_norm", "many rows, no branch", lambda: residual(5000, 96, branch=False), dtype)
        add("residual_norm", "wide", lambda: residual(9, 2500), dtype)
    add("residual_norm", "slices", lambda: residual(70, 64), "bf16", strides="slices")
    found.append(Case("head, autocast", "linear_cross_entropy", head, torch.float32, autocast=True))
    found.append(
        Case("norm, autocast", "residual_norm", lambda: residual(70, 512), torch.float32, autocast=True)
    )
    add("switch_router", "42 experts", routing, "bf16")
    add("switch_router", "256 experts", lambda: routing(3000, 768, 256), "bf16")
    add("switch_router", "one token, three experts", lambda: routing(1, 16, 3), "bf16")
    add("switch_router", "transposed", lambda: routing(63, 40, 7), "bf16", strides="transposed")
    for dtype in ("fp32", "bf16"):
        add("mamba2_inner", "inner", inner, dtype)
        add("mamba2_inner", "documents, groups", lambda: inner(2, 200, 8, 2, resets=True), dtype)
    add("ssd_scan", "wide heads and states", lambda: ssd(1, 70, 2, 128, 256), "bf16")
    add("ssd_scan", "slices", lambda: ssd(2, 130), "bf16", strides="slices")
    add("ssd_scan", "transposed", lambda: ssd(2, 65), "bf16", strides="transposed")
    add("ssd_scan", "nothing optional", lambda: ssd(optional=False), "fp32")
    add("gated_rms_norm", "slices", lambda: norm(2, 65, 2048), "bf16", strides="slices")

    def add_experts(name: str, strides: str | None = None, **inputs: Any) -> None:
        for dtype in every:
            add("expert_feed_forward", name, lambda: experts(**inputs), dtype, strides=strides)
        case = found[-1]
        found.append(Case(f"{name}, autocast", case.operation, case.make, torch.float32, autocast=True))

    several = {"tokens": 3000, "num_experts": 5, "choices": 1, "d_model": 328}
    for activation in ("relu", "gelu", "silu", "swiglu"):
        add_experts(activation, activation=activation)
        add_experts(f"{activation}, top 1, several tiles", activation=activation, d_expert=520, **several)
    add_experts("256 experts", num_experts=256, choices=1)
    add_experts("all to one", route=lambda t, k, e: torch.full((t, k), 3))
    add_experts("all dropped", route=lambda t, k, e: torch.full((t, k), e))
    add_experts("limited capacity", capacity=100)
    add_experts("one token", tokens=1)
    add_experts("more experts than tokens", tokens=63, num_experts=300, choices=1)
    add_experts("odd widths", tokens=63, d_model=36, d_expert=50, activation="swiglu")
    projecting = {"tokens": 3000, "num_experts": 5, "choices": 1, "d_expert": 352}
    add_experts("inner MoE, inwards", d_model=328, d_out=648, **projecting)
    add_experts("inner MoE, outwards", d_model=648, d_out=328, **projecting)
    add_experts("wider output, odd widths, top 2", tokens=63, d_model=13, d_expert=50, d_out=77)
    add_experts("transposed", strides="transposed")
    add_experts("top 1, transposed", strides="transposed", choices=1)
    return found


def check(case: Case, device: torch.device) -> list[Finding]:
    """Compare every backend that serves the case's inputs with the reference."""
    torch.manual_seed(0)
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in case.make().items()}
    rounded = {n: _rounded(case, n, v) for n, v in inputs.items()}
    run = OPERATIONS[case.operation]
    truth = results(run, rounded, "reference", torch.float64)
    with _autocast(case, device):
        reference = results(run, rounded, "reference")
    product_dtype = torch.bfloat16 if case.autocast else case.dtype
    (operation,) = (o for o in operations() if o.name == case.operation)
    report = operation.report(device, product_dtype)
    backends = [n for n, state in report.items() if n != "reference" and state in ("chosen", "available")]
    findings = []
    for backend in backends:
        finding = Finding(case.name, case.operation, backend, str(product_dtype).removeprefix("torch."))
        try:
            with _autocast(case, device):
                found = results(run, rounded, backend, strides=case.strides)
                with _memory_full_of_nan(device):
                    again = results(run, rounded, backend, strides=case.strides)
        except Exception as error:  # a kernel that does not compile must not hide what the others find
            finding.problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
            findings.append(finding)
            continue
        worst = 0.0
        for name, true_value in truth.items():
            error = distance(found[name], true_value)
            allowed = 2 * distance(reference[name], true_value) + FLOORS[product_dtype]
            if not error / allowed <= worst:
                worst = error / allowed
                finding.quantity, finding.error, finding.allowed = name, error, allowed
            if not torch.equal(found[name], again[name]):
                finding.problems.append(f"{name} differs from run to run, or reads memory it did not write")
        findings.append(finding)
    return findings


def results(
    run: Callable[..., Any],
    inputs: dict[str, Any],
    backend: str,
    dtype: torch.dtype | None = None,
    strides: str | None = None,
) -> dict[str, Tensor]:
    """Outputs, and gradients of the floating inputs under fixed gradients of the outputs, as fp64."""
    leaves = {
        n: v.detach().to(dtype or v.dtype).requires_grad_() if _floating(v) else v for n, v in inputs.items()
    }
    outputs = run(**{n: _strided(v, strides) for n, v in leaves.items()}, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs
    ]
    torch.autograd.backward(outputs, cotangents)
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    found |= {f"gradient of {n}": v.grad for n, v in leaves.items() if _floating(v)}
    return {n: v.detach().double() for n, v in found.items()}


def distance(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinity for NaN."""
    error = float((found - truth).norm() / truth.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _rounded(case: Case, name: str, value: Any) -> Any:
    if not _floating(value):
        return value
    return value.to(case.dtype if name in case.narrow else torch.float32)


def _strided(value: Any, strides: str | None) -> Any:
    if strides is None or not _floating(value) or value.dim() < 2:
        return value
    if strides == "slices":
        return torch.cat([value, value], dim=-1)[..., : value.shape[-1]]
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _autocast(case: Case, device: torch.device) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16) if case.autocast else nullcontext()


@contextmanager
def _memory_full_of_nan(device: torch.device) -> Iterator[None]:
    """Fill with NaN what torch.empty returns, and the blocks that the allocator has in store for others."""
    if device.type == "cuda":
        stored = [torch.full((size,), torch.nan, device=device) for size in [1 << 16] * 64 + [1 << 27]]
        del stored
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
