"""The selective scan's CUDA kernels: every variant compiles where there is a compiler; the rest needs an NVIDIA GPU.

Accuracy on a GPU is benchmarks/gpu_check.py's; here are the laws: same bits for any split of time, for every kernel and
in a CUDA graph.
"""

import itertools
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from switchmamba.errors import ConfigError
from switchmamba.ops import selective_scan, selective_step
from switchmamba.ops.nvrtc import needs_nvrtc
from switchmamba.ops.selective_scan import SELECTIVE_SCAN, SELECTIVE_STEP, cuda

GPU = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or needs_nvrtc(GPU, torch.float32) is not None,
    reason="needs an NVIDIA GPU and switchmamba[cuda]",
)
with_compiler = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


class Kept:
    """Stands for nvrtc.kernel: keeps what would be compiled, and what would be launched."""

    def __init__(self, monkeypatch):
        self.kernels, self.launches, self.shared_memory = {}, [], 227 * 1024
        monkeypatch.setattr(cuda.nvrtc, "kernel", self.kernel)
        monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 132)
        monkeypatch.setattr(cuda, "shared_memory", lambda device: self.shared_memory)
        cuda.forward_launch.cache_clear()
        cuda.backward_launch.cache_clear()

    def kernel(self, entry, source, macros, shared_bytes, device):
        self.kernels[entry, (*macros, ("SHARED", shared_bytes))] = source
        return lambda *arguments: self.launches.append((entry, source, shared_bytes, arguments))


@pytest.fixture
def kept(monkeypatch):
    yield Kept(monkeypatch)
    cuda.forward_launch.cache_clear()
    cuda.backward_launch.cache_clear()


def arguments(rows, length, channels, states=16, groups=1, dtype=torch.bfloat16, gate=True, device="cpu"):
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": random(rows, length, channels).to(dtype),
        "dt": random(rows, length, channels).to(dtype),
        "A": -torch.exp(random(channels, states)),
        "B": random(rows, length, groups, states).to(dtype),
        "C": random(rows, length, groups, states).to(dtype),
        "D": random(channels),
        "z": random(rows, length, channels).to(dtype) if gate else None,
        "dt_bias": random(channels) - 3,
        "dt_softplus": gate,
        "initial_state": random(rows, channels, states),
    }


def launch_all(inputs):
    """Run forward and backward with the kept kernels; the results are memory as it was."""
    leaves = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    y, final_state = cuda.selective_scan(*leaves.values(), None)
    torch.autograd.backward((y, final_state), (torch.zeros_like(y), torch.zeros_like(final_state)))


def fields(source: str) -> list[str]:
    """The members of a kernel's struct of arguments; those that are pointers begin with a star."""
    struct = source.split("struct Arguments {")[1].split("};")[0]
    return [
        name.strip()
        for declaration in struct.split(";")[:-1]
        for name in declaration.strip().removeprefix("const ").split(" ", 1)[1].split(",")
    ]


SHAPES = {
    "many channels": (64, 100, 1024),
    "wide rows": (32, 100, 1536),
    "half as many": (8, 100, 2048),
    "few channels": (1, 1000, 1024),
    "a step": (3, 1, 48),
    "odd": (2, 63, 341, 5),
    "groups": (2, 63, 96, 16, 3),
    "32 states": (2, 100, 64, 32),
    "64 states": (2, 100, 64, 64),
    "100 states": (2, 100, 64, 100),
    "256 states": (1, 100, 8, 256),
}


@pytest.mark.parametrize("kibibytes", [99, 163, 227])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_gets_the_arguments_it_declares_and_memory_it_can_have(kept, shape, kibibytes):
    kept.shared_memory = kibibytes * 1024
    launch_all(arguments(*SHAPES[shape], dtype=torch.float32))
    names = [entry for entry, *_ in kept.launches]
    assert names[0] == "scan_forward"
    assert names[-2:] == ["scan_backward", "scan_sums"]
    for entry, source, shared_bytes, (blocks, threads, *values) in kept.launches:
        members = fields(source)
        assert len(values) == len(members), entry
        for name, value in zip(members, values, strict=True):
            assert isinstance(value, int) or name.startswith("*"), (entry, name)
        assert shared_bytes <= kibibytes * 1024, entry
        assert blocks >= 1
        assert threads <= 1024


@with_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_compiles(kept, shape, tmp_path):
    kinds = [(torch.bfloat16, True)] if shape != "odd" else itertools.product(cuda._KINDS, (True, False))
    for dtype, gate in kinds:
        launch_all(arguments(*SHAPES[shape], dtype=dtype, gate=gate))
    for number, ((entry, macros), source) in enumerate(kept.kernels.items()):
        path = tmp_path / f"{entry}_{number}.cu"
        path.write_text(source)
        command = ["nvcc", "-arch=sm_90", "-std=c++17", "-fmad=false", "-ftz=true", "-ptx", "-o", "/dev/null"]
        done = subprocess.run(
            [*command, *(f"-D{name}={value}" for name, value in macros), str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (macros, done.stderr)


def test_the_report_says_why_the_kernels_do_not_run():
    for operation in (SELECTIVE_SCAN, SELECTIVE_STEP):
        assert next(iter(operation.backends)) == "cuda"
        assert "needs a CUDA device" in operation.report(torch.device("cpu"))["cuda"]
    with pytest.raises(ConfigError, match="backend='cuda' cannot run here: it needs a CUDA device"):
        selective_scan(
            *(torch.zeros(s) for s in ((1, 2, 4), (1, 2, 4), (4, 3), (1, 2, 3), (1, 2, 3))), backend="cuda"
        )


@on_gpu
def test_more_states_than_the_kernels_have_room_for_go_to_triton():
    e = arguments(1, 3, 4, 300, device="cuda")
    with pytest.raises(ConfigError, match=r"N is 300; .* choose backend='triton'"):
        selective_scan(**e, backend="cuda")
    assert torch.equal(selective_scan(**e), selective_scan(**e, backend="triton"))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 300, 48), (64, 70, 512), (40, 70, 512), (12, 150, 512), (2, 70, 40, 5, 2)]
)
def test_pieces_and_steps_have_the_bits_of_the_whole(shape, dtype):
    e = arguments(*shape, dtype=dtype, device="cuda")
    whole, final_state = selective_scan(**e, return_final_state=True, backend="cuda")
    state, pieces = e["initial_state"], []
    for piece in (slice(0, 1), slice(1, 18), slice(18, 66), slice(66, shape[1])):
        part = e | {name: e[name][:, piece] for name in ("x", "dt", "B", "C", "z")} | {"initial_state": state}
        y, state = selective_scan(**part, return_final_state=True, backend="cuda")
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(state, final_state)
    state = e.pop("initial_state")
    for t in range(20):
        y, state = selective_step(
            state, **e | {name: e[name][:, t] for name in ("x", "dt", "B", "C", "z")}, backend="cuda"
        )
        assert torch.equal(y, whole[:, t])


@on_gpu
def test_a_row_does_not_depend_on_how_many_there_are():
    e = arguments(64, 100, 512, device="cuda")
    rows = {name: e[name][:2] for name in ("x", "dt", "B", "C", "z", "initial_state")}
    assert torch.equal(selective_scan(**e, backend="cuda")[:2], selective_scan(**e | rows, backend="cuda"))


@on_gpu
def test_a_graph_repeats_forward_and_backward():
    e = {
        n: v.requires_grad_() if isinstance(v, Tensor) else v
        for n, v in arguments(2, 100, 64, device="cuda").items()
    }
    leaves = [v for v in e.values() if isinstance(v, Tensor)]

    def run() -> list[Tensor]:
        y = selective_scan(**e, backend="cuda")
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for value in found:
        value.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
