# mypy: allow-untyped-calls
"""State space duality on a GPU: how the Triton kernels of kernels.py are launched.

Forward: ``step_sizes`` turns dt into Δ and sums of decays; then programs walk through time chunk by chunk, one for each
row and head, with the state in registers. If that is too few programs to fill a GPU, the sequence is cut into spans:
a first pass finds the state that each span adds, a short loop passes states from span to span, and a second pass gives
the outputs.

Backward: ``state_gradients`` walks through time the other way and stores the gradient of the state that leaves each
chunk. Then all chunks are independent: ``head_gradients`` has a program for each chunk and head, ``group_gradients``
one for each chunk and group, which goes through the heads, so that ∂B and ∂C, sums over heads, stay in registers.

Matrix products have operands of x's dtype (fp32 as three products of tf32) and sums in fp32. Training keeps the states
that enter the chunks in x's dtype, as a matrix product reads them. There are no atomics, and how the work is cut
depends on shapes alone: results repeat bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchmamba.ops.gpu import shared_memory
from switchmamba.ops.ssd import kernels

CHUNK = 64
_ENOUGH_PROGRAMS = 192
"""Programs below which a sequence is cut into spans, or a group's heads into splits; a large GPU has 132 processors."""

_LAUNCH = {
    "forward": {"num_warps": 4, "STAGES": 2},
    "state_gradients": {"num_warps": 4, "STAGES": 2},
    "head_gradients": {"num_warps": 4},
    "group_gradients": {"num_warps": 8, "STAGES": 2},
}
"""Warps of a program and depth of its pipeline of loads; README.md has the measurements."""

_PIPELINE_BYTES = 163 * 1024
"""What a program with a pipeline may need of shared memory."""

_SMALLEST_SPAN = 4
"""Chunks of a span at least: a program's start costs about as much as one chunk."""


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
    initial_state_BHPN: Tensor | None,
    starts_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in fp32; arguments as the reference's."""
    tensors = (
        _last_together(x_BLHP),
        dt_BLH,
        A_H.contiguous(),
        _last_together(B_BLGN.to(x_BLHP.dtype)),
        _last_together(C_BLGN.to(x_BLHP.dtype)),
        None if D_H is None else D_H.contiguous(),
        None if dt_bias_H is None else dt_bias_H.contiguous(),
        None if initial_state_BHPN is None else initial_state_BHPN.float().contiguous(),
    )
    starts = None if starts_BL is None else starts_BL.to(torch.uint8).contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    result: tuple[Tensor, Tensor] = _Scan.apply(keep, dt_softplus, starts, *tensors)
    return result


def _last_together(tensor: Tensor) -> Tensor:
    """Return the tensor with its last dimension next to each other in memory; the others may lie anywhere."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class _Scan(torch.autograd.Function):
    """The scan as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, keep: bool, softplus: bool, starts: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        y, final, kept = run_forward(keep, softplus, starts, *tensors)
        ctx.softplus = softplus
        if keep:
            ctx.save_for_backward(*kept, *tensors[:-1])
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        *kept, x, dt, A, B, C, D, dt_bias = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA, dD, ddt_bias, dinitial = run_backward(
            ctx.softplus, kept, x, dt, A, B, C, D, dt_bias, dy, dfinal, dx, ddt, dB, dC
        )
        of_state = dinitial if ctx.needs_input_grad[-1] else None
        return None, None, None, dx, ddt, dA, dB, dC, dD, ddt_bias, of_state


def run_forward(
    keep: bool,
    softplus: bool,
    starts: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, list[Any]]:
    """Return y, the final state, and what :func:`run_backward` needs besides the inputs if it is to be kept.

    The last dimension of x, B and C must be contiguous, and so must the rest but dt be; ``starts`` is uint8.
    """
    with torch.cuda.device_of(x):
        steps = _step_sizes(dt, A, dt_bias, starts, softplus)
        y, final, entering = _forward(x, B, C, D, steps, initial, keep)
    return y, final, [*steps, entering]


def run_backward(
    softplus: bool,
    kept: list[Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dy: Tensor,
    dfinal: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Fill dx, ddt, dB and dC, which may be slices of wider tensors; return those of A, D, dt_bias and the state."""
    *steps, entering = kept
    dy = _last_together(dy)
    with torch.cuda.device_of(x):
        dinitial, leaving = _state_gradients(dy, C, steps, dfinal.contiguous(), x.dtype)
        ddelta, drate, dD = _head_gradients(x, B, C, D, dy, steps, entering, leaving, dx)
        _group_gradients(x, B, C, dy, steps, entering, leaving, dB, dC)
        dA, ddt_bias = _step_size_gradients(dt, A, dt_bias, steps[0], ddelta, drate, softplus, ddt)
    return (
        dA.sum(0).to(A.dtype),
        None if D is None or dD is None else dD.sum((0, 1)).view(*D.shape, -1).sum(1).to(D.dtype),
        None if dt_bias is None else ddt_bias.sum(0).to(dt_bias.dtype),
        dinitial,
    )


Steps = Sequence[Tensor]
"""Δ, c in its coarse and its fine part, exp(c_t), exp(c_Q - c_t), all (B, H, chunks · Q), and documents, or None."""


def _step_sizes(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, starts: Tensor | None, softplus: bool
) -> list[Any]:
    rows, length, heads = dt.shape
    chunks, block = triton.cdiv(length, CHUNK), min(32, triton.next_power_of_2(heads))
    vectors = torch.empty(5, rows, heads, chunks * CHUNK, dtype=torch.float32, device=dt.device)
    document = None
    if starts is not None:
        document = torch.empty(rows, chunks * CHUNK, dtype=torch.int32, device=dt.device)
    kernels.step_sizes[(rows * chunks, triton.cdiv(heads, block))](
        dt, A, dt_bias, starts, *vectors, document, length, chunks, heads, *dt.stride(),
        CHUNK=CHUNK, HEADS=block, SOFTPLUS=softplus, num_warps=4,
    )  # fmt: skip
    return [*vectors, document]


def _sizes(head_dim: int, states: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernels' constants: a piece's state has at most 64 × 128 values, half as many in fp32."""
    block_n = max(16, triton.next_power_of_2(states))
    most = (8192 if dtype.itemsize == 2 else 4096) // block_n
    block_p = max(16, min(triton.next_power_of_2(head_dim), most))
    return {
        "P": head_dim,
        "N": states,
        "PIECES": triton.cdiv(head_dim, block_p),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "CHUNK": CHUNK,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "EXACT": dtype == torch.float32,
    }


def _launch(kernel: str, like: Tensor) -> dict[str, int]:
    """Return a kernel's entry of ``_LAUNCH``, without its pipeline where the device of ``like`` has no room for it."""
    options = _LAUNCH[kernel]
    if "STAGES" in options and like.is_cuda and shared_memory(like.device) < _PIPELINE_BYTES:
        return options | {"STAGES": 1}
    return options


def _spans(programs: int, chunks: int) -> tuple[int, int]:
    """Return how many spans a sequence is cut into, and the chunks of a span."""
    wanted = triton.cdiv(_ENOUGH_PROGRAMS, programs)
    span = max(_SMALLEST_SPAN, triton.cdiv(chunks, wanted))
    return triton.cdiv(chunks, span), span


def _forward(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, steps: Steps, initial: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, the final state and, to keep, the states that enter each chunk."""
    (rows, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunks, sizes = triton.cdiv(length, CHUNK), _sizes(head_dim, states, x.dtype)
    programs = rows * heads * sizes["PIECES"]
    spans, span = _spans(programs, chunks)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    entering = x.new_empty(rows, chunks, heads, head_dim, states) if keep else None

    def run(initial: Tensor | None, output: bool) -> Tensor:
        final = torch.empty(rows, spans, heads, head_dim, states, dtype=torch.float32, device=x.device)
        kernels.forward[(programs * spans,)](
            x, B, C, D, *steps, initial, y, final, entering,
            length, chunks, heads, heads // groups, spans, span,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            **sizes, OUTPUT=output, **_launch("forward", x),
        )  # fmt: skip
        return final

    if spans > 1:
        initial = _pass_on(run(None, False), _span_decays(steps, spans, span), initial)
    final = run(initial, True)
    return y, final[:, -1], entering


def _span_decays(steps: Steps, spans: int, span: int) -> Tensor:
    """Return the decay over each span (B, spans, H): 0 if a document starts in it."""
    _, coarse, fine, _, _, document = steps
    ends = slice(CHUNK - 1, None, CHUNK)
    total = torch.nn.functional.pad(
        coarse[..., ends].double() + fine[..., ends], (0, spans * span - coarse.shape[2] // CHUNK)
    )
    decay = torch.exp2(total.unflatten(-1, (spans, span)).sum(-1)).float()
    if document is not None:
        started = torch.nn.functional.pad(document[:, ends] > 0, (0, spans * span - coarse.shape[2] // CHUNK))
        decay = decay.masked_fill(started.unflatten(-1, (spans, span)).any(-1)[:, None], 0)
    return decay.transpose(1, 2)


def _pass_on(added: Tensor, decays: Tensor, first: Tensor | None) -> Tensor:
    """Return the states that enter the spans from what each adds (B, spans, H, P, N) and the first one's."""
    state = torch.zeros_like(added[:, 0]) if first is None else first
    entering = [state]
    for number in range(added.shape[1] - 1):
        state = torch.addcmul(added[:, number], decays[:, number, :, None, None], state)
        entering.append(state)
    return torch.stack(entering, dim=1)


def _state_gradients(
    dy: Tensor, C: Tensor, steps: Steps, dfinal: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the initial state and of the states that leave each chunk."""
    (rows, length, heads, head_dim), (groups, states) = dy.shape, C.shape[2:]
    chunks, sizes = triton.cdiv(length, CHUNK), _sizes(head_dim, states, dtype)
    programs = rows * heads * sizes["PIECES"]
    spans, span = _spans(programs, chunks)
    leaving = torch.empty(rows, chunks, heads, head_dim, states, dtype=dtype, device=dy.device)

    def run(dfinal: Tensor, leaving: Tensor | None) -> Tensor:
        dinitial = torch.empty(rows, spans, heads, head_dim, states, dtype=torch.float32, device=dy.device)
        kernels.state_gradients[(programs * spans,)](
            dy, C, steps[3], dfinal, dinitial, leaving,
            length, chunks, heads, heads // groups, spans, span, *dy.stride()[:3], *C.stride()[:3],
            **sizes, **_launch("state_gradients", dy),
        )  # fmt: skip
        return dinitial

    if spans > 1:
        zeros = dfinal.new_zeros(rows, spans, heads, head_dim, states)
        added = run(zeros, None).flip(1)
        dfinal = _pass_on(added, _span_decays(steps, spans, span).flip(1), dfinal).flip(1).contiguous()
    return run(dfinal, leaving)[:, 0], leaving


def _head_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dy: Tensor,
    steps: Steps,
    entering: Tensor,
    leaving: Tensor,
    dx: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill dx; return the gradients of Δ, r and D in parts."""
    (rows, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunks, sizes = triton.cdiv(length, CHUNK), _sizes(head_dim, states, x.dtype)
    pieces = heads * sizes["PIECES"]
    ddelta, drate = torch.empty(2, rows, pieces, chunks * CHUNK, dtype=torch.float32, device=x.device)
    dD = None if D is None else torch.empty(rows, chunks, pieces, dtype=torch.float32, device=x.device)
    kernels.head_gradients[(rows * chunks * pieces,)](
        x, B, C, D, dy, *steps, entering, leaving, dx, ddelta, drate, dD,
        length, chunks, heads, heads // groups,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3], *dx.stride()[:2],
        **sizes, **_launch("head_gradients", x),
    )  # fmt: skip
    return ddelta, drate, dD


def _group_gradients(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor,
    steps: Steps,
    entering: Tensor,
    leaving: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> None:
    """Fill dB and dC."""
    (rows, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    chunks, sizes = triton.cdiv(length, CHUNK), _sizes(head_dim, states, x.dtype)
    pieces = heads * sizes["PIECES"] // groups
    splits = 1
    while rows * chunks * groups * splits < _ENOUGH_PROGRAMS // 2 and pieces % (2 * splits) == 0:
        splits *= 2
    parts_B, parts_C = dB[None], dC[None]
    if splits > 1:
        parts_B, parts_C = torch.empty(2, splits, *B.shape, dtype=torch.float32, device=x.device)
    kernels.group_gradients[(rows * chunks * groups * splits,)](
        x, B, C, dy, *steps, entering, leaving, parts_B, parts_C,
        length, chunks, heads, groups, splits, pieces // splits,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *dy.stride()[:3],
        *parts_B.stride()[:3], *parts_C.stride()[:3],
        **sizes, **_launch("group_gradients", x),
    )  # fmt: skip
    if splits > 1:
        dB.copy_(parts_B.sum(0))
        dC.copy_(parts_C.sum(0))


def _step_size_gradients(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    delta: Tensor,
    ddelta: Tensor,
    drate: Tensor,
    softplus: bool,
    ddt: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill ddt; return the gradients of A and dt_bias in parts (…, H)."""
    rows, length, heads = dt.shape
    chunks, block = triton.cdiv(length, CHUNK), min(32, triton.next_power_of_2(heads))
    dA, ddt_bias = torch.empty(2, rows * chunks, heads, dtype=torch.float32, device=dt.device)
    kernels.step_size_gradients[(rows * chunks, triton.cdiv(heads, block))](
        dt, A, dt_bias, delta, ddelta, drate, ddt, dA, ddt_bias, length, chunks, heads,
        *dt.stride(), *ddt.stride(),
        PIECES=ddelta.shape[1] // heads, CHUNK=CHUNK, HEADS=block, SOFTPLUS=softplus, num_warps=4,
    )  # fmt: skip
    return dA, ddt_bias


def ssd_step(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, H, P) and the next state (B, H, P, N)."""
    arguments = (state_BHPN, x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        y_BLHP, next_state = ssd_scan(
            x_BHP.unsqueeze(1),
            dt_BH.unsqueeze(1),
            A_H,
            B_BGN.unsqueeze(1),
            C_BGN.unsqueeze(1),
            D_H,
            dt_bias_H,
            dt_softplus,
            state_BHPN,
            None,
        )
        return y_BLHP.squeeze(1), next_state
    (rows, heads, head_dim), (groups, states) = x_BHP.shape, B_BGN.shape[1:]
    x, B, C = _last_together(x_BHP), _last_together(B_BGN), _last_together(C_BGN)
    block_n = triton.next_power_of_2(states)
    block_p = max(1, min(triton.next_power_of_2(head_dim), 2048 // block_n))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = state_BHPN.contiguous()
    next_state = torch.empty(state.shape, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.step[(rows * heads, triton.cdiv(head_dim, block_p))](
            state, x, dt_BH, A_H.contiguous(), B, C,
            None if D_H is None else D_H.contiguous(),
            None if dt_bias_H is None else dt_bias_H.contiguous(),
            y, next_state, heads, heads // groups,
            *x.stride()[:2], *dt_BH.stride(), *B.stride()[:2], *C.stride()[:2],
            P=head_dim, N=states, BLOCK_P=block_p, BLOCK_N=block_n, SOFTPLUS=dt_softplus, num_warps=4,
        )  # fmt: skip
    return y, next_state
