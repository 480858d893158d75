# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"
"""State space duality on a GPU: the Triton kernels (Mamba-2, arXiv 2405.21060, §6).

For a chunk of Q steps, with r_t = Δ_t A, c_t = Σ_{k≤t} r_k, the state h that enters it and the gradient g of the state
that leaves it, and every term between two documents left out,

    y_t  = Σ_{s≤t} (C_t · B_s) exp(c_t - c_s) Δ_s x_s + exp(c_t) h C_t + D x_t
    u_s  = Σ_{t≥s} (C_t · B_s) exp(c_t - c_s) dy_t + exp(c_Q - c_s) g B_s
    S_ts = exp(c_t - c_s) Δ_s (dy_t · x_s) for s ≤ t
    ∂x_s = Δ_s u_s + D dy_s                 ∂Δ_s = u_s · x_s + A ∂r_s                 ∂A = Σ Δ_s ∂r_s
    ∂C_t = Σ_heads [Σ_s S_ts B_s + exp(c_t) dy_t h]
    ∂B_s = Σ_heads [Σ_t S_ts C_t + exp(c_Q - c_s) Δ_s x_s g]
    ∂r_k = Σ_{t≥k} [Σ_{s<k} (C_t · B_s) S_ts + exp(c_t) dy_t h C_t]
           + Σ_{s<k} exp(c_Q - c_s) Δ_s x_s g B_s + exp(c_Q) g · h

∂r is summed as it stands here, although differences of row sums and column sums would be cheaper: under strong decay
these would leave nothing but rounding errors.

c is kept in units of log 2 and in two parts, "coarse" and "fine", so that its differences are as exact as fp32 can hold
them: coarse is a multiple of 2⁻¹⁰ below 2¹⁴, whose sums and differences are exact. For that, one step's decay counts as
2⁻¹⁶⁰ at least, which is 0 in fp32.

A "piece" is a head, or ``BLOCK_P`` of the channels of a wide head; a "span" a run of chunks that one program walks
through. ``EXACT`` and ``PRECISION`` belong to fp32 inputs.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_SOFTPLUS_THRESHOLD = tl.constexpr(20.0)
_LOWEST_RATE = tl.constexpr(-160.0)
_COARSE = tl.constexpr(1024.0)


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x in [0, 1] with a small relative error: 2 artanh(x / (2 + x)) as a series."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return 2.0 * s * (series * q + 1.0)


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """Return Δ and its slope: softplus of the raw value (as torch's, linear above 20), or the value itself."""
    if SOFTPLUS:
        small = tl.exp2(-tl.abs(raw) * _LOG2_E)
        larger = 1.0 / (1.0 + small)
        linear = raw > _SOFTPLUS_THRESHOLD
        delta = tl.where(linear, raw, tl.maximum(raw, 0.0) + _log1p(small))
        slope = tl.where(linear, 1.0, tl.where(raw >= 0.0, larger, small * larger))
    else:
        delta, slope = raw, raw * 0.0 + 1.0
    return delta, slope


@triton.jit
def _load_vector(vector, index, exists):
    """Load values in fp32; zeros where there is no vector."""
    if vector is None:
        value = tl.zeros(index.shape, tl.float32)
    else:
        value = tl.load(vector + index, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["length", "num_chunks"])
def step_sizes(
    dt, A, dt_bias, starts, delta, coarse, fine, from_start, to_end, document,
    length, num_chunks, heads, dt_row, dt_time, dt_head,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Fill delta, coarse, fine, from_start, to_end (B, H, chunks · Q) and, with starts, document (B, chunks · Q).

    from_start is exp(c_t), 0 after a start; to_end is exp(c_Q - c_s), 0 before one; document counts a chunk's starts.
    """
    row, chunk = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, CHUNK)
    step = chunk * CHUNK + q
    exists = head < heads
    inside = (step < length)[:, None] & exists[None, :]
    place = row * dt_row + step.to(tl.int64)[:, None] * dt_time + head[None, :] * dt_head
    raw = (
        tl.load(dt + place, mask=inside, other=0.0).to(tl.float32)
        + _load_vector(dt_bias, head, exists)[None, :]
    )
    size, _ = _step_size(raw, SOFTPLUS)
    size = tl.where(inside, size, 0.0)  # beyond the end: the state stays
    rate = size * (_load_vector(A, head, exists) * _LOG2_E)[None, :]
    rate = tl.where(rate < _LOWEST_RATE, _LOWEST_RATE, rate)
    rounded = tl.floor(rate * _COARSE + 0.5) * (1.0 / _COARSE)
    place = (row * heads + head)[None, :] * (num_chunks * CHUNK) + step[:, None]
    every = (q >= 0)[:, None] & exists[None, :]
    high, low = tl.cumsum(rounded, axis=0), tl.cumsum(rate - rounded, axis=0)
    before = tl.exp2(high + low)
    after = tl.exp2(
        (tl.sum(rounded, axis=0)[None, :] - high) + (tl.sum(rate - rounded, axis=0)[None, :] - low)
    )
    if starts is not None:
        started = tl.load(starts + row * length + step, mask=step < length, other=0).to(tl.int32)
        count = tl.cumsum(started, axis=0)
        tl.store(document + row * (num_chunks * CHUNK) + step, count)
        before = tl.where((count == 0)[:, None], before, 0.0)
        after = tl.where((count == tl.sum(started, axis=0))[:, None], after, 0.0)
    tl.store(delta + place, size, mask=every)
    tl.store(coarse + place, high, mask=every)
    tl.store(fine + place, low, mask=every)
    tl.store(from_start + place, before, mask=every)
    tl.store(to_end + place, after, mask=every)


@triton.jit
def _between(coarse, fine, document, at_head, at_row, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """Return the decays from step s to step t of a chunk, (t, s); 0 from later to earlier and between documents.

    Unless ``EXACT``, for 16-bit operands, the two parts of c are added before the difference is taken.
    """
    q = tl.arange(0, CHUNK)
    high, low = tl.load(coarse + at_head + q), tl.load(fine + at_head + q)
    seen = q[:, None] >= q[None, :]
    if document is not None:
        of_step = tl.load(document + at_row + q)
        seen = seen & (of_step[:, None] == of_step[None, :])
    if EXACT:
        sums = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    else:
        c = high + low
        sums = c[:, None] - c[None, :]
    return tl.exp2(tl.where(seen, sums, -float("inf")))


@triton.jit(do_not_specialize=["length", "num_chunks", "spans", "span"])
def forward(
    x, B, C, D, delta, coarse, fine, from_start, to_end, document, initial, y, final, entering,
    length, num_chunks, heads, heads_per_group, spans, span,
    x_row, x_time, x_head, B_row, B_time, B_group, C_row, C_time, C_group,
    P: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, OUTPUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill y (B, L, H, P), final (B, spans, H, P, N) and, unless None, entering (B, chunks, H, P, N).

    initial (B, spans, H, P, N), or None. Without ``OUTPUT`` only final is filled.
    """
    pieces = heads * PIECES
    piece = tl.program_id(0) % pieces
    row, at_span = (tl.program_id(0) // pieces // spans).to(tl.int64), tl.program_id(0) // pieces % spans
    head, group = piece // PIECES, piece // PIECES // heads_per_group
    q, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = piece % PIECES * BLOCK_P + tl.arange(0, BLOCK_P)
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    state_place = head * P * N + p[:, None] * N + n[None, :]
    at_state = (row * spans + at_span) * heads * P * N
    if initial is None:
        h = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    else:
        h = tl.load(initial + at_state + state_place, mask=state_mask, other=0.0)
    skip = 0.0
    if OUTPUT and D is not None:
        skip = tl.load(D + head).to(tl.float32)

    x += row * x_row + head * x_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    first = at_span * span
    for chunk in tl.range(first, tl.minimum(first + span, num_chunks), num_stages=STAGES):
        step = chunk * CHUNK + q
        inside = (step < length)[:, None]
        x_QP = tl.load(
            x + step.to(tl.int64)[:, None] * x_time + p[None, :], mask=inside & (p < P)[None, :], other=0.0
        )
        # Once more for arithmetic: a tile that is loaded for a matrix product alone travels ahead of the loop.
        x_again = tl.load(
            x + step.to(tl.int64)[:, None] * x_time + p[None, :],
            mask=inside & (p < P)[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        B_QN = tl.load(
            B + step.to(tl.int64)[:, None] * B_time + n[None, :], mask=inside & (n < N)[None, :], other=0.0
        )
        at_head = ((row * heads + head) * num_chunks + chunk) * CHUNK
        size = tl.load(delta + at_head + q)
        if OUTPUT:
            C_QN = tl.load(
                C + step.to(tl.int64)[:, None] * C_time + n[None, :],
                mask=inside & (n < N)[None, :],
                other=0.0,
            )
            narrow_h = h.to(x.dtype.element_ty)
            if entering is not None:
                at_chunk = (row * num_chunks + chunk) * heads * P * N
                tl.store(entering + at_chunk + state_place, narrow_h, mask=state_mask)
            scores = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
            scores *= _between(
                coarse, fine, document, at_head, (row * num_chunks + chunk) * CHUNK, CHUNK, EXACT
            )
            scores *= size[None, :]
            y_QP = tl.dot(C_QN, tl.trans(narrow_h), input_precision=PRECISION)
            y_QP *= tl.load(from_start + at_head + q)[:, None]
            y_QP = tl.dot(scores.to(x.dtype.element_ty), x_QP, y_QP, input_precision=PRECISION)
            y_QP += skip * x_again.to(tl.float32)
            place = ((row * length + step.to(tl.int64))[:, None] * heads + head) * P + p[None, :]
            tl.store(y + place, y_QP.to(y.dtype.element_ty), mask=inside & (p < P)[None, :])
        late = size * tl.load(to_end + at_head + q)
        late_QP = (x_again.to(tl.float32) * late[:, None]).to(x.dtype.element_ty)
        h *= tl.load(from_start + at_head + CHUNK - 1)
        h = tl.dot(tl.trans(late_QP), B_QN, h, input_precision=PRECISION)
    tl.store(final + at_state + state_place, h, mask=state_mask)


@triton.jit(do_not_specialize=["length", "num_chunks", "spans", "span"])
def state_gradients(
    dy, C, from_start, dfinal, dinitial, leaving,
    length, num_chunks, heads, heads_per_group, spans, span,
    dy_row, dy_time, dy_head, C_row, C_time, C_group,
    P: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill dinitial (B, spans, H, P, N) and, unless None, leaving (B, chunks, H, P, N): g of every chunk.

    dfinal (B, spans, H, P, N) is the gradient of the state that leaves each span.
    """
    pieces = heads * PIECES
    piece = tl.program_id(0) % pieces
    row, at_span = (tl.program_id(0) // pieces // spans).to(tl.int64), tl.program_id(0) // pieces % spans
    head, group = piece // PIECES, piece // PIECES // heads_per_group
    q, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = piece % PIECES * BLOCK_P + tl.arange(0, BLOCK_P)
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    state_place = head * P * N + p[:, None] * N + n[None, :]
    at_state = (row * spans + at_span) * heads * P * N
    g = tl.load(dfinal + at_state + state_place, mask=state_mask, other=0.0)

    dy += row * dy_row + head * dy_head
    C += row * C_row + group * C_group
    first = at_span * span
    past = tl.minimum(first + span, num_chunks)
    for back in tl.range(0, past - first, num_stages=STAGES):
        chunk = past - 1 - back
        step = chunk * CHUNK + q
        inside = (step < length)[:, None]
        dy_QP = tl.load(
            dy + step.to(tl.int64)[:, None] * dy_time + p[None, :], mask=inside & (p < P)[None, :], other=0.0
        )
        C_QN = tl.load(
            C + step.to(tl.int64)[:, None] * C_time + n[None, :], mask=inside & (n < N)[None, :], other=0.0
        )
        at_head = ((row * heads + head) * num_chunks + chunk) * CHUNK
        before = tl.load(from_start + at_head + q)
        if leaving is not None:
            at_chunk = (row * num_chunks + chunk) * heads * P * N
            tl.store(leaving + at_chunk + state_place, g.to(leaving.dtype.element_ty), mask=state_mask)
        early_QP = (dy_QP.to(tl.float32) * before[:, None]).to(dy.dtype.element_ty)
        g *= tl.load(from_start + at_head + CHUNK - 1)
        g = tl.dot(tl.trans(early_QP), C_QN, g, input_precision=PRECISION)
    tl.store(dinitial + at_state + state_place, g, mask=state_mask)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def head_gradients(
    x, B, C, D, dy, delta, coarse, fine, from_start, to_end, document, entering, leaving,
    dx, ddelta, drate, dD,
    length, num_chunks, heads, heads_per_group,
    x_row, x_time, x_head, B_row, B_time, B_group, C_row, C_time, C_group, dy_row, dy_time, dy_head,
    dx_row, dx_time,
    P: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Fill what belongs to one chunk and piece: dx like x; ddelta (u · x), drate (∂r) (B, pieces, chunks · Q), dD
    (B, chunks, pieces), these three with the pieces of a head still to be summed.
    """
    pieces = heads * PIECES
    piece = tl.program_id(0) % pieces
    row = (tl.program_id(0) // pieces // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) // pieces % num_chunks
    head, group = piece // PIECES, piece // PIECES // heads_per_group
    q, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = piece % PIECES * BLOCK_P + tl.arange(0, BLOCK_P)
    step = chunk * CHUNK + q
    time, inside = step.to(tl.int64)[:, None], (step < length)[:, None]
    narrow = x.dtype.element_ty
    tile, wide_tile = inside & (p < P)[None, :], inside & (n < N)[None, :]
    B_QN = tl.load(B + row * B_row + group * B_group + time * B_time + n[None, :], mask=wide_tile, other=0.0)
    C_QN = tl.load(C + row * C_row + group * C_group + time * C_time + n[None, :], mask=wide_tile, other=0.0)
    state_mask = (p < P)[:, None] & (n < N)[None, :]
    state_place = ((row * num_chunks + chunk) * heads + head) * P * N + p[:, None] * N + n[None, :]
    at_head = ((row * heads + head) * num_chunks + chunk) * CHUNK
    size = tl.load(delta + at_head + q)

    scores = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
    scores *= _between(coarse, fine, document, at_head, (row * num_chunks + chunk) * CHUNK, CHUNK, EXACT)
    g_PN = tl.load(leaving + state_place, mask=state_mask, other=0.0)
    u_QP = tl.dot(B_QN, tl.trans(g_PN), input_precision=PRECISION) * tl.load(to_end + at_head + q)[:, None]
    x_QP = tl.load(x + row * x_row + head * x_head + time * x_time + p[None, :], mask=tile, other=0.0)
    dy_QP = tl.load(dy + row * dy_row + head * dy_head + time * dy_time + p[None, :], mask=tile, other=0.0)
    late = tl.sum(u_QP * x_QP.to(tl.float32), axis=1) * size
    u_QP = tl.dot(tl.trans(scores.to(narrow)), dy_QP, u_QP, input_precision=PRECISION)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    dx_QP = u_QP * size[:, None] + skip * dy_QP.to(tl.float32)
    dx += row * dx_row + time * dx_time + head * P + p[None, :]
    tl.store(dx, dx_QP.to(dx.dtype.element_ty), mask=tile)
    at_piece = ((row * pieces + piece) * num_chunks + chunk) * CHUNK
    tl.store(ddelta + at_piece + q, tl.sum(u_QP * x_QP.to(tl.float32), axis=1))

    h_PN = tl.load(entering + state_place, mask=state_mask, other=0.0)
    early_QP = tl.dot(C_QN, tl.trans(h_PN), input_precision=PRECISION)
    early = tl.sum(early_QP * dy_QP.to(tl.float32), axis=1) * tl.load(from_start + at_head + q)
    through = tl.sum(tl.sum(g_PN.to(tl.float32) * h_PN.to(tl.float32), axis=1), axis=0)
    through *= tl.load(from_start + at_head + CHUNK - 1)
    weight = scores * size[None, :] * tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
    weight = tl.where(q[:, None] > q[None, :], weight, 0.0)
    before = (q[:, None] < q[None, :]).to(tl.float32)
    around = tl.dot(weight, before, input_precision=PRECISION)  # tf32: sums of many steps, to be summed again
    summed = tl.where(q[:, None] >= q[None, :], around + early[:, None], late[:, None])
    tl.store(drate + at_piece + q, tl.sum(summed, axis=0) + through)
    if dD is not None:
        both = tl.sum(tl.sum(dy_QP.to(tl.float32) * x_QP.to(tl.float32), axis=1), axis=0)
        tl.store(dD + (row * num_chunks + chunk) * pieces + piece, both)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def group_gradients(
    x, B, C, dy, delta, coarse, fine, from_start, to_end, document, entering, leaving, dB, dC,
    length, num_chunks, heads, groups, splits, count,
    x_row, x_time, x_head, B_row, B_time, B_group, C_row, C_time, C_group, dy_row, dy_time, dy_head,
    dB_split, dB_row, dB_time, dC_split, dC_row, dC_time,
    P: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fill dB and dC (splits, B, L, G, N) of a chunk and ``count`` pieces of a group; splits are still to be summed."""
    split, group = tl.program_id(0) % splits, tl.program_id(0) // splits % groups
    row_chunk = tl.program_id(0) // splits // groups
    row, chunk = (row_chunk // num_chunks).to(tl.int64), row_chunk % num_chunks
    q, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    step = chunk * CHUNK + q
    time, inside = step.to(tl.int64)[:, None], (step < length)[:, None]
    narrow = x.dtype.element_ty
    dB_QN = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC_QN = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    x += row * x_row + time * x_time
    dy += row * dy_row + time * dy_time
    at_chunk = (row * num_chunks + chunk) * heads * P * N
    for i in tl.range(0, count, num_stages=STAGES):
        piece = (group * splits + split) * count + i
        head = piece // PIECES
        p = piece % PIECES * BLOCK_P + tl.arange(0, BLOCK_P)
        tile = inside & (p < P)[None, :]
        x_QP = tl.load(x + head * x_head + p[None, :], mask=tile, other=0.0)
        dy_QP = tl.load(dy + head * dy_head + p[None, :], mask=tile, other=0.0)
        state_mask = (p < P)[:, None] & (n < N)[None, :]
        state_place = at_chunk + head * P * N + p[:, None] * N + n[None, :]
        h_PN = tl.load(entering + state_place, mask=state_mask, other=0.0)
        g_PN = tl.load(leaving + state_place, mask=state_mask, other=0.0)
        at_head = ((row * heads + head) * num_chunks + chunk) * CHUNK
        size = tl.load(delta + at_head + q)
        S = tl.dot(dy_QP, tl.trans(x_QP), input_precision=PRECISION)
        S *= _between(coarse, fine, document, at_head, (row * num_chunks + chunk) * CHUNK, CHUNK, EXACT)
        dscores += S * size[None, :]
        early_QP = (dy_QP.to(tl.float32) * tl.load(from_start + at_head + q)[:, None]).to(narrow)
        dC_QN = tl.dot(early_QP, h_PN, dC_QN, input_precision=PRECISION)
        late = size * tl.load(to_end + at_head + q)
        late_QP = (x_QP.to(tl.float32) * late[:, None]).to(narrow)
        dB_QN = tl.dot(late_QP, g_PN, dB_QN, input_precision=PRECISION)

    tile = inside & (n < N)[None, :]
    B_QN = tl.load(B + row * B_row + group * B_group + time * B_time + n[None, :], mask=tile, other=0.0)
    C_QN = tl.load(C + row * C_row + group * C_group + time * C_time + n[None, :], mask=tile, other=0.0)
    narrow_scores = dscores.to(narrow)
    dC_QN = tl.dot(narrow_scores, B_QN, dC_QN, input_precision=PRECISION)
    dB_QN = tl.dot(tl.trans(narrow_scores), C_QN, dB_QN, input_precision=PRECISION)
    place = split * dB_split + row * dB_row + time * dB_time + group * N + n[None, :]
    tl.store(dB + place, dB_QN.to(dB.dtype.element_ty), mask=tile)
    place = split * dC_split + row * dC_row + time * dC_time + group * N + n[None, :]
    tl.store(dC + place, dC_QN.to(dC.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["length", "num_chunks"])
def step_size_gradients(
    dt, A, dt_bias, delta, ddelta, drate, ddt, dA, ddt_bias,
    length, num_chunks, heads, dt_row, dt_time, dt_head, ddt_row, ddt_time, ddt_head,
    PIECES: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Fill ddt (B, L, H), and dA, ddt_bias (B · chunks, H) with the chunks still to be summed."""
    row, chunk = (tl.program_id(0) // num_chunks).to(tl.int64), tl.program_id(0) % num_chunks
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    step = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = head < heads
    inside = (step < length)[:, None] & exists[None, :]
    place = row * dt_row + step.to(tl.int64)[:, None] * dt_time + head[None, :] * dt_head
    raw = (
        tl.load(dt + place, mask=inside, other=0.0).to(tl.float32)
        + _load_vector(dt_bias, head, exists)[None, :]
    )
    _, slope = _step_size(raw, SOFTPLUS)
    dsize = tl.zeros([CHUNK, HEADS], tl.float32)
    dr = tl.zeros([CHUNK, HEADS], tl.float32)
    for i in tl.static_range(PIECES):
        place = ((row * heads + head) * PIECES + i)[None, :] * (num_chunks * CHUNK) + step[:, None]
        dsize += tl.load(ddelta + place, mask=inside, other=0.0)
        dr += tl.load(drate + place, mask=inside, other=0.0)
    place = (row * heads + head)[None, :] * (num_chunks * CHUNK) + step[:, None]
    size = tl.load(delta + place, mask=inside, other=0.0)
    draw = (dsize + dr * _load_vector(A, head, exists)[None, :]) * slope
    draw = tl.where(inside, draw, 0.0)
    place = row * ddt_row + step.to(tl.int64)[:, None] * ddt_time + head[None, :] * ddt_head
    tl.store(ddt + place, draw.to(ddt.dtype.element_ty), mask=inside)
    place = tl.program_id(0).to(tl.int64) * heads + head
    tl.store(dA + place, tl.sum(dr * size, axis=0), mask=exists)
    tl.store(ddt_bias + place, tl.sum(draw, axis=0), mask=exists)


@triton.jit
def step(
    state, x, dt, A, B, C, D, dt_bias, y, next_state, heads, heads_per_group,
    x_row, x_head, dt_row, dt_head, B_row, B_group, C_row, C_group,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Fill y (B, H, P) and next_state (B, H, P, N)."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    group = head // heads_per_group
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    raw = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head).to(tl.float32)
    size, _ = _step_size(raw, SOFTPLUS)
    decay = tl.exp2(size * (tl.load(A + head).to(tl.float32) * _LOG2_E))
    x_P = tl.load(x + row * x_row + head * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    B_N = tl.load(B + row * B_row + group * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    C_N = tl.load(C + row * C_row + group * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    place = (row * heads + head) * P * N + p[:, None] * N + n[None, :]
    exists = (p < P)[:, None] & (n < N)[None, :]
    h = tl.load(state + place, mask=exists, other=0.0).to(tl.float32) * decay
    h += (size * x_P)[:, None] * B_N[None, :]
    y_P = tl.sum(h * C_N[None, :], axis=1)
    if D is not None:
        y_P += tl.load(D + head).to(tl.float32) * x_P
    tl.store(next_state + place, h, mask=exists)
    tl.store(y + (row * heads + head) * P + p, y_P.to(y.dtype.element_ty), mask=p < P)
