"""Speed of the selective scan on the CPU: inference, training, decode, and how they grow with length.

    python -m benchmarks.selective_scan_cpu --threads 1 2 --rounds 15

I = 512 channels and N = 16 states, with gate, skip, bias and softplus, fp32: one layer of the 25.6M-parameter
benchmark model has 8192 state-steps per token. Shapes and thread counts take turns inside each round, so that a busy
machine hurts all alike; the table gives the fastest round. One thread is timed by its own processor time, which other
programs disturb less. Before anything is timed, the compiled kernels must agree with the reference.
"""

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter, thread_time

import torch
from torch import Tensor

from switchmamba.ops import selective_scan, selective_step

CHANNELS, STATES = 512, 16
SHAPES = [(8, 256), (2, 1024), (1, 256), (1, 1024), (1, 4096), (1, 16384)]


class Scan:
    """Inputs of one shape, and the calls that are timed."""

    def __init__(self, batch: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.tokens = batch * length
        self.dy = random(batch, length, CHANNELS)
        self.inputs = {
            "x": random(batch, length, CHANNELS),
            "dt": random(batch, length, CHANNELS) / 2 - 4,
            "A": -torch.arange(1, STATES + 1).float().repeat(CHANNELS, 1),
            "B": random(batch, length, STATES),
            "C": random(batch, length, STATES),
            "D": torch.ones(CHANNELS),
            "z": random(batch, length, CHANNELS),
            "dt_bias": random(CHANNELS) / 4,
        }
        self.leaves = [value.requires_grad_() for value in self.inputs.values()]

    def scan(self, backend: str = "cpu") -> Tensor:
        return selective_scan(**self.inputs, dt_softplus=True, backend=backend)

    def seconds(self) -> dict[str, float]:
        """Time one call of each kind."""
        with torch.no_grad():
            inference = elapsed(self.scan)
        start = clock()
        y = self.scan()
        forward = clock() - start
        backward = elapsed(lambda: torch.autograd.grad(y, self.leaves, self.dy))
        return {"inference": inference, "forward": forward, "backward": backward}


def clock() -> float:
    return thread_time() if torch.get_num_threads() == 1 else perf_counter()


def elapsed(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def check() -> None:
    """Refuse to time kernels that are wrong."""
    small = Scan(2, 100)
    found, truth = (torch.autograd.grad(small.scan(b), small.leaves, small.dy) for b in ("cpu", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert (f - t).norm() <= 2e-6 * t.norm(), "the compiled kernels disagree with the reference"


def step_seconds(backend: str, repeats: int = 200) -> float:
    """Time of one recurrent step at batch 1."""
    e = {name: value[:, 0] if value.dim() == 3 else value for name, value in Scan(1, 1).inputs.items()}
    state = torch.zeros(1, CHANNELS, STATES)
    with torch.inference_mode():
        return (
            elapsed(
                lambda: [
                    selective_step(state, **e, dt_softplus=True, backend=backend) for _ in range(repeats)
                ]
            )
            / repeats
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    check()
    scans = {shape: Scan(*shape) for shape in SHAPES}
    times: dict[tuple[tuple[int, int], int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for threads in options.threads:
            torch.set_num_threads(threads)
            for shape, scan in scans.items():
                for kind, seconds in scan.seconds().items():
                    times[shape, threads][kind].append(seconds)
        torch.set_num_threads(1)
        for backend in ("cpu", "reference"):
            steps[backend].append(step_seconds(backend))
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, I={CHANNELS} N={STATES} fp32\n"
    )
    print(
        "| B, L | threads | inference ms | forward ms | backward ms | training µs/token | G state-steps/s/core |"
    )
    print("|---|---|---|---|---|---|---|")
    for (shape, threads), kinds in times.items():
        inference, forward, backward = (
            1e3 * min(kinds[kind]) for kind in ("inference", "forward", "backward")
        )
        tokens = scans[shape].tokens
        rate = tokens * CHANNELS * STATES / inference / 1e6 / threads
        training = (forward + backward) / tokens * 1e3
        print(
            f"| {shape[0]}, {shape[1]} | {threads} | {inference:.2f} | {forward:.2f} | {backward:.2f} "
            f"| {training:.1f} | {rate:.2f} |"
        )
    for backend, seconds in steps.items():
        print(f"\nstep at batch 1, one thread, {backend}: {1e6 * min(seconds):.0f} µs", end="")
    print()


if __name__ == "__main__":
    main()
