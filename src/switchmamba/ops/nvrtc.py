"""CUDA C++ kernels compiled at run time by NVRTC, through the packages cuda-core and cuda-bindings.

Nothing is compiled at install. A kernel is compiled for the device in use when it is first needed, in seconds, and
kept on disk as machine code (a cubin), under a name made from everything that it depends on: source, macros,
architecture, NVRTC's version and options. The directory is ``$SWITCHMAMBA_CACHE``, or ``switchmamba`` in the user's
cache directory; where nothing can be written, a process compiles for itself.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from switchmamba.ops.gpu import NEEDS_GPU

logger = logging.getLogger("switchmamba")

Launcher = Callable[..., None]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "ftz": True,
    # A multiplication and an addition become one operation only where the source says so: kernels that share a line of
    # arithmetic then give the same bits, whatever surrounds it.
    "fma": False,
}


def needs_nvrtc(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a kernel of CUDA C++ that computes in fp32 cannot serve a device and dtype, or None if it can."""
    if device.type != "cuda":
        return f"{NEEDS_GPU}, the inputs are on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in float32, the inputs are {dtype}"
    return _device_lacks(device)


@functools.cache
def _device_lacks(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, this torch is built for AMD's"
    missing = missing_package()
    if missing is not None:
        return missing
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    try:
        compiler_version()
    except Exception as error:  # the packages find their libraries when they are used, and fail in many ways
        return f"NVRTC does not load: {str(error).splitlines()[0]}; install switchmamba[cuda]"
    return None


def missing_package() -> str | None:
    """Say which package run-time compilation lacks, or None."""
    for module, package in (("cuda.bindings", "cuda-bindings"), ("cuda.core", "cuda-core")):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # of the parent, cuda
            found = None
        if found is None:
            return f"the package {package} is not installed: install switchmamba[cuda]"
    return None


@functools.cache
def compiler_version() -> tuple[int, int]:
    """Return NVRTC's version, such as (13, 0)."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return major, minor


def architecture(device: torch.device) -> str:
    """Return the device's architecture as NVRTC calls it, such as ``"sm_90"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def kernel(
    entry: str,
    source: str,
    macros: tuple[tuple[str, int], ...],
    shared_bytes: int,
    device: torch.device,
    dependent: bool = False,
) -> Launcher:
    """Return a function that launches the ``extern "C"`` kernel ``entry`` of ``source`` on ``device``.

    The function is ``launch(blocks, threads, *arguments)``: one-dimensional grid and blocks, ``shared_bytes`` of
    dynamic shared memory, torch's current stream, no synchronisation. The kernel takes one struct whose members have
    eight bytes each: an argument is a tensor (its address), None (a null pointer) or an int (``long long``). Tensors
    must be on ``device``, and ``device`` must be torch's current device. The macro SHARED is ``shared_bytes``. A
    ``dependent`` kernel may start while the one before it ends (programmatic dependent launch, compute capability
    9.0): it waits itself before it reads its results.
    """
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    code = compiled(source, dict(macros) | {"SHARED": shared_bytes}, architecture(device))
    with torch.cuda.device(device):
        loaded = ObjectCode.from_cubin(code).get_kernel(entry)
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(most, shared_bytes, loaded.handle, device.index)
    if int(status) != 0:
        raise RuntimeError(f"{entry}: {shared_bytes} bytes of shared memory a block were refused: {status}")
    function = driver.CUfunction(int(loaded.handle))
    launch_kernel, address, Pointer = driver.cuLaunchKernel, ctypes.addressof, ctypes.c_void_p
    current_stream = torch.cuda.current_stream

    config = driver.CUlaunchConfig()
    if dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        allowed = driver.CUlaunchAttributeValue()
        allowed.programmaticStreamSerializationAllowed = 1
        attribute.value = allowed
        config.attrs, config.numAttrs = [attribute], 1
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = shared_bytes

    def launch(blocks: int, threads: int, *arguments: Any) -> None:
        values = (ctypes.c_longlong * len(arguments))(
            *[a if type(a) is int else 0 if a is None else a.data_ptr() for a in arguments]
        )
        struct = Pointer(address(values))
        stream = current_stream(device).cuda_stream
        if dependent:
            config.gridDimX, config.blockDimX, config.hStream = blocks, threads, stream
            (status,) = driver.cuLaunchKernelEx(config, function, address(struct), 0)
        else:
            (status,) = launch_kernel(
                function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, address(struct), 0
            )
        if int(status) != 0:
            raise RuntimeError(f"{entry}: the launch failed: {status}")

    launch.loaded = loaded  # type: ignore[attr-defined]  # unloading the code would unload the function
    return launch


def compiled(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Return the machine code of ``source`` for ``architecture``, from the disk where it is there."""
    name = cache_name(source, macros, architecture, compiler_version())
    directory = cache_directory()
    path = directory / name
    try:
        return path.read_bytes()
    except OSError:
        code = _compile(source, macros, architecture)
    try:
        write_atomically(path, code)
    except OSError as error:
        logger.warning("compiled kernels are not kept in %s: %s", directory, error)
    return code


def cache_name(source: str, macros: Mapping[str, int], architecture: str, version: tuple[int, int]) -> str:
    """Return the file name of a compiled kernel: a hash of everything it depends on."""
    parts = [
        source,
        repr(sorted(macros.items())),
        architecture,
        repr(version),
        repr(sorted(_OPTIONS.items())),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{digest[:32]}.cubin"


def cache_directory() -> Path:
    """Return where compiled kernels are kept."""
    if chosen := os.environ.get("SWITCHMAMBA_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "switchmamba"


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content``, so that another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _compile(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture, define_macro=[(name, str(value)) for name, value in macros.items()], **_OPTIONS
    )
    code: bytes = Program(source, "c++", options).compile("cubin").code
    return code
