"""Compile a kernel with numba: without the GIL, kept on disk where the disk allows it.

numba keeps compiled code beside the source or, where that is read-only, in the user's cache directory. Neither is
needed: where nothing can be written, or the disk is full, a process compiles for itself.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numba

logger = logging.getLogger("switchmamba")

_SETTINGS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def compiled(kernel: Callable[..., Any], reassociate: bool = False) -> Callable[..., Any]:
    """Return ``kernel`` compiled at its first call; it checks no bounds and divides by IEEE 754's rules.

    ``reassociate``: sums may be taken in another order than written, so that they become vector instructions.

    Functions that are called from a kernel need no more than ``numba.njit``.
    """
    try:
        dispatcher = numba.njit(cache=True, **_settings(reassociate))(kernel)
    except RuntimeError as error:  # numba found no directory to write to
        logger.info("%s is compiled anew in every process: %s", kernel.__qualname__, error)
        return _compiled_here(kernel, reassociate)

    @functools.wraps(kernel)
    def call(*arguments: Any) -> Any:
        try:
            return dispatcher(*arguments)
        except OSError as error:
            # Only numba's writing (or reading) of its cache touches files. Compile without it.
            logger.warning("compiled %s is not kept on disk: %s", kernel.__qualname__, error)
            return _compiled_here(kernel, reassociate)(*arguments)

    return call


@functools.cache
def _compiled_here(kernel: Callable[..., Any], reassociate: bool) -> Callable[..., Any]:
    dispatcher: Callable[..., Any] = numba.njit(**_settings(reassociate))(kernel)
    return dispatcher


def _settings(reassociate: bool) -> dict[str, Any]:
    return _SETTINGS | ({"fastmath": {"reassoc", "contract"}} if reassociate else {})
