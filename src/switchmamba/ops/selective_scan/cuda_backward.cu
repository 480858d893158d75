// Selective scan, backward. Further macros: WARPS of a block.
//
//     g_t = dloss/d(C_t h_t + D x_t)          carry_t = dloss/dh_t from later steps
//     adjoint_t = carry_t + C_t g_t           carry_{t-1} = exp(Delta_t A) adjoint_t
//
// A block has WARPS * WIDTH channels of one group, one row and one segment of time. Chunks of STEPS steps are taken
// last first, and of a chunk parts of SUB steps: states and decays of a part are computed again from the kept state into
// registers, then the part is walked back.

struct alignas(16) Buffer {  // a chunk's inputs; the gradients take the places of x, dt and z
    T x[STEPS * WIDTH], dt[STEPS * WIDTH], dy[STEPS * WIDTH];
#if GATE
    T z[STEPS * WIDTH];
#endif
    T BC[2 * STEPS * PADDED];
};
struct Totals {  // gradients that are sums over time
    float A[CHANNELS][STATES], D, bias;
};

// dB and dC are products of a lane's registers, summed over its channels as they arise and then over the lanes that have
// the same states. With four groups of lanes or more a tensor core takes that sum over four of them: one-hot columns
// place step t of SUB at columns 2t and 2t + 1. The SUM_PARTS sums that remain are added through shared memory.
constexpr int SUB = ROUND > 4 ? ROUND : 4;  // steps from one kept state to the next
constexpr bool TENSOR = GROUPS >= 4;
constexpr int SUM_PARTS = TENSOR ? GROUPS / 4 : 1;
constexpr int SUM_ROW = 2 * PADDED + (SUM_PARTS > 1 ? 4 : 0), SUM_PART = SUB * SUM_ROW;  // apart in banks
constexpr bool EXACT = T_KIND != 1;  // the tensor core reads ten bits of mantissa; two such numbers make twenty
static_assert(SUM_PARTS == 1 || SUB * 2 * PADDED == 128, "");  // four values a lane

struct alignas(16) Warp {
    float B[STEPS * PADDED], C[STEPS * PADDED];
    Kept state[STEPS / SUB][KEPT * 32];  // before every SUB steps
    float parts[SUM_PARTS > 1 ? SUM_PARTS * SUM_PART : 4];
    Buffer buffer[2];
};
struct alignas(16) Shared {
    float sum[2][WARPS][STEPS * 2 * PADDED];
    Warp warp[WARPS];
};

__device__ __forceinline__ void add_groups(float (&sum)[4], const float (&value)[4], u32 even, u32 odd) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(value[0])), "r"(__float_as_uint(value[2])), "r"(__float_as_uint(value[1])),
          "r"(__float_as_uint(value[3])), "r"(even), "r"(odd));
}

struct StateSums {
    float sum[2 * STATES / 4][4];
    __device__ __forceinline__ void add(const float (&value)[2 * STATES], int t, int lane) {
        const u32 even = lane / 4 == 2 * t ? 0x3f800000u : 0u, odd = lane / 4 == 2 * t + 1 ? 0x3f800000u : 0u;
#pragma unroll
        for (int q = 0; q < 2 * STATES / 4; ++q) {
            float part[4], rest[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float v = value[4 * q + j];
                part[j] = EXACT ? __uint_as_float(__float_as_uint(v) & 0xffffe000u) : v;
                rest[j] = v - part[j];
            }
            add_groups(sum[q], part, even, odd);
            if (EXACT) add_groups(sum[q], rest, even, odd);
        }
    }
    // SUB steps to the block's sums; `parts` is the warp's own memory.
    __device__ __forceinline__ void store(float* to, float* parts, int lane) const {
        float* own = (SUM_PARTS > 1 ? parts + lane / 4 % SUM_PARTS * SUM_PART : to) + lane % 4 * SUM_ROW + item_of(lane) * STATES;
#pragma unroll
        for (int q = 0; q < 2 * STATES / 4; ++q)
            *reinterpret_cast<float4*>(own + q / (STATES / 4) * PADDED + q % (STATES / 4) * 4) =
                make_float4(sum[q][0], sum[q][1], sum[q][2], sum[q][3]);
        if constexpr (SUM_PARTS > 1) {
            __syncwarp();
            const float* from = parts + lane / 8 * SUM_ROW + lane % 8 * 4;
            float4 total = *reinterpret_cast<const float4*>(from);
#pragma unroll
            for (int part = 1; part < SUM_PARTS; ++part) {
                const float4 v = *reinterpret_cast<const float4*>(from + part * SUM_PART);
                total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
            }
            *reinterpret_cast<float4*>(to + lane * 4) = total;
        }
    }
};

// The same by shuffles: lane l receives the VALUES values from place(l) on, of B's and then C's PADDED.
constexpr int VALUES = 2 * STATES / (TENSOR ? 1 : GROUPS);
__device__ __forceinline__ void sum_over_channels(float (&value)[2 * STATES], int lane) {
#pragma unroll
    for (int half = STATES, mask = GROUPS / 2; half >= VALUES; half /= 2, mask /= 2) {
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
    for (int half = STATES, mask = GROUPS / 2; half >= VALUES; half /= 2, mask /= 2) j += lane & mask ? half : 0;
    return j / STATES * PADDED + item_of(lane) * STATES + j % STATES;
}

// A lane's pieces lie 32 pieces apart.
__device__ __forceinline__ void get_state(float* h, const Kept* from, int lane) {
#pragma unroll
    for (int r = 0; r < KEPT; r += PIECE) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + r * 32 + lane * PIECE);
        const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#if T_KIND == 1
            h[r + 2 * k] = __uint_as_float(word[k] << 16), h[r + 2 * k + 1] = __uint_as_float(word[k] & 0xffff0000u);
#else
            h[r + k] = __uint_as_float(word[k]);
#endif
        }
    }
}

// FULL: all steps exist and none begins a document.
template <bool FULL, typename Load>
__device__ __forceinline__ void chunk(
    Buffer& in, Warp& warp, const Load& load_state, float (&carry)[CHANNELS][STATES],
    const float (&rate)[CHANNELS][STATES], Totals& total, float skip, float bias, float* sum, int steps, u32 starts, int lane)
{
    const int item = item_of(lane), my_step = item / CHANNELS;
    const int my_column = group_of(lane) * CHANNELS + item % CHANNELS, my_state = item * STATES;
#pragma unroll 1
    for (int first = STEPS - SUB; first >= 0; first -= SUB) {
        float past[SUB][CHANNELS][STATES], h[CHANNELS][STATES], deltas[SUB / ROUND], slopes[SUB / ROUND];
        get_state(&h[0][0], warp.state[first / SUB], lane);
        __syncwarp();
        load_state(first / SUB);
#pragma unroll
        for (int k = 0; k < SUB / ROUND; ++k) {
            const int at = (first + k * ROUND + my_step) * WIDTH + my_column;
            const bool inside = FULL || first + k * ROUND + my_step < steps;
            const float x = to_float(in.x[at]), raw = to_float(in.dt[at]) + bias;
            float delta = raw;
#if SOFTPLUS
            const float small = exp2_approximate(-LOG2_E * fabsf(raw)), larger = reciprocal(1.0f + small);
            delta = max_nan(raw, 0.0f) + log1p_polynomial(small);
            slopes[k] = raw >= 0.0f ? larger : small * larger;
#endif
            delta = inside ? delta : 0.0f;
            const float drive = delta * x;
            deltas[k] = delta;
#pragma unroll
            for (int s = 0; s < ROUND; ++s) {
                const int t = k * ROUND + s;
                float B[STATES];
                load_states(B, warp.B + (first + t) * PADDED + my_state);
                const bool start = !FULL && (starts >> (first + t) & 1);
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
        StateSums sums = {};
#pragma unroll
        for (int k = SUB / ROUND - 1; k >= 0; --k) {
            const int at = (first + k * ROUND + my_step) * WIDTH + my_column;
            const bool inside = FULL || first + k * ROUND + my_step < steps;
            const float x = to_float(in.x[at]), delta = deltas[k], drive = delta * x, dy = to_float(in.dy[at]);
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
                load_states(B, warp.B + (first + t) * PADDED + my_state);
                load_states(C, warp.C + (first + t) * PADDED + my_state);
                const bool start = !FULL && (starts >> (first + t) & 1);
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
                if constexpr (TENSOR) {
                    sums.add(dBC, t, lane);
                } else {
                    sum_over_channels(dBC, lane);
#pragma unroll
                    for (int v = 0; v < VALUES; ++v)
                        sum[place(lane) + (first + t) * 2 * PADDED + v / STATES * PADDED + v % STATES] = dBC[v];
                }
            }
            const float of_drive = sum_over_states(ddrive, lane);
            float of_raw = fmaf(sum_over_states(dexponent, lane), LN_2, of_drive * x);
#if SOFTPLUS
            of_raw *= slopes[k];
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
        if constexpr (TENSOR) sums.store(sum + first * 2 * PADDED, warp.parts, lane);
    }
}

static_assert(sizeof(Shared) <= SHARED, "");  // what a launch reserves

struct Arguments {
    const T *x, *dt, *z, *B, *C;
    const float *A, *D, *dt_bias;
    const u8 *starts;
    const Kept *checkpoints;
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
    const Kept *__restrict__ checkpoints = arguments.checkpoints;
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
    const int item = item_of(lane), my_column = group_of(lane) * CHANNELS + item % CHANNELS;
    const bool exists = my_column < columns;

    const int chunks = ((int)length + STEPS - 1) / STEPS;
    const int first_chunk = segment * (int)segment_chunks, end_chunk = min(first_chunk + (int)segment_chunks, chunks);

    float carry[CHANNELS][STATES], rate[CHANNELS][STATES];
    Totals total = {};
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        const int column = my_column ^ i;
        const bool there = column < columns;
        get_states(rate[i], A + (channel + column) * N, item * STATES, there);
        get_states(carry[i], dfinal + (row * channels + channel + column) * N, item * STATES, there && dfinal);
#pragma unroll
        for (int j = 0; j < STATES; ++j) rate[i][j] *= LOG2_E;
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
    const i64 checkpoint = groups * padded_width * PADDED;
    const int kept_states = ((int)length + SUB - 1) / SUB;
    checkpoints += row * kept_states * checkpoint + group * padded_width * PADDED;

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
        }
        copy_commit();
        x_rows.move(-STEPS), dt_rows.move(-STEPS), y_rows.move(-STEPS);
#if GATE
        z_rows.move(-STEPS);
#endif
        BC_rows.move(-STEPS, lane);
        --loading;
    };
    int state = end_chunk * (STEPS / SUB) - 1;  // to load next
    const Kept* my_states = checkpoints + state * checkpoint + kept_place(begin + my_column, item * STATES);
    auto load_state = [&](int part) {
        if (state >= first_chunk * (STEPS / SUB)) {
            const bool there = (my_column & ~3) < columns && state < kept_states;  // the forward pass has whole fours
            const u32 to = shared_address(mine.state[part] + lane * PIECE);
#pragma unroll
            for (int r = 0; r < KEPT; r += PIECE)
                copy_async<16>(to + r * 32 * sizeof(Kept), my_states + kept_apart(r), there);
        }
        copy_commit();
        my_states -= checkpoint, --state;
    };

    // A thread sums EACH values over the block's warps.
    constexpr int EACH = STEPS * 2 * PADDED / (32 * WARPS);
    const int my_value = threadIdx.x * EACH, my_step = my_value / (2 * PADDED);
    slabs += (((block - group * (u32)blocks_per_group) * rows + row) * length + first + my_step) * groups * (2 * PADDED)
           + group * (2 * PADDED) + my_value % (2 * PADDED);
    load();
#pragma unroll
    for (int part = STEPS / SUB - 1; part >= 0; --part) load_state(part);
    for (int k = end_chunk - 1; k >= first_chunk; --k) {
        copy_wait<0>();
        __syncwarp();
        Buffer& in = mine.buffer[k % 2];
        widen(mine.B, in.BC, lane);
        __syncwarp();
        load();
        const int steps = min((int)length - k * STEPS, STEPS);
        u32 bits = 0;
        if (starts) bits = __ballot_sync(ALL, lane < steps && starts[k * STEPS + lane]);
        float* sum = shared.sum[k % 2][which];
        if (steps == STEPS && bits == 0)
            chunk<true>(in, mine, load_state, carry, rate, total, skip, bias, sum, steps, bits, lane);
        else
            chunk<false>(in, mine, load_state, carry, rate, total, skip, bias, sum, steps, bits, lane);
        __syncthreads();
        Rows<WIDTH> out = y_rows;  // which is two chunks ahead
        out.move(2 * STEPS);
        out.store(dx, in.x, steps, lane);
        out.store(ddt, in.dt, steps, lane);
#if GATE
        out.store(dz, in.z, steps, lane);
#endif
        if (my_step < steps) {
#pragma unroll
            for (int v = 0; v < EACH; v += 2) {
                float2 total_v = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    const float2 of_warp = *reinterpret_cast<const float2*>(&shared.sum[k % 2][w][my_value + v]);
                    total_v.x += of_warp.x, total_v.y += of_warp.y;
                }
                *reinterpret_cast<float2*>(slabs + v) = total_v;
            }
        }
        slabs -= STEPS * groups * (2 * PADDED);
    }
    const i64 part = row * segments + segment;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
        if ((my_column ^ i) < columns) {
            put_states(dA + (part * channels + channel + (my_column ^ i)) * N, total.A[i], item * STATES);
            if (segment == 0)
                put_states(dinitial + (row * channels + channel + (my_column ^ i)) * N, carry[i], item * STATES);
        }
    // A lane has its channel's steps of every round: sum over the lanes that share the channel.
#pragma unroll
    for (int mask = CHANNELS * ITEM_STRIDE; mask < LANES * ITEM_STRIDE; mask *= 2) {
        total.D += __shfl_xor_sync(ALL, total.D, mask);
        total.bias += __shfl_xor_sync(ALL, total.bias, mask);
    }
    if (exists && item < CHANNELS) {
        dD[part * channels + channel + my_column] = total.D;
        ddt_bias[part * channels + channel + my_column] = total.bias;
    }
}
