"""Speed of single operations on the CPU, each beside what it is measured against.

    python -m benchmarks.operations --threads 2 --repeats 30

The rivals take turns inside each round, so that a busy machine hurts all of them alike; the table gives the fastest
and the median round. One thread is timed by its own processor time, which a busy machine disturbs less. Before
anything is timed, backend and reference must agree.
"""

import argparse
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, thread_time

import torch
from torch import Tensor
from torch.nn import functional as F

from switchmamba.ops import causal_conv1d, expert_feed_forward, linear_cross_entropy

Rivals = Mapping[str, Callable[[], object]]


def convolution(batch: int = 8, length: int = 256, channels: int = 512) -> tuple[str, Rivals]:
    """Depthwise convolution and SiLU on half of a projection's output, as in a Mamba layer."""
    x = torch.randn(batch, length, 2 * channels)[..., :channels].requires_grad_()
    weight, bias = torch.randn(channels, 4, requires_grad=True), torch.randn(channels, requires_grad=True)
    dy = torch.randn(batch, length, channels)

    def ours(backend: str) -> Tensor:
        return causal_conv1d(x, weight, bias, "silu", backend=backend)

    def torchs() -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=channels)
        return F.silu(y[..., :length]).transpose(1, 2)

    systems = {"cpu": lambda: ours("cpu"), "reference": lambda: ours("reference"), "F.conv1d": torchs}
    inputs = (x, weight, bias)
    return f"causal_conv1d, B={batch} L={length} I={channels} W=4, SiLU", _both_ways(systems, inputs, dy)


def experts(
    tokens: int = 2048, d_model: int = 256, num_experts: int = 8, d_expert: int = 512
) -> tuple[str, Rivals]:
    """Top-1 SwiGLU experts against the matrix products alone of a dense feed-forward of as many operations."""
    x = torch.randn(tokens, d_model, requires_grad=True)
    w1 = (torch.randn(num_experts, 2 * d_expert, d_model) / d_model**0.5).requires_grad_()
    w2 = (torch.randn(num_experts, d_model, d_expert) / d_expert**0.5).requires_grad_()
    index = torch.randint(0, num_experts, (tokens, 1))
    weight = torch.rand(tokens, 1, requires_grad=True)
    dy = torch.randn(tokens, d_model)
    dense1, dense2 = (w[0].detach().clone().requires_grad_() for w in (w1, w2))

    def dense() -> Tensor:
        gate, up = F.linear(x, dense1).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, dense2)

    def loop() -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(num_experts):
            token, choice = torch.where(index == expert)
            gate, up = F.linear(x[token], w1[expert]).chunk(2, dim=-1)
            y = y.index_add(0, token, F.linear(F.silu(gate) * up, w2[expert]) * weight[token, choice, None])
        return y

    def ours() -> Tensor:
        return expert_feed_forward(x, index, weight, w1, w2, "swiglu")

    systems = {"eager": ours, "loop over experts": loop}
    rivals = dict(_both_ways(systems, (x, weight, w1, w2), dy))
    rivals |= _both_ways({"dense feed-forward": dense}, (x, dense1, dense2), dy)
    hidden, activated = torch.randn(tokens, 2 * d_expert), torch.randn(tokens, d_expert)
    with torch.no_grad():
        x_, a, b = x.detach(), dense1.detach(), dense2.detach()

    def products() -> list[Tensor]:
        return [x_ @ a.t(), activated @ b.t()]

    def products_backward() -> list[Tensor]:
        return [*products(), dy @ b, dy.t() @ activated, hidden.t() @ x_, hidden @ a]

    rivals |= {"dense products, forward": products, "dense products, both ways": products_backward}
    return f"expert_feed_forward, T={tokens} D={d_model} E={num_experts} F={d_expert} SwiGLU top-1", rivals


def decoding_experts(d_model: int = 256, num_experts: int = 8, d_expert: int = 512) -> tuple[str, Rivals]:
    """One token, without gradients."""
    w1 = torch.randn(num_experts, 2 * d_expert, d_model) / d_model**0.5
    w2 = torch.randn(num_experts, d_model, d_expert) / d_expert**0.5
    x, index, weight = torch.randn(1, d_model), torch.tensor([[3]]), torch.ones(1, 1)
    middle = torch.randn(d_expert)
    rivals = {
        "eager": lambda: expert_feed_forward(x, index, weight, w1, w2, "swiglu"),
        "its two products": lambda: (torch.mv(w1[3], x[0]), torch.mv(w2[3], middle)),
    }
    return f"expert_feed_forward, T=1 D={d_model} F={d_expert} SwiGLU", rivals


def head(tokens: int = 2048, vocab_size: int = 8000, d_model: int = 256) -> tuple[str, Rivals]:
    """Loss and both gradients of a language model's head, for several chunk sizes."""
    x = torch.randn(tokens, d_model, requires_grad=True)
    weight = (torch.randn(vocab_size, d_model) / d_model**0.5).requires_grad_()
    target = torch.randint(0, vocab_size, (tokens,))
    x_, w, dlogits = x.detach(), weight.detach(), torch.randn(tokens, vocab_size)

    def ours(chunk_size: int | None, backend: str = "auto") -> object:
        loss = linear_cross_entropy(x, weight, target, chunk_size=chunk_size, backend=backend)
        return torch.autograd.grad(loss, (x, weight))

    rivals: dict[str, Callable[[], object]] = {
        f"chunks of {size}": lambda size=size: ours(size) for size in (64, 128, 256, 512, 1024, 2048)
    }
    rivals["reference"] = lambda: ours(None, "reference")
    rivals["three products"] = lambda: (x_ @ w.t(), dlogits @ w, dlogits.t() @ x_)
    return f"linear_cross_entropy, T={tokens} V={vocab_size} D={d_model}, loss and gradients", rivals


def _both_ways(systems: Mapping[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...], dy: Tensor) -> Rivals:
    """Time each system forward without gradients, and forward with backward; all must agree on both."""
    results = [
        (y := system().detach(), *torch.autograd.grad(system(), inputs, dy)) for system in systems.values()
    ]
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(y.abs().max()))

    def forward(system: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return system()

    rivals: dict[str, Callable[[], object]] = {}
    for name, system in systems.items():
        rivals[f"{name}, forward"] = lambda system=system: forward(system)
        rivals[f"{name}, both ways"] = lambda system=system: torch.autograd.grad(system(), inputs, dy)
    return rivals


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    clock = thread_time if arguments.threads == 1 else perf_counter
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} rounds; ms")
    for measure in (convolution, experts, decoding_experts, head):
        title, rivals = measure()
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for run in rivals.values():
            run()
        for _ in range(arguments.repeats):
            for name, run in rivals.items():
                start = clock()
                run()
                times[name].append((clock() - start) * 1e3)
        print(f"\n{title}")
        for name, values in times.items():
            print(f"  {name:32s} fastest {min(values):9.3f}   median {median(values):9.3f}")


if __name__ == "__main__":
    main()
