"""Which implementation of an operation runs, and why.

An operation lists its backends, best first. ``backend="auto"`` takes the first that can serve the inputs and logs its
choice once; an explicit name either serves or raises :class:`~switchmamba.errors.ConfigError` with the reason.
``switchmamba doctor`` prints :func:`report`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from switchmamba.errors import ConfigError

logger = logging.getLogger("switchmamba")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Args:
        name: what ``backend=`` calls it: ``"reference"``, ``"cpu"``, ``"triton"``.
        run: the implementation; every backend of an operation has the same signature.
        unavailable: why it cannot serve a device and dtype, or None if it can. It must be cheap: it runs at every call.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[torch.device, torch.dtype], str | None]


def always(_device: torch.device, _dtype: torch.dtype) -> str | None:
    """Say that a backend serves every device and dtype."""
    return None


def only_cpu(device: torch.device, _dtype: torch.dtype) -> str | None:
    """Say that a backend serves every dtype on the CPU, and nothing else."""
    return None if device.type == "cpu" else f"it serves the CPU, the inputs are on {device.type}"


class Operation:
    """An operation's name and its backends, best first.

    The chosen names are remembered only to log each of them once.
    """

    def __init__(self, name: str, backends: Sequence[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._logged: set[tuple[str, str]] = set()

    def choose(self, requested: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """Return the implementation for ``requested`` (``"auto"`` or a name) on ``device`` in ``dtype``."""
        if requested != "auto":
            if requested not in self.backends:
                raise ConfigError(
                    f"{self.name}: backend={requested!r} does not exist; choose auto, {', '.join(self.backends)}"
                )
            reason = self.backends[requested].unavailable(device, dtype)
            if reason is not None:
                raise ConfigError(f"{self.name}: backend={requested!r} cannot run here: {reason}")
            return self.backends[requested].run
        for place, backend in enumerate(self.backends.values()):
            if backend.unavailable(device, dtype) is None:
                self._log_once(backend, device, fallback=place > 0)
                return backend.run
        raise ConfigError(f"{self.name}: no backend serves {dtype} on {device}")

    def _log_once(self, backend: Backend, device: torch.device, fallback: bool) -> None:
        key = (backend.name, device.type)
        if key not in self._logged:
            self._logged.add(key)
            level = logging.INFO if fallback and device.type != "cpu" else logging.DEBUG
            logger.log(level, "%s: backend %s on %s", self.name, backend.name, device.type)

    def report(self, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        """Say for each backend whether it is ``"chosen"``, ``"available"``, or why it is not."""
        rows: dict[str, str] = {}
        for backend in self.backends.values():
            reason = backend.unavailable(device, dtype)
            taken = "chosen" in rows.values()
            rows[backend.name] = reason or ("available" if taken else "chosen")
        return rows
