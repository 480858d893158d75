# mypy: allow-untyped-calls
"""Selective scan on an NVIDIA GPU: CUDA C++ kernels, compiled at run time, behind torch's autograd (Mamba §3.2, eq. 2).

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          y_t = (C_t h_t + D x_t) silu(z_t)

README.md says how the kernels work and what was measured. Here: which of them serves a shape, memory, and launches.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops import nvrtc
from switchmamba.ops.gpu import shared_memory

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_UNROLLED_STEPS = 8
"""Steps in the body of the forward pass's loop."""

_FORWARD_STEPS = {4: 16, 2: 32, 1: 16}
"""Steps of a chunk, by channels in a lane: what shared memory allows with enough warps."""

_RELAY_WARPS = 12


class Tile(NamedTuple):
    """How channels and states lie in the lanes of a warp (cuda_common.cu)."""

    lanes: int
    channels: int
    states: int

    @property
    def width(self) -> int:
        """Channels of a warp."""
        return 32 // self.lanes * self.channels

    @property
    def padded(self) -> int:
        """States, with those beyond N."""
        return self.lanes * self.states


class Problem(NamedTuple):
    """What the choice of a kernel and its launch depend on."""

    device: torch.device
    dtype: torch.dtype
    rows: int
    length: int
    channels: int
    groups: int
    states: int
    softplus: bool
    gate: bool
    aligned: bool
    """Every row begins at a multiple of 16 bytes, and a group's channels fill such pieces."""

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def checkpoint(self) -> int:
        """Steps between states that the forward pass keeps; the backward pass has that many in registers."""
        return 4 if self.states <= 64 else 8

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the states that are kept: what bf16 inputs are worth, else fp32."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def padded_width(self) -> int:
        """Channels of a group in a checkpoint."""
        return _divided(self.width, 32) * 32

    def tile(self, channels: int) -> Tile:
        """Return the tile for N; only N ≤ 16 can have fewer than four channels in a lane."""
        for lanes in (4, 8, 16, 32):
            if self.states <= 4 * lanes:
                return Tile(lanes, channels if lanes == 4 else 4, 4)
        return Tile(32, 4, 8)

    def tiles(self, tile: Tile) -> int:
        """Return how many warps serve all rows and channels."""
        return self.rows * self.groups * _divided(self.width, tile.width)

    def macros(
        self, tile: Tile, steps: int, spread: bool = False, **further: int
    ) -> tuple[tuple[str, int], ...]:
        """Return the macros of a kernel."""
        return (
            ("T_KIND", _KINDS[self.dtype]),
            ("N", self.states),
            ("LANES", tile.lanes),
            ("CHANNELS", tile.channels),
            ("STATES", tile.states),
            ("STEPS", steps),
            ("SPREAD", int(spread)),
            ("SOFTPLUS", int(self.softplus)),
            ("GATE", int(self.gate)),
            ("ALIGNED", int(self.aligned)),
            *further.items(),
        )


class Launch(NamedTuple):
    """A kernel with the numbers that a problem fixes."""

    run: nvrtc.Launcher
    blocks: int
    threads: int
    numbers: tuple[int, ...]

    def __call__(self, *arguments: Tensor | int | None) -> None:
        """Launch it with these arguments and then the numbers of the problem, which the caller appends."""
        self.run(self.blocks, self.threads, *arguments)


def _divided(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def source(name: str) -> str:
    """Return the text of ``cuda_{name}.cu``, with what the kernels share in front."""
    folder = Path(__file__).parent
    return "\n".join((folder / f"cuda_{part}.cu").read_text(encoding="utf-8") for part in ("common", name))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _fitting(problem: Problem, warps: int, bytes_of_one: int) -> int:
    """Return ``warps`` or a half, a quarter, … of them: as many as a block's shared memory has room for."""
    while warps > 1 and warps * bytes_of_one > shared_memory(problem.device):
        warps //= 2
    return warps


@functools.lru_cache(maxsize=1024)
def forward_launch(problem: Problem, keep: bool) -> Launch:
    """Choose a forward kernel; all of them give the same bits."""
    warps_wanted = 5 * _multiprocessors(problem.device)
    channels = 4
    while channels > 1 and problem.tiles(problem.tile(channels)) < warps_wanted:
        channels //= 2
    tile = problem.tile(channels)
    element = problem.dtype.itemsize
    steps = _FORWARD_STEPS[tile.channels]
    buffer = element * steps * (2 * tile.padded + tile.width * (2 + problem.gate))
    tiles, per_group = problem.tiles(tile), _divided(problem.width, tile.width)
    numbers = (problem.length, problem.groups, problem.width, problem.padded_width, per_group, tiles)
    if tile.channels == 1 and tiles < 2 * warps_wanted and problem.length > 4 * steps:
        of_a_warp = 8 * steps * tile.padded + 128 * tile.states + 2 * buffer
        warps = _fitting(problem, _RELAY_WARPS, of_a_warp)
        macros = problem.macros(tile, steps, WARPS=warps, KEEP=int(keep), CHECKPOINT=problem.checkpoint)
        run = nvrtc.kernel("scan_forward", source("relay"), macros, warps * of_a_warp, problem.device)
        return Launch(run, tiles, 32 * warps, numbers)
    of_a_warp = 8 * steps * tile.padded + 2 * buffer
    warps = _fitting(problem, 4 if tile.padded <= 128 else 2, of_a_warp)
    unroll = _UNROLLED_STEPS * tile.channels // tile.lanes
    macros = problem.macros(
        tile, steps, WARPS=warps, KEEP=int(keep), CHECKPOINT=problem.checkpoint, UNROLL=unroll
    )
    run = nvrtc.kernel("scan_forward", source("forward"), macros, warps * of_a_warp, problem.device)
    return Launch(run, _divided(tiles, warps), 32 * warps, numbers)


class Backward(NamedTuple):
    """The kernels of a backward pass, and where their parts lie in one piece of fp32 memory."""

    carry: Launch | None
    main: Launch
    sums: Launch
    offsets: tuple[int, ...]
    """Slabs, parts of dA, of dD and of ddt_bias, carries, elapsed times, end; in numbers."""


@functools.lru_cache(maxsize=1024)
def backward_launch(problem: Problem) -> Backward:
    """Choose the backward kernels."""
    rows, length, channels, groups = problem.rows, problem.length, problem.channels, problem.groups
    tile, steps, warps, at_once, segments = _backward_tile(problem)
    element, padded = problem.dtype.itemsize, tile.padded
    chunks = _divided(length, steps)
    segment_chunks = _divided(chunks, segments)
    segments = _divided(chunks, segment_chunks)
    parts = rows * segments
    extent = (length, groups, problem.width, problem.padded_width)

    buffer = element * steps * (2 * padded + tile.width * (3 + problem.gate))
    sum_parts = 8 // tile.lanes  # in shared memory, where there are more than one
    of_a_warp = (
        2 * buffer
        + 8 * steps * padded
        + 32 * tile.channels * tile.states * problem.kept_dtype.itemsize * (steps // problem.checkpoint)
        + (16 * sum_parts * (2 * padded + 4) if sum_parts > 1 else 16)
        + 16 * steps * padded
    )
    warps = _fitting(problem, warps, of_a_warp)
    blocks_per_group = _divided(problem.width, tile.width * warps)

    carry = None
    if segments > 1:
        per_group = _divided(problem.width, tile.width)
        waiting = rows * (segments - 1) * groups * per_group
        buffer = element * steps * (2 * padded + tile.width * (2 + problem.gate))
        carry = Launch(
            nvrtc.kernel(
                "scan_carry",
                source("carry"),
                problem.macros(problem.tile(4), steps, WARPS=warps),
                warps * (8 * steps * padded + 2 * buffer),
                problem.device,
            ),
            _divided(waiting, warps),
            32 * warps,
            (*extent, per_group, waiting, segments, segment_chunks),
        )

    main = Launch(
        nvrtc.kernel(
            "scan_backward",
            source("backward"),
            problem.macros(tile, steps, WARPS=warps, BLOCKS=at_once, spread=True),
            warps * of_a_warp,
            problem.device,
        ),
        parts * groups * blocks_per_group,
        32 * warps,
        (rows, *extent, blocks_per_group, segments, segment_chunks),
    )

    values = rows * length * groups * 2 * padded
    slab_blocks = _divided(values, 1024)
    sums = Launch(
        nvrtc.kernel("scan_sums", source("sums"), problem.macros(tile, steps), 0, problem.device),
        slab_blocks + _divided(channels * (problem.states + 2), 256),
        256,
        (slab_blocks, blocks_per_group, values, parts, channels),
    )
    carried = parts * groups * problem.padded_width if segments > 1 else 0
    sizes = (
        blocks_per_group * values,
        parts * channels * problem.states,
        parts * channels,
        parts * channels,
        carried * padded,
        carried,
    )
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + _divided(size, 4) * 4)  # at multiples of 16 bytes
    return Backward(carry, main, sums, tuple(offsets))


def _backward_tile(problem: Problem) -> tuple[Tile, int, int, int, int]:
    """Return the tile, the warps of a block, the blocks of a multiprocessor, and the segments of time.

    Four channels a lane leave registers for 8 warps on a multiprocessor, two for 12, which take 15% longer for the same
    work (measured, as the powers are). With too few warps for half a round time is divided.
    """
    multiprocessors = _multiprocessors(problem.device)
    wide, narrow = problem.tile(4), problem.tile(2)
    warps = 4 if wide.padded <= 128 else 2
    steps = 16 if problem.states <= 16 and problem.dtype == torch.bfloat16 else 8
    rounds = problem.tiles(wide) / (8 * multiprocessors)
    if rounds < 0.4:
        chunks = _divided(problem.length, steps)
        return wide, steps, warps, 2, max(1, min(round(2 / rounds), chunks // 4))
    narrow_rounds = problem.tiles(narrow) / (12 * multiprocessors)
    if wide == narrow or _time(rounds, 0.65) <= 0.87 * _time(narrow_rounds, 0.85):
        return wide, steps, warps, 2, 1
    return narrow, steps, warps, 3, 1


def _time(rounds: float, power: float) -> float:
    """Return how long that many rounds of blocks take, in full rounds: a part of one takes longer than its share."""
    return float(int(rounds) + (rounds % 1) ** power)


def selective_scan(
    x_BLI: Tensor,
    dt_BLI: Tensor,
    A_IN: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_I: Tensor | None,
    z_BLI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
    initial_state_BIN: Tensor | None,
    starts_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, I) in x's dtype and the final state (B, I, N) in fp32; arguments as the reference's."""
    dtype = x_BLI.dtype
    sequences: tuple[Tensor | None, ...] = (x_BLI, dt_BLI, z_BLI, B_BLGN, C_BLGN)
    if any(tensor is not None and tensor.dtype != dtype for tensor in sequences):  # no kernel mixes dtypes
        sequences = tuple(None if tensor is None else tensor.float() for tensor in sequences)
    tensors: tuple[Any, ...] = (
        *(tensor if tensor is None or _readable(tensor) else tensor.contiguous() for tensor in sequences),
        *(
            tensor if tensor is None else _plain(tensor)
            for tensor in (A_IN, D_I, dt_bias_I, initial_state_BIN)
        ),
    )
    starts = None if starts_BL is None else starts_BL.contiguous().view(torch.uint8)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y, final_state = _SelectiveScan.apply(dt_softplus, starts, *tensors)
    else:
        y, final_state, _ = _forward(dt_softplus, False, starts, *tensors)
    return y if y.dtype == dtype else y.to(dtype), final_state


def selective_step(
    state_BIN: Tensor,
    x_BI: Tensor,
    dt_BI: Tensor,
    A_IN: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_I: Tensor | None,
    z_BI: Tensor | None,
    dt_bias_I: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, I) and the next state (B, I, N): a scan of one step."""
    y_BLI, next_state_BIN = selective_scan(
        x_BI.unsqueeze(1),
        dt_BI.unsqueeze(1),
        A_IN,
        B_BGN.unsqueeze(1),
        C_BGN.unsqueeze(1),
        D_I,
        None if z_BI is None else z_BI.unsqueeze(1),
        dt_bias_I,
        dt_softplus,
        state_BIN,
        None,
    )
    return y_BLI.squeeze(1), next_state_BIN


def _readable(tensor: Tensor) -> bool:
    """Say whether channels, or groups and states, lie together; rows and steps may lie anywhere."""
    return tensor.stride(-1) == 1 and (
        tensor.dim() == 3 or tensor.shape[2] == 1 or tensor.stride(2) == tensor.shape[3]
    )


def _plain(tensor: Tensor) -> Tensor:
    """Return it in fp32, contiguous and at a multiple of 16 bytes."""
    tensor = tensor.float().contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


class _SelectiveScan(torch.autograd.Function):
    """The kernels as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, starts: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        y, final_state, checkpoints = _forward(softplus, True, starts, *tensors)
        ctx.softplus, ctx.has_initial_state = softplus, tensors[-1] is not None
        ctx.save_for_backward(starts, checkpoints, *tensors[:-1])
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        starts, checkpoints, *tensors = ctx.saved_tensors
        *gradients, dinitial = _backward(ctx.softplus, starts, checkpoints, dy, dfinal, *tensors)
        return None, None, *gradients, dinitial if ctx.has_initial_state else None


def _problem(
    softplus: bool, x: Tensor, dt: Tensor, z: Tensor | None, B: Tensor, C: Tensor
) -> tuple[Problem, list[int]]:
    """Return the problem, and how many numbers lie between the rows and between the steps of each of the tensors."""
    rows, length, channels = x.shape
    groups, states = B.shape[2:]
    element = x.element_size()
    strides: list[int] = []
    places = channels // groups * element
    for tensor in (x, dt, z, B, C):
        if tensor is None:
            strides += (0, 0)
        else:
            row, time = tensor.stride()[:2]
            strides += (row, time)
            places |= tensor.data_ptr() | (row | time) * element
    problem = Problem(
        x.device, x.dtype, rows, length, channels, groups, states, softplus, z is not None, places & 15 == 0
    )
    return problem, strides


def _forward(
    softplus: bool,
    keep: bool,
    starts: Tensor | None,
    x: Tensor,
    dt: Tensor,
    z: Tensor | None,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state and, if they are kept, the states before every fourth or eighth step."""
    problem, strides = _problem(softplus, x, dt, z, B, C)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = A.new_empty(problem.rows, *A.shape)
    checkpoints = None
    if keep:
        kept = problem.groups * problem.padded_width * problem.tile(4).padded
        kept_states = _divided(problem.length, problem.checkpoint)
        checkpoints = A.new_empty(problem.rows, kept_states, kept, dtype=problem.kept_dtype)
    with torch.cuda.device_of(x):
        launch = forward_launch(problem, keep)
        launch(
            x, dt, z, B, C, A, D, dt_bias, initial_state, starts, y, final_state, checkpoints,
            *launch.numbers, *strides,
        )  # fmt: skip
    return y, final_state, checkpoints


def _backward(
    softplus: bool,
    starts: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    z: Tensor | None,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dt, z, B, C, A, D, dt_bias and the initial state; None where there was no tensor."""
    dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
    if dy.data_ptr() % 16:
        dy = dy.clone()
    dfinal = None if dfinal is None else _plain(dfinal)
    problem, strides = _problem(softplus, x, dt, z, B, C)
    dx, ddt, dz, dB, dC = (
        None if tensor is None else torch.empty(tensor.shape, dtype=x.dtype, device=x.device)
        for tensor in (x, dt, z, B, C)
    )
    dA, dinitial = torch.empty_like(A), A.new_empty(problem.rows, *A.shape)
    dD, ddt_bias = A.new_empty(2, problem.channels)
    with torch.cuda.device_of(x):
        plan = backward_launch(problem)
        memory = A.new_empty(plan.offsets[-1])
        slabs, dA_parts, dD_parts, bias_parts, carries, elapsed = (
            memory.data_ptr() + 4 * offset for offset in plan.offsets[:-1]
        )
        if plan.carry is not None:
            plan.carry(
                dt, z, B, C, A, dt_bias, starts, dy, carries, elapsed,
                *plan.carry.numbers, *strides[2:],
            )  # fmt: skip
        plan.main(
            x, dt, z, B, C, A, D, dt_bias, starts, checkpoints, dy, dfinal, carries, elapsed,
            dx, ddt, dz, slabs, dA_parts, dD_parts, bias_parts, dinitial,
            *plan.main.numbers, *strides,
        )  # fmt: skip
        plan.sums(slabs, dA_parts, dD_parts, bias_parts, dB, dC, dA, dD, ddt_bias, *plan.sums.numbers)
    return (
        dx,
        ddt,
        dz,
        dB,
        dC,
        dA,
        None if D is None else dD,
        None if dt_bias is None else ddt_bias,
        dinitial,
    )
