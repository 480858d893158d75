# mypy: allow-untyped-calls
"""State space duality in chunks, with plain matrix products (Mamba-2, arXiv 2405.21060, §6).

Within a chunk of Q steps, with c_t = Σ_{k≤t} Δ_k A and h the state that enters it,

    y_t = Σ_{s≤t} (C_t · B_s) exp(c_t - c_s) Δ_s x_s + exp(c_t) h C_t + D x_t
    h'  = Σ_s exp(c_Q - c_s) Δ_s x_s ⊗ B_s + exp(c_Q) h

where every term between two documents is left out. Nothing of size (B, L, H, P, N) exists; a pass holds (Q, Q) scores
of one chunk, and training keeps the states that enter the chunks. The backward pass runs each chunk's forward again.

c is summed and subtracted in fp64: after a few steps of strong decay its differences would be noise in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64
"""Steps of a chunk. Scores take Q·H values a token, states H·P·N/Q: they balance near Q = 64 … 128."""


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
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N); arguments as the reference's."""
    if initial_state_BHPN is None:
        rows, _, heads, head_dim = x_BLHP.shape
        initial_state_BHPN = x_BLHP.new_zeros(
            rows, heads, head_dim, B_BLGN.shape[3], dtype=_computing(x_BLHP.dtype)
        )
    tensors = (initial_state_BHPN, x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, dt_bias_H)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    result: tuple[Tensor, Tensor] = _ChunkedScan.apply(keep, chunk, dt_softplus, starts_BL, *tensors)
    return result


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _ChunkedScan(torch.autograd.Function):
    """Chunk after chunk; tensors are the initial state, x, dt, A, B, C, D and dt_bias."""

    @staticmethod
    def forward(
        ctx: Any, keep: bool, chunk: int, softplus: bool, starts_BL: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        x_BLHP = tensors[1]
        state_BHPN = tensors[0].to(_computing(x_BLHP.dtype), copy=True)
        entering, outputs = [], []
        for part in _parts(x_BLHP.shape[1], chunk):
            if keep:
                entering.append(state_BHPN)
            y_BQHP, state_BHPN = _scan_chunk(softplus, _cut(starts_BL, part), state_BHPN, *_at(tensors, part))
            outputs.append(y_BQHP)
        ctx.chunk, ctx.softplus = chunk, softplus
        if keep:
            ctx.save_for_backward(starts_BL, torch.stack(entering), *tensors)
        return torch.cat(outputs, dim=1), state_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        starts_BL, entering, *tensors = ctx.saved_tensors
        gradients: list[Any] = [None if t is None else torch.zeros_like(t) for t in tensors]
        for number, part in reversed(list(enumerate(_parts(dy_BLHP.shape[1], ctx.chunk)))):
            leaves = [entering[number], *_at(tensors, part)]
            leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
            with torch.enable_grad():
                y_BQHP, state_BHPN = _scan_chunk(ctx.softplus, _cut(starts_BL, part), *leaves)
            present = [i for i, leaf in enumerate(leaves) if leaf is not None]
            found = torch.autograd.grad(
                (y_BQHP, state_BHPN),
                [leaves[i] for i in present],
                (dy_BLHP[:, part], dstate_BHPN),
                materialize_grads=True,  # nothing that enters at a document's start has an effect
            )
            dstate_BHPN = found[0]
            for i, gradient in zip(present[1:], found[1:], strict=True):
                total = gradients[i][:, part] if i in _ALONG_TIME else gradients[i]
                total += gradient
        gradients[0] = dstate_BHPN.to(tensors[0].dtype)
        return None, None, None, None, *gradients


_ALONG_TIME = (1, 2, 4, 5)
"""Places of x, dt, B and C among a scan's tensors."""


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]


def _cut(starts_BL: Tensor | None, part: slice) -> Tensor | None:
    return None if starts_BL is None else starts_BL[:, part]


def _at(tensors: Any, part: slice) -> list[Tensor]:
    """Return x … dt_bias of one chunk."""
    return [tensors[i][:, part] if i in _ALONG_TIME else tensors[i] for i in range(1, len(tensors))]


def _scan_chunk(
    softplus: bool,
    starts_BQ: Tensor | None,
    state_BHPN: Tensor,
    x_BQHP: Tensor,
    dt_BQH: Tensor,
    A_H: Tensor,
    B_BQGN: Tensor,
    C_BQGN: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (B, Q, H, P) in x's dtype and the state after the chunk; differentiable by autograd."""
    compute = _computing(x_BQHP.dtype)
    (rows, steps, heads, head_dim), (groups, states) = x_BQHP.shape, B_BQGN.shape[2:]
    B_BGQN, C_BGQN = (tensor.to(compute).transpose(1, 2) for tensor in (B_BQGN, C_BQGN))
    x_BHQP = x_BQHP.to(compute).transpose(1, 2)
    delta_BHQ = dt_BQH.to(compute).transpose(1, 2)
    if dt_bias_H is not None:
        delta_BHQ = delta_BHQ + dt_bias_H.to(compute)[:, None]
    if softplus:
        delta_BHQ = F.softplus(delta_BHQ)
    drive_BHQP = delta_BHQ[..., None] * x_BHQP

    decay_BHQQ, from_start_BHQ, to_end_BHQ = _decays(delta_BHQ * A_H.to(compute)[:, None], starts_BQ)
    scores_BGQQ = C_BGQN @ B_BGQN.transpose(-1, -2)
    scores_BHQQ = (decay_BHQQ.unflatten(1, (groups, -1)) * scores_BGQQ[:, :, None]).flatten(1, 2)
    state_BGKN = state_BHPN.reshape(rows, groups, -1, states)  # K: a group's heads and their channels
    remembered_BGQK = C_BGQN @ state_BGKN.transpose(-1, -2)
    remembered_BHQP = (
        remembered_BGQK.unflatten(-1, (-1, head_dim)).transpose(2, 3).reshape(rows, heads, steps, head_dim)
    )
    y_BHQP = scores_BHQQ @ drive_BHQP + from_start_BHQ[..., None] * remembered_BHQP
    if D_H is not None:
        y_BHQP = y_BHQP + D_H.to(compute)[:, None, None] * x_BHQP

    late_BHQP = to_end_BHQ[..., None] * drive_BHQP
    late_BGKQ = late_BHQP.transpose(-1, -2).reshape(rows, groups, -1, steps)
    added_BHPN = (late_BGKQ @ B_BGQN).reshape(state_BHPN.shape)
    state_BHPN = from_start_BHQ[:, :, -1, None, None] * state_BHPN + added_BHPN
    return y_BHQP.transpose(1, 2).to(x_BQHP.dtype), state_BHPN


def _decays(rate_BHQ: Tensor, starts_BQ: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decays from step s to step t (B, H, Q, Q), from before the chunk to t, and from s to its end.

    They are 0 from a later step to an earlier one and from one document to another, and exactly 1 from t to t.
    """
    steps, dtype = rate_BHQ.shape[-1], rate_BHQ.dtype
    from_start_BHQ = rate_BHQ.double().cumsum(-1).to(dtype)
    later_BHQ = F.pad(rate_BHQ[..., 1:].double(), (0, 1))
    to_end_BHQ = later_BHQ.flip(-1).cumsum(-1).flip(-1).to(dtype)
    between_BHQQ = _SegmentSums.apply(rate_BHQ)
    unseen = torch.ones(steps, steps, dtype=torch.bool, device=rate_BHQ.device).triu(1)
    if starts_BQ is not None:
        document_BQ = starts_BQ.cumsum(1)
        unseen = (unseen | (document_BQ[:, :, None] != document_BQ[:, None, :]))[:, None]
        to_end_BHQ = to_end_BHQ.masked_fill((document_BQ != document_BQ[:, -1:])[:, None], -torch.inf)
        from_start_BHQ = from_start_BHQ.masked_fill((document_BQ != 0)[:, None], -torch.inf)
    return between_BHQQ.masked_fill(unseen, -torch.inf).exp(), from_start_BHQ.exp(), to_end_BHQ.exp()


class _SegmentSums(torch.autograd.Function):
    """Σ_{s<k≤t} r_k for s ≤ t, from r (…, Q) to (…, Q, Q); what lies above the diagonal has no meaning.

    The gradient of r_k sums that of all (s, t) around k. Taking differences of row sums and column sums, as autograd
    would, leaves a rest of the diagonal's where the decay is strong, and at the steps of other documents.
    """

    @staticmethod
    def forward(_ctx: Any, rate: Tensor) -> Tensor:
        sums = rate.double().cumsum(-1)
        return (sums[..., :, None] - sums[..., None, :]).to(rate.dtype)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, dsums: Tensor) -> Tensor:
        steps = dsums.shape[-1]
        before = torch.ones(steps, steps, dtype=dsums.dtype, device=dsums.device).triu(1)
        return (dsums @ before).tril().sum(-2)


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
    """Return y (B, H, P) and the next state (B, H, P, N), the y = h C as a matrix product over each group's heads."""
    compute = _computing(x_BHP.dtype)
    (rows, heads, head_dim), (groups, states) = x_BHP.shape, B_BGN.shape[1:]
    B_BG1N, C_BGN1 = B_BGN.to(compute)[:, :, None], C_BGN.to(compute)[..., None]
    x = x_BHP.to(compute)
    delta_BH = dt_BH.to(compute)
    if dt_bias_H is not None:
        delta_BH = delta_BH + dt_bias_H.to(compute)
    if dt_softplus:
        delta_BH = F.softplus(delta_BH)
    decay_BH = torch.exp(delta_BH * A_H.to(compute))
    drive_BGK1 = (delta_BH[..., None] * x).reshape(rows, groups, -1, 1)
    kept_BGKN = (decay_BH[..., None, None] * state_BHPN.to(compute)).reshape(rows, groups, -1, states)
    state_BGKN = torch.addcmul(kept_BGKN, drive_BGK1, B_BG1N)
    y = (state_BGKN @ C_BGN1).reshape(rows, heads, head_dim)
    if D_H is not None:
        y = y + D_H.to(compute)[:, None] * x
    return y.to(x_BHP.dtype), state_BGKN.reshape(rows, heads, head_dim, states)
