"""Times on a GPU: medians of CUDA events; the calls to compare take turns, each over several sets of inputs."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

HEAD_START = 12_000_000
"""Clock cycles that the device sleeps before each call, so that the host is ahead of it: six milliseconds. Without it
the time of short kernels is that of the Python in front of them. Training has no such gaps: it replays a graph."""


def milliseconds(calls: Sequence[Call], warm_up: int = 5, repeats: int = 21) -> float:
    """Median time of one call; they take turns, so that caches are cold if each has its own inputs."""
    return milliseconds_in_turns([calls], warm_up, repeats)[0]


def milliseconds_in_turns(
    contestants: Sequence[Sequence[Call]], warm_up: int = 5, repeats: int = 21
) -> list[float]:
    """Median time of a call of each contestant, who take turns on the same machine."""
    times: list[list[float]] = [[] for _ in contestants]
    for i in range(warm_up + repeats):
        for calls, own in zip(contestants, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            calls[i % len(calls)]()
            end.record()
            end.synchronize()
            if i >= warm_up:
                own.append(start.elapsed_time(end))
    return [median(own) for own in times]


def forward_calls(run: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]]) -> list[Call]:
    def forward(inputs: Sequence[Tensor]) -> None:
        with torch.no_grad():
            run(*inputs)

    return [lambda inputs=inputs: forward(inputs) for inputs in sets]  # type: ignore[misc]


def forward_backward_calls(
    run: Callable[..., Tensor], sets: Sequence[Sequence[Tensor]], others: Sequence[Tensor] = ()
) -> list[Call]:
    """Gradients of every input that wants one, and of ``others``, under one random gradient of the output."""
    with torch.no_grad():
        dy = torch.randn_like(run(*sets[0]))

    def both(inputs: Sequence[Tensor]) -> None:
        wanted = [t for t in (*inputs, *others) if t.requires_grad]
        torch.autograd.grad(run(*inputs), wanted, dy, allow_unused=True)

    return [lambda inputs=inputs: both(inputs) for inputs in sets]  # type: ignore[misc]
