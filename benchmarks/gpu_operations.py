"""Times of single operations and of the Mamba mixer, beside peers, floors and targets.

Peers' figures are measured here where the peer is installed, and quoted from an earlier run on an H200 otherwise.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.gpu_report import BANDWIDTH, MATMUL, Row, show
from benchmarks.gpu_timing import forward_backward_calls, forward_calls, milliseconds, milliseconds_in_turns
from switchmamba.layers.initialization import SCHEMES
from switchmamba.layers.interface import SequenceInfo
from switchmamba.layers.mixers.mamba import MambaConfig
from switchmamba.ops import causal_conv1d, expert_feed_forward, linear_cross_entropy, selective_scan

bf16 = torch.bfloat16
SCANS = {
    (64, 1024, 1024): ((1.120, 5.675), (0.44, 1.4)),
    (32, 1024, 1536): ((0.840, 4.268), (0.33, 1.05)),
    (8, 2048, 2048): ((0.592, 2.888), (0.24, 0.75)),
    (1, 65536, 1024): ((1.460, 7.177), (0.6, 1.8)),
}
"""(B, L, d_inner): mamba_ssm's forward and forward + backward in ms, and the targets."""
CONVOLUTION = (0.076, 0.264)
"""causal_conv1d's at (64, 1024, 1024); the target is to be no slower."""
MIXERS = {
    (512, 64, 1024): ((1.67, 7.62), 2.8, 0.97),
    (768, 32, 1024): ((1.36, 6.10), 2.5, 1.08),
    (1024, 8, 2048): ((1.03, 4.32), 1.95, 0.96),
    (2048, 8, 2048): ((2.57, 9.99), 5.8, 3.81),
}
"""(d_model, B, L): mamba_ssm's fused mixer, the target forward + backward, and its matrix products alone."""
EXPERTS = {
    (512, 1536, 42): ((0.985, 2.159), 1.5),
    (768, 2304, 42): ((1.529, 3.668), 2.9),
    (1024, 2048, 64): ((1.765, 4.261), 3.4),
    (512, 1536, 256): ((1.114, 2.673), 1.9),
}
"""(d_model, d_expert, experts), 65,536 tokens: torch's grouped_mm with eager sorting, the target forward + backward."""
TOKENS = 65536


def measure(device: torch.device) -> list[Row]:
    rows = [row for shape in SCANS for row in scan(*shape, device)]
    rows += convolution(device)
    rows += [row for shape in EXPERTS for row in experts(*shape, device)]
    rows += head(device)
    return rows


def scan(batch: int, length: int, channels: int, device: torch.device) -> list[Row]:
    quoted, targets = SCANS[batch, length, channels]
    sets = [_scan_inputs(batch, length, channels, device) for _ in range(3)]
    kernel = gpu_peers.scan()
    peer = None if kernel is None else (kernel, [gpu_peers.scan_arguments(inputs) for inputs in sets])

    def ours(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        return selective_scan(x, dt, A, B, C, D, z, bias, dt_softplus=True)

    tensor_ms = 1000 * 2 * batch * length * channels / BANDWIDTH
    name = f"selective_scan {batch}×{length}×{channels}"
    return _two_rows(name, ours, sets, peer, "mamba_ssm", quoted, targets, (4 * tensor_ms, 11 * tensor_ms))


def convolution(device: torch.device) -> list[Row]:
    shape = (64, 1024, 1024)
    sets = [
        [
            torch.randn(64, 1024, 2048, device=device, dtype=bf16)[..., :1024].requires_grad_(),
            torch.randn(1024, 4, device=device, requires_grad=True),
            torch.randn(1024, device=device, requires_grad=True),
        ]
        for _ in range(3)
    ]
    kernel = gpu_peers.convolution()
    tensor_ms = 1000 * 2 * shape[0] * shape[1] * shape[2] / BANDWIDTH
    return _two_rows(
        "causal_conv1d 64×1024×1024",
        lambda x, weight, bias: causal_conv1d(x, weight, bias, "silu"),
        sets,
        None if kernel is None else (kernel, sets),
        "causal_conv1d",
        CONVOLUTION,
        CONVOLUTION,
        (2 * tensor_ms, 5 * tensor_ms),
    )


def experts(d_model: int, d_expert: int, num_experts: int, device: torch.device) -> list[Row]:
    quoted, target = EXPERTS[d_model, d_expert, num_experts]
    sets = []
    for _ in range(3):
        w1 = torch.randn(num_experts, d_expert, d_model, device=device, dtype=bf16) / d_model**0.5
        w2 = torch.randn(num_experts, d_model, d_expert, device=device, dtype=bf16) / d_expert**0.5
        x = torch.randn(TOKENS, d_model, device=device, dtype=bf16)
        index = torch.randint(0, num_experts, (TOKENS, 1), device=device)
        weight = torch.rand(TOKENS, 1, device=device)
        tensors = [x, index, weight, w1, w2]
        sets.append([t.requires_grad_() if t.is_floating_point() else t for t in tensors])
    dense = [
        [x, w1[0].detach().requires_grad_(), w2[0].detach().requires_grad_()] for x, _, _, w1, w2 in sets
    ]
    run_dense: Callable[..., Tensor] = lambda x, w1, w2: F.linear(F.relu(F.linear(x, w1)), w2)  # noqa: E731
    ceiling = milliseconds(forward_backward_calls(run_dense, dense))
    flops = 2 * 2 * TOKENS * d_model * d_expert
    floors = (1000 * flops / MATMUL, 3000 * flops / MATMUL)
    rows = _two_rows(
        f"expert_feed_forward d{d_model} F{d_expert} E{num_experts}",
        lambda x, index, weight, w1, w2: expert_feed_forward(x, index, weight, w1, w2, "relu"),
        sets,
        None,
        "grouped_mm, eager sort",
        quoted,
        (None, target),
        floors,
    )
    both = rows[1]
    share = f"{100 * ceiling / both.ours:.0f}% of a dense feed-forward's in the same run"
    note = f"{3e-9 * flops / both.ours:.0f} TFLOP/s, {share}"
    rows[1] = show(Row(**{**vars(both), "note": note}))
    return rows


def head(device: torch.device, d_model: int = 512, vocab_size: int = 50257) -> list[Row]:
    """Time the chunked loss, and the plain path on a vocabulary that is padded for it, where all logits exist."""
    x = torch.randn(TOKENS, d_model, device=device, dtype=bf16, requires_grad=True)
    weight = (torch.randn(vocab_size, d_model, device=device, dtype=bf16) / 8).requires_grad_()
    padded = F.pad(weight.detach(), (0, 0, 0, -vocab_size % 128)).requires_grad_()
    target = torch.randint(0, vocab_size, (TOKENS,), device=device)

    def ours() -> None:
        torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))

    def plain() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, padded), target), (x, padded))

    ours()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    taken, taken_plain = milliseconds_in_turns([[ours], [plain]], 2, 7)
    torch.cuda.empty_cache()
    what = f"linear_cross_entropy {TOKENS}×{d_model}×{vocab_size}"
    floor = 3000 * 2 * TOKENS * d_model * vocab_size / MATMUL
    return [
        show(
            Row(
                f"{what}, forward + backward",
                taken,
                peer=taken_plain,
                peer_name="F.linear, F.cross_entropy",
                peer_here=True,
                floor=floor,
                target=1.1 * taken_plain,
            )
        ),
        show(Row(f"{what}, peak memory beside the inputs", peak, "GB", target=2.0)),
    ]


def measure_mixers(device: torch.device) -> list[Row]:
    return [mixer(*shape, device) for shape in MIXERS]


def mixer(d_model: int, batch: int, length: int, device: torch.device) -> Row:
    """Time a Mamba layer under bf16 autocast, forward and backward, on a bf16 input as its norm gives it."""
    (_, quoted), target, floor = MIXERS[d_model, batch, length]
    layer = MambaConfig().build(d_model)
    layer.initialize(SCHEMES["paper"](num_residual_steps=8))
    layer.to(device)
    position_B = torch.zeros(batch, dtype=torch.int64, device=device)
    sequence = SequenceInfo(None, None, position_B, position_B)
    sets = [
        [torch.randn(batch, length, d_model, device=device, dtype=bf16, requires_grad=True)] for _ in range(3)
    ]

    def ours(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=bf16):
            return layer(x, sequence).y

    contestants = [forward_backward_calls(ours, sets, list(layer.parameters()))]
    theirs = gpu_peers.mixer(d_model, device)
    if theirs is not None:

        def run(x: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=bf16):
                return theirs(x)

        contestants.append(forward_backward_calls(run, sets, list(theirs.parameters())))
    taken, *rest = milliseconds_in_turns(contestants)
    return show(
        Row(
            f"Mamba mixer d{d_model} {batch}×{length}, forward + backward",
            taken,
            peer=rest[0] if rest else quoted,
            peer_name="mamba_ssm",
            peer_here=bool(rest),
            floor=floor,
            target=target,
            note="floor: its matrix products alone",
        )
    )


def _scan_inputs(batch: int, length: int, channels: int, device: torch.device) -> list[Tensor]:
    """B and C are slices of a projection's output, as in a Mamba layer."""
    projected = torch.randn(batch, length, 32 + 32, device=device, dtype=bf16)
    x, dt, z = (torch.randn(batch, length, channels, device=device, dtype=bf16) for _ in range(3))
    A = -torch.arange(1.0, 17.0, device=device).repeat(channels, 1)
    D, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)
    tensors = [x, dt, A, projected[..., 32:48].detach(), projected[..., 48:].detach(), D, z, bias]
    return [tensor.requires_grad_() for tensor in tensors]


def _two_rows(
    name: str,
    ours: Callable[..., Tensor],
    sets: Sequence[Sequence[Tensor]],
    peer: tuple[Callable[..., Tensor], Sequence[Sequence[Tensor]]] | None,
    peer_name: str,
    quoted: tuple[float, float],
    targets: tuple[float | None, float | None],
    floors: tuple[float, float],
) -> list[Row]:
    """Time the forward pass, and forward and backward together."""
    rows = []
    calls_of = {"forward": forward_calls, "forward + backward": forward_backward_calls}
    for i, (pass_name, calls) in enumerate(calls_of.items()):
        contestants = [calls(ours, sets)]
        if peer is not None:
            contestants.append(calls(*peer))
        taken, *rest = milliseconds_in_turns(contestants)
        row = Row(
            f"{name}, {pass_name}",
            taken,
            peer=rest[0] if rest else quoted[i],
            peer_name=peer_name,
            peer_here=bool(rest),
            floor=floors[i],
            target=targets[i],
        )
        rows.append(show(row))
    return rows
