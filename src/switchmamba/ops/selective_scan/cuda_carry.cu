// What a segment of time hands back to the one before it, for the backward pass of few channels: carry and decay of
//
//     carry_{t-1} = exp(Delta_t A) (carry_t + C_t g_t)
//
// over a segment whose last carry is zero. The decay of the whole segment is exp(A times the sum of Delta). Further macro: WARPS.

struct alignas(16) Buffer {
    T dt[STEPS * WIDTH], dy[STEPS * WIDTH];
#if GATE
    T z[STEPS * WIDTH];
#endif
    T BC[2 * STEPS * PADDED];  // of which C is used
};
struct alignas(16) Warp {
    float B[STEPS * PADDED], C[STEPS * PADDED];
    Buffer buffer[2];
};

template <bool FULL>
__device__ __forceinline__ void chunk(
    const Buffer& in, const Warp& warp, float (&carry)[CHANNELS][STATES], const float (&rate)[CHANNELS][STATES],
    float& elapsed, float bias, int steps, u32 starts, int lane)
{
    const int item = lane % LANES, my_step = item / CHANNELS, my_state = item * STATES;
    const int my_column = lane / LANES * CHANNELS + item % CHANNELS;
    int rounds = ROUNDS;
    asm volatile("" : "+r"(rounds));
#pragma unroll 2
    for (int k = rounds - 1; k >= 0; --k) {
        const int at = (k * ROUND + my_step) * WIDTH + my_column;
        const bool inside = FULL || k * ROUND + my_step < steps;
        const float delta = inside ? step_size(to_float(in.dt[at]) + bias) : 0.0f;
        float g = to_float(in.dy[at]);
#if GATE
        const float z = to_float(in.z[at]);
        g *= z * sigmoid(z);
#endif
        elapsed += delta;
#pragma unroll
        for (int s = ROUND - 1; s >= 0; --s) {
            const int t = k * ROUND + s;
            float C[STATES];
            load_states(C, warp.C + t * PADDED + my_state);
            const bool start = !FULL && (starts >> t & 1);
#pragma unroll
            for (int i = 0; i < CHANNELS; ++i) {
                const float delta_i = from_item(delta, i, s, lane), g_i = from_item(g, i, s, lane);
#pragma unroll
                for (int j = 0; j < STATES; ++j)
                    carry[i][j] = start ? 0.0f : fmaf(g_i, C[j], carry[i][j]) * exp2_approximate(delta_i * rate[i][j]);
            }
        }
    }
}

static_assert(sizeof(Warp) * WARPS <= SHARED, "");  // what a launch reserves

struct Arguments {
    const T *dt, *z, *B, *C;
    const float *A, *dt_bias;
    const u8 *starts;
    const T *dy;
    float *carries, *elapsed_times;
    i64 length, groups, width, padded_width, warps_per_group, warps, segments, segment_chunks, dt_row,
        dt_time, z_row, z_time, B_row, B_time, C_row, C_time;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_carry(const Arguments arguments)
{
    const T *__restrict__ dt = arguments.dt, *__restrict__ z = arguments.z, *__restrict__ B = arguments.B,
        *__restrict__ C = arguments.C;
    const float *__restrict__ A = arguments.A, *__restrict__ dt_bias = arguments.dt_bias;
    const u8 *__restrict__ starts = arguments.starts;
    const T *__restrict__ dy = arguments.dy;
    float *__restrict__ carries = arguments.carries, *__restrict__ elapsed_times = arguments.elapsed_times;
    const i64 length = arguments.length, groups = arguments.groups, width = arguments.width,
        padded_width = arguments.padded_width, warps_per_group = arguments.warps_per_group,
        warps = arguments.warps, segments = arguments.segments, segment_chunks = arguments.segment_chunks,
        dt_row = arguments.dt_row, dt_time = arguments.dt_time, z_row = arguments.z_row,
        z_time = arguments.z_time, B_row = arguments.B_row, B_time = arguments.B_time,
        C_row = arguments.C_row, C_time = arguments.C_time;
    extern __shared__ __align__(16) char memory[];
    const int lane = threadIdx.x % 32;
    Warp& mine = reinterpret_cast<Warp*>(memory)[threadIdx.x / 32];
    const u32 warp = blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= warps) return;
    const u32 tiles_per_row = (u32)(groups * warps_per_group);
    const u32 segment = 1 + warp / tiles_per_row % (u32)(segments - 1);  // none waits for the first
    const i64 row = warp / tiles_per_row / (u32)(segments - 1);
    const u32 group = warp % tiles_per_row / (u32)warps_per_group;
    const int begin = (warp % tiles_per_row - group * (u32)warps_per_group) * WIDTH;
    const int columns = min(WIDTH, (int)width - begin);
    const i64 channel = group * width + begin, channels = groups * width;
    const int item = lane % LANES, my_column = lane / LANES * CHANNELS + item % CHANNELS;

    float carry[CHANNELS][STATES], rate[CHANNELS][STATES], elapsed = 0.0f;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
        for (int j = 0; j < STATES; ++j) {
            const int n = item * STATES + j;
            const bool there = (my_column ^ i) < columns && n < N;
            rate[i][j] = there ? A[(channel + (my_column ^ i)) * N + n] * LOG2_E : 0.0f;
            carry[i][j] = 0.0f;
        }
    const float bias = my_column < columns && dt_bias ? dt_bias[channel + my_column] : 0.0f;

    const int chunks = ((int)length + STEPS - 1) / STEPS;
    const int first_chunk = segment * (int)segment_chunks, end_chunk = min(first_chunk + (int)segment_chunks, chunks);
    const i64 first = (i64)(end_chunk - 1) * STEPS;
    Rows<WIDTH> dt_rows(row * dt_row + first * dt_time + channel, dt_time, columns, lane);
    Rows<WIDTH> z_rows(row * z_row + first * z_time + channel, z_time, columns, lane);
    Rows<WIDTH> y_rows((row * length + first) * channels + channel, channels, columns, lane);
    StateRows BC_rows(B + row * B_row + first * B_time + group * N, C + row * C_row + first * C_time + group * N,
                      B_time, C_time, lane);
    if (starts) starts += row * length;

    int loading = end_chunk - 1;
    auto load = [&]() {
        if (loading >= first_chunk) {
            Buffer& to = mine.buffer[loading % 2];
            const int steps = (int)length - loading * STEPS;
            dt_rows.load(to.dt, dt, steps, lane);
            y_rows.load(to.dy, dy, steps, lane);
#if GATE
            z_rows.load(to.z, z, steps, lane);
#endif
            BC_rows.load(to.BC, steps, lane);
        }
        copy_commit();
        dt_rows.move(-STEPS), y_rows.move(-STEPS), z_rows.move(-STEPS), BC_rows.move(-STEPS, lane);
        --loading;
    };
    bool cut = false;  // a document begins in this segment: nothing passes
    load();
    for (int k = end_chunk - 1; k >= first_chunk; --k) {
        copy_wait<0>();
        __syncwarp();
        const Buffer& in = mine.buffer[k % 2];
        widen(mine.B, in.BC, lane);
        __syncwarp();
        load();
        const int steps = min((int)length - k * STEPS, STEPS);
        u32 bits = 0;
        if (starts) bits = __ballot_sync(ALL, lane < steps && starts[k * STEPS + lane]);
        cut = cut || bits != 0;
        if (steps == STEPS && bits == 0)
            chunk<true>(in, mine, carry, rate, elapsed, bias, steps, bits, lane);
        else
            chunk<false>(in, mine, carry, rate, elapsed, bias, steps, bits, lane);
    }
#pragma unroll
    for (int mask = CHANNELS; mask < LANES; mask *= 2) elapsed += __shfl_xor_sync(ALL, elapsed, mask);
    const i64 part = ((row * segments + segment) * groups + group) * padded_width;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
        for (int j = 0; j < STATES; j += 4)
            *reinterpret_cast<float4*>(carries + part * PADDED + state_place(begin + (my_column ^ i), item * STATES + j)) =
                make_float4(carry[i][j], carry[i][j + 1], carry[i][j + 2], carry[i][j + 3]);
    if (item < CHANNELS) elapsed_times[part + begin + my_column] = cut ? -1.0f : elapsed;
}
