"""``switchmamba doctor``: versions, devices, and which backend each operation uses and why."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "pydantic",
    "tokenizers",
    "safetensors",
    "zstandard",
    "matplotlib",
)
"""Those that results and speed depend on; triton comes with torch's builds for GPUs."""

EXTRAS = {"cuda-core": "cuda", "tensorboard": "tensorboard", "transformers": "hf", "mambapy": "bench"}
"""Optional package → the extra that brings it."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Report what is installed, what hardware is seen, and which implementation each operation takes.

    \b
      switchmamba doctor
      switchmamba doctor --json
    """
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        _print(findings)


def examine() -> dict[str, Any]:
    """Collect the findings as plain values."""
    import torch

    from switchmamba import __version__
    from switchmamba.ops import operations

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return {
        "versions": {"switchmamba": __version__, "python": platform.python_version()}
        | {name: _installed(name) for name in PACKAGES},
        "extras": {
            name: _installed(name) or f"not installed: pip install 'switchmamba[{extra}]'"
            for name, extra in EXTRAS.items()
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": {name: _describe(name) for name in devices},
        "operations": {
            operation.name: {name: operation.report(torch.device(name)) for name in devices}
            for operation in operations()
        },
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _describe(device: str) -> str:
    import torch

    if device == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, sm_{properties.major}{properties.minor}"
    )


def _print(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from switchmamba.ops.gpu import NEEDS_GPU

    console = Console()
    versions = findings["versions"].items()
    console.print(" · ".join(f"{name} {number or 'not installed'}" for name, number in versions))
    for name, state in findings["extras"].items():
        console.print(f"{name}: {state}", style="dim", highlight=False, markup=False)
    console.print(f"{findings['platform']}, {findings['threads']} threads, {sys.executable}")
    for name, description in findings["devices"].items():
        console.print(f"{name}: {description}")
    table = Table("operation", "device", "backend", "why")
    need_gpu: list[str] = []
    for operation, devices in findings["operations"].items():
        for device, backends in devices.items():
            for backend, state in backends.items():
                if state.startswith(NEEDS_GPU):
                    need_gpu.append(backend)
                    continue
                chosen = state == "chosen"
                table.add_row(
                    operation,
                    device,
                    backend,
                    "the first that serves" if chosen else state,
                    style="bold" if chosen else "dim",
                )
    if need_gpu:
        backends, count = ", ".join(sorted(set(need_gpu))), f"{len(need_gpu)} others"
        table.add_row(count, "cpu", backends, f"{NEEDS_GPU}; --json lists them", style="dim")
    console.print(table)
