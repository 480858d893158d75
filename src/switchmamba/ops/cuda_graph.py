"""Capturing a CUDA graph, or learning that it cannot be: the work waits for the device somewhere.

A capture that fails leaves torch's random numbers on that device unusable ("offset increment outside graph capture"),
since nobody ends its part in the capture. They are put back as they were.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class CannotCaptureError(RuntimeError):
    """The work cannot be held by a graph; the message is the first line of the reason."""


def capture(
    run: Callable[[], Result], device: torch.device, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Return a graph of what ``run`` launches on ``device``, and its result, whose tensors each replay overwrites.

    Args:
        run: launches the work; what it needs once, such as compilation, must have been done before.
        device: a CUDA device.
        stream: where to capture; None: a stream of its own.

    Raises CannotCaptureError for work that waits for the device.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    random = torch.cuda.default_generators[index]
    before = random.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(index), torch.cuda.graph(graph, stream=stream):
            result = run()
    except RuntimeError as error:
        random.graphsafe_set_state(before)
        raise CannotCaptureError(str(error).strip().splitlines()[0]) from error
    return graph, result
