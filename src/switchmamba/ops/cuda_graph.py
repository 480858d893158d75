"""Capturing a CUDA graph, or learning that it cannot be: the work waits for the device somewhere.

torch ends a capture that fails only in part. Random numbers stay unusable on that device ("offset increment outside
graph capture") and the stream of the capture stays the current one: both are put right here. Memory that it held is not
given back, so work that is known to wait for the device should not come here
(:meth:`switchmamba.models.language_model.LanguageModel.why_not_capturable`).
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
    before, outside = random.clone_state(), torch.cuda.current_stream(index)
    graph = torch.cuda.CUDAGraph()
    # torch's own default is one stream for all captures of a process, on whichever device the first of them was.
    stream = stream or torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.device(index), torch.cuda.graph(graph, stream=stream):
            result = run()
    except RuntimeError as error:
        torch.cuda.set_stream(outside)
        random.graphsafe_set_state(before)
        reason = str(error).strip().splitlines()[0]
        raise CannotCaptureError(reason) from None
    return graph, result
