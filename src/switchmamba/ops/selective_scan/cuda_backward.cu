// Selective scan, backward. Further macros: WARPS of a block.
//
//     g_t = dloss/d(C_t h_t + D x_t)          carry_t = dloss/dh_t from later steps
//     adjoint_t = carry_t + C_t g_t           carry_{t-1} = exp(Delta_t A) adjoint_t
//
// A block has WARPS * WIDTH channels of one group, one row and one segment of time. Chunks of STEPS steps are taken
// last first: their states are computed again from the checkpoint into registers, then the chunk is walked back.

struct alignas(16) Buffer {  // a chunk's inputs; the gradients take the places of x, dt and z
    T x[STEPS * WIDTH], dt[STEPS * WIDTH], dy[STEPS * WIDTH];
#if GATE
    T z[STEPS * WIDTH];
#endif
    T BC[2 * STEPS * PADDED];
};
struct alignas(16) Warp {
    float B[STEPS * PADDED], C[STEPS * PADDED];
    float delta[STEPS * WIDTH], slope[STEPS * WIDTH];
    float4 state[CHANNELS * STATES / 4 * 32];  // before the chunk
    Buffer buffer[2];
};
struct alignas(16) Shared {
    float sum[2][WARPS][STEPS][2 * PADDED];
    Warp warp[WARPS];
};

struct Totals {  // gradients that are sums over time
    float A[CHANNELS][STATES], D, bias;
};

// Sum over the warp's groups of lanes; lane l receives the VALUES values from place(l) on, of B's and then C's PADDED.
constexpr int VALUES = 2 * STATES / GROUPS;
static_assert(VALUES * GROUPS == 2 * STATES, "");
__device__ __forceinline__ void sum_over_channels(float (&value)[2 * STATES], int lane) {
#pragma unroll
    for (int half = STATES, mask = 16; half >= VALUES; half /= 2, mask /= 2) {
        const bool upper = lane & mask;
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const float mine = upper ? value[j + half] : value[j];
            const float other = upper ? value[j] : value[j + half];
            value[j] = mine + __shfl_xor_sync(ALL, other, mask);
        }
    }
}
__device__ __forceinline__ int place(int lane) {
    int j = 0;
    for (int half = STATES, mask = 16; half >= VALUES; half /= 2, mask /= 2) j += lane & mask ? half : 0;
    return j / STATES * PADDED + lane % LANES * STATES + j % STATES;
}

__device__ __forceinline__ void get_state(float (&h)[CHANNELS][STATES], const float4* from, int lane) {
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
        for (int j = 0; j < STATES; j += 4) {
            const float4 v = from[(i * STATES + j) / 4 * 32 + lane];
            h[i][j] = v.x, h[i][j + 1] = v.y, h[i][j + 2] = v.z, h[i][j + 3] = v.w;
        }
}

// FULL: all steps exist and none begins a document.
template <bool FULL>
__device__ __forceinline__ void chunk(
    Buffer& in, Warp& warp, float (&h)[CHANNELS][STATES], float (&carry)[CHANNELS][STATES],
    const float (&rate)[CHANNELS][STATES], Totals& total, float skip, float bias, float* sum, int steps, u32 starts, int lane)
{
    const int item = lane % LANES, my_step = item / CHANNELS;
    const int my_column = lane / LANES * CHANNELS + item % CHANNELS, my_state = item * STATES;
    float past[STEPS][CHANNELS][STATES];
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
        const int at = (k * ROUND + my_step) * WIDTH + my_column;
        const bool inside = FULL || k * ROUND + my_step < steps;
        const float x = to_float(in.x[at]), raw = to_float(in.dt[at]) + bias;
        float delta = raw;
#if SOFTPLUS
        const float small = exp2_approximate(-LOG2_E * fabsf(raw)), larger = reciprocal(1.0f + small);
        delta = max_nan(raw, 0.0f) + log1p_polynomial(small);
        warp.slope[at] = raw >= 0.0f ? larger : small * larger;
#endif
        delta = inside ? delta : 0.0f;
        const float drive = delta * x;
        warp.delta[at] = delta;
#pragma unroll
        for (int s = 0; s < ROUND; ++s) {
            const int t = k * ROUND + s;
            float B[STATES];
            load_states(B, warp.B + t * PADDED + my_state);
            const bool start = !FULL && (starts >> t & 1);
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i) {
                const float delta_i = from_item(delta, i, s, lane), drive_i = from_item(drive, i, s, lane);
#pragma unroll
                for (int j = 0; j < STATES; ++j) {
                    past[t][i][j] = h[i][j];
                    h[i][j] = fmaf(exp2_approximate(delta_i * rate[i][j]), start ? 0.0f : h[i][j], drive_i * B[j]);
                }
            }
        }
    }
#pragma unroll
    for (int k = ROUNDS - 1; k >= 0; --k) {
        const int at = (k * ROUND + my_step) * WIDTH + my_column;
        const bool inside = FULL || k * ROUND + my_step < steps;
        const float x = to_float(in.x[at]), delta = warp.delta[at], drive = delta * x, dy = to_float(in.dy[at]);
#if GATE
        const float z = to_float(in.z[at]), gate = sigmoid(z), g = dy * (z * gate);
#else
        const float g = dy;
#endif
        float ungated[ROUND][CHANNELS], ddrive[ROUND][CHANNELS], dexponent[ROUND][CHANNELS];
#pragma unroll
        for (int s = ROUND - 1; s >= 0; --s) {
            const int t = k * ROUND + s;
            float B[STATES], C[STATES], dBC[2 * STATES];
            load_states(B, warp.B + t * PADDED + my_state);
            load_states(C, warp.C + t * PADDED + my_state);
            const bool start = !FULL && (starts >> t & 1);
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i) {
                const float delta_i = from_item(delta, i, s, lane), drive_i = from_item(drive, i, s, lane);
                const float g_i = from_item(g, i, s, lane);
#pragma unroll
                for (int j = 0; j < STATES; ++j) {
                    const float before = past[t][i][j];
                    const float adjoint = fmaf(g_i, C[j], carry[i][j]);
                    dBC[j] = i == 0 ? adjoint * drive_i : fmaf(adjoint, drive_i, dBC[j]);
                    dBC[STATES + j] = i == 0 ? h[i][j] * g_i : fmaf(h[i][j], g_i, dBC[STATES + j]);
                    carry[i][j] = start ? 0.0f : adjoint * exp2_approximate(delta_i * rate[i][j]);
                    const float dlog = start ? 0.0f : carry[i][j] * before;  // of Delta_t A
                    total.A[i][j] = fmaf(dlog, delta_i, total.A[i][j]);
#if GATE
                    ungated[s][i] = j == 0 ? h[i][j] * C[j] : fmaf(h[i][j], C[j], ungated[s][i]);
#endif
                    ddrive[s][i] = j == 0 ? adjoint * B[j] : fmaf(adjoint, B[j], ddrive[s][i]);
                    dexponent[s][i] = j == 0 ? dlog * rate[i][j] : fmaf(dlog, rate[i][j], dexponent[s][i]);
                    h[i][j] = before;
                }
            }
            sum_over_channels(dBC, lane);
#pragma unroll
            for (int v = 0; v < VALUES; ++v) sum[t * 2 * PADDED + v / STATES * PADDED + v % STATES] = dBC[v];
        }
        const float of_drive = sum_over_states(ddrive, lane);
        float of_raw = fmaf(sum_over_states(dexponent, lane), LN_2, of_drive * x);
#if SOFTPLUS
        of_raw *= warp.slope[at];
#endif
#if GATE
        const float y = fmaf(skip, x, sum_over_states(ungated, lane));
        in.z[at] = from_float(dy * y * (gate * fmaf(z, 1.0f - gate, 1.0f)));
#endif
        of_raw = inside ? of_raw : 0.0f;
        total.D = fmaf(g, x, total.D);
        total.bias += of_raw;
        in.x[at] = from_float(fmaf(of_drive, delta, skip * g));
        in.dt[at] = from_float(of_raw);
    }
}

struct Arguments {
    const T *x, *dt, *z, *B, *C;
    const float *A, *D, *dt_bias;
    const u8 *starts;
    const float *checkpoints;
    const T *dy;
    const float *dfinal, *carries, *elapsed_times;
    T *dx, *ddt, *dz;
    float *slabs, *dA, *dD, *ddt_bias, *dinitial;
    i64 rows, length, groups, width, padded_width, blocks_per_group, segments, segment_chunks, x_row, x_time,
        dt_row, dt_time, z_row, z_time, B_row, B_time, C_row, C_time;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) scan_backward(const Arguments arguments)
{
    const T *__restrict__ x = arguments.x, *__restrict__ dt = arguments.dt, *__restrict__ z = arguments.z,
        *__restrict__ B = arguments.B, *__restrict__ C = arguments.C;
    const float *__restrict__ A = arguments.A, *__restrict__ D = arguments.D, *__restrict__ dt_bias = arguments.dt_bias;
    const u8 *__restrict__ starts = arguments.starts;
    const float *__restrict__ checkpoints = arguments.checkpoints;
    const T *__restrict__ dy = arguments.dy;
    const float *__restrict__ dfinal = arguments.dfinal, *__restrict__ carries = arguments.carries,
        *__restrict__ elapsed_times = arguments.elapsed_times;
    T *__restrict__ dx = arguments.dx, *__restrict__ ddt = arguments.ddt, *__restrict__ dz = arguments.dz;
    float *__restrict__ slabs = arguments.slabs, *__restrict__ dA = arguments.dA,
        *__restrict__ dD = arguments.dD, *__restrict__ ddt_bias = arguments.ddt_bias,
        *__restrict__ dinitial = arguments.dinitial;
    const i64 rows = arguments.rows, length = arguments.length, groups = arguments.groups,
        width = arguments.width, padded_width = arguments.padded_width,
        blocks_per_group = arguments.blocks_per_group, segments = arguments.segments,
        segment_chunks = arguments.segment_chunks, x_row = arguments.x_row, x_time = arguments.x_time,
        dt_row = arguments.dt_row, dt_time = arguments.dt_time, z_row = arguments.z_row,
        z_time = arguments.z_time, B_row = arguments.B_row, B_time = arguments.B_time,
        C_row = arguments.C_row, C_time = arguments.C_time;
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int lane = threadIdx.x % 32, which = threadIdx.x / 32;
    Warp& mine = shared.warp[which];
    const u32 blocks_per_row = (u32)(groups * blocks_per_group);
    const u32 block = blockIdx.x % blocks_per_row, segment = blockIdx.x / blocks_per_row % (u32)segments;
    const i64 row = blockIdx.x / blocks_per_row / (u32)segments;
    const u32 group = block / (u32)blocks_per_group;
    const int begin = ((block - group * (u32)blocks_per_group) * WARPS + which) * WIDTH;
    const int columns = min(WIDTH, (int)width - begin);  // none or less where the group has fewer channels
    const i64 channel = group * width + begin, channels = groups * width;
    const int item = lane % LANES, my_column = lane / LANES * CHANNELS + item % CHANNELS;
    const bool exists = my_column < columns;

    const int chunks = ((int)length + STEPS - 1) / STEPS;
    const int first_chunk = segment * (int)segment_chunks, end_chunk = min(first_chunk + (int)segment_chunks, chunks);

    float carry[CHANNELS][STATES], rate[CHANNELS][STATES];
    Totals total = {};
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        const int column = my_column ^ i;
#pragma unroll
        for (int j = 0; j < STATES; ++j) {
            const int n = item * STATES + j;
            const bool there = column < columns && n < N;
            rate[i][j] = there ? A[(channel + column) * N + n] * LOG2_E : 0.0f;
            carry[i][j] = there && dfinal ? dfinal[(row * channels + channel + column) * N + n] : 0.0f;
        }
    }
    for (int later = columns > 0 ? (int)segments - 1 : 0; later > (int)segment; --later) {  // what they hand back, from scan_carry
        const i64 part = ((row * segments + later) * groups + group) * padded_width;
#pragma unroll
        for (int i = 0; i < CHANNELS; ++i) {
            const float elapsed = elapsed_times[part + begin + (my_column ^ i)];  // negative: nothing passes
#pragma unroll
            for (int j = 0; j < STATES; j += 4) {
                const float4 v = *reinterpret_cast<const float4*>(
                    carries + part * PADDED + state_place(begin + (my_column ^ i), item * STATES + j));
                const float own[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int m = 0; m < 4; ++m)
                    carry[i][j + m] = elapsed < 0.0f ? own[m]
                                    : fmaf(exp2_approximate(elapsed * rate[i][j + m]), carry[i][j + m], own[m]);
            }
        }
    }
    const float skip = exists && D ? D[channel + my_column] : 0.0f;
    const float bias = exists && dt_bias ? dt_bias[channel + my_column] : 0.0f;

    const i64 first = (i64)(end_chunk - 1) * STEPS;  // of the next chunk to load
    Rows<WIDTH> x_rows(row * x_row + first * x_time + channel, x_time, columns, lane);
    Rows<WIDTH> dt_rows(row * dt_row + first * dt_time + channel, dt_time, columns, lane);
    Rows<WIDTH> z_rows(row * z_row + first * z_time + channel, z_time, columns, lane);
    Rows<WIDTH> y_rows((row * length + first) * channels + channel, channels, columns, lane);
    StateRows BC_rows(B + row * B_row + first * B_time + group * N, C + row * C_row + first * C_time + group * N,
                      B_time, C_time, lane);
    if (starts) starts += row * length;
    checkpoints += (((row * chunks + end_chunk - 1) * groups + group) * padded_width) * PADDED;

    int loading = end_chunk - 1;
    auto load = [&]() {
        if (loading >= first_chunk) {
            Buffer& to = mine.buffer[loading % 2];
            const int steps = (int)length - loading * STEPS;
            x_rows.load(to.x, x, steps, lane);
            dt_rows.load(to.dt, dt, steps, lane);
            y_rows.load(to.dy, dy, steps, lane);
#if GATE
            z_rows.load(to.z, z, steps, lane);
#endif
            BC_rows.load(to.BC, steps, lane);
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
                for (int j = 0; j < STATES; j += 4)
                    copy_async<16>(shared_address(mine.state + (i * STATES + j) / 4 * 32 + lane),
                                   checkpoints + state_place(begin + (my_column ^ i), item * STATES + j),
                                   (my_column ^ i) < columns);
        }
        copy_commit();
        x_rows.move(-STEPS), dt_rows.move(-STEPS), y_rows.move(-STEPS);
#if GATE
        z_rows.move(-STEPS);
#endif
        BC_rows.move(-STEPS, lane);
        checkpoints -= groups * padded_width * PADDED;
        --loading;
    };

    // A thread sums EACH values over the block's warps.
    constexpr int EACH = STEPS * 2 * PADDED / (32 * WARPS);
    const int my_value = threadIdx.x * EACH, my_step = my_value / (2 * PADDED);
    slabs += (((block - group * (u32)blocks_per_group) * rows + row) * length + first + my_step) * groups * (2 * PADDED)
           + group * (2 * PADDED) + my_value % (2 * PADDED);
    int my_place = which * STEPS * 2 * PADDED + place(lane);
    asm volatile("" : "+r"(my_place));  // keep it: computing it again takes longer

    load();
    for (int k = end_chunk - 1; k >= first_chunk; --k) {
        copy_wait<0>();
        __syncwarp();
        Buffer& in = mine.buffer[k % 2];
        widen(mine.B, in.BC, lane);
        float h[CHANNELS][STATES];
        get_state(h, mine.state, lane);
        __syncwarp();
        load();
        const int steps = min((int)length - k * STEPS, STEPS);
        u32 bits = 0;
        if (starts) bits = __ballot_sync(ALL, lane < steps && starts[k * STEPS + lane]);
        float* sum = &shared.sum[k % 2][0][0][0];
        if (steps == STEPS && bits == 0)
            chunk<true>(in, mine, h, carry, rate, total, skip, bias, sum + my_place, steps, bits, lane);
        else
            chunk<false>(in, mine, h, carry, rate, total, skip, bias, sum + my_place, steps, bits, lane);
        __syncthreads();
        Rows<WIDTH> out = y_rows;  // which is two chunks ahead
        out.move(2 * STEPS);
        out.store(dx, in.x, steps, lane);
        out.store(ddt, in.dt, steps, lane);
#if GATE
        out.store(dz, in.z, steps, lane);
#endif
#pragma unroll 4
        for (int v = 0; v < EACH; ++v) {
            float total_v = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total_v += sum[w * STEPS * 2 * PADDED + my_value + v];
            if (my_step < steps) slabs[v] = total_v;
        }
        slabs -= STEPS * groups * (2 * PADDED);
    }
    const i64 part = row * segments + segment;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
        for (int j = 0; j < STATES; ++j)
            if ((my_column ^ i) < columns && item * STATES + j < N) {
                const i64 at = (my_column ^ i) * N + item * STATES + j;
                dA[(part * channels + channel) * N + at] = total.A[i][j];
                if (segment == 0) dinitial[(row * channels + channel) * N + at] = carry[i][j];
            }
    // A lane has its channel's steps of every round: sum over the lanes that share the channel.
#pragma unroll
    for (int mask = CHANNELS; mask < LANES; mask *= 2) {
        total.D += __shfl_xor_sync(ALL, total.D, mask);
        total.bias += __shfl_xor_sync(ALL, total.bias, mask);
    }
    if (exists && item < CHANNELS) {
        dD[part * channels + channel + my_column] = total.D;
        ddt_bias[part * channels + channel + my_column] = total.bias;
    }
}
