"""Run a compiled kernel over slices of its work on as many threads as torch uses.

numba's own threads (``prange``) cost a longer compilation and, on some machines, a library; a kernel compiled
with ``nogil=True`` needs only Python threads that call it. How the work is cut depends on the work alone,
never on the number of threads, so neither do results.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def cut(length: int, pieces: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut ``range(length)`` into at most ``pieces`` slices ``(start, stop)`` of equal size, the last shorter.

    Slices begin at multiples of ``multiple`` (whole cache lines or vector registers); none is empty.
    """
    step = max(1, -(-length // max(1, pieces)))
    step = -(-step // multiple) * multiple
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def run_parallel(kernel: Callable[..., None], work: Sequence[tuple[int, ...]], *arguments: Any) -> None:
    """Call ``kernel(*item, *arguments)`` for every item of ``work`` on ``torch.get_num_threads()`` threads.

    Items are taken in order by whichever thread is free (largest first is fastest). The calling thread works
    too, so one item, or one thread, starts no other. Returns when all are done. A second thread costs about
    70 µs: give small work one item.

    Args:
        kernel: releases the GIL (``numba.njit(nogil=True)``), writes only what belongs to its item, and gives
            the same result in whatever order the items run.
        work: one tuple of integers per item, such as the slices of :func:`cut`, decided by the inputs'
            shapes.
        arguments: the rest of the kernel's arguments, the same for all items.
    """
    helpers = min(torch.get_num_threads(), len(work)) - 1
    if helpers < 1:
        for item in work:
            kernel(*item, *arguments)
        return
    waiting = deque(work)
    futures = [_pool(os.getpid()).submit(_drain, waiting, kernel, arguments) for _ in range(helpers)]
    try:
        _drain(waiting, kernel, arguments)
    finally:
        waiting.clear()
        errors = [future.exception() for future in futures if not future.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _drain(waiting: deque[tuple[int, ...]], kernel: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    while True:
        try:
            item = waiting.popleft()
        except IndexError:
            return
        kernel(*item, *arguments)


@functools.cache
def _pool(process_id: int) -> ThreadPoolExecutor:
    """Return the pool of this process; a fork inherits the object but not its threads, hence the argument."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"switchmamba-{process_id}")
