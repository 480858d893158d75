// Selective scan, forward (Mamba, arXiv 2312.00752, section 3.2, eq. 2). Further macros: WARPS of a block, KEEP states for
// the backward pass, CHECKPOINT steps from one to the next, UNROLL rounds in the loop's body.
//
// A warp has WIDTH channels of one row and walks through time; its states stay in registers. Inputs of the next chunk of
// STEPS steps arrive in shared memory meanwhile.

static_assert(ROUNDS % UNROLL == 0 && UNROLL * ROUND % CHECKPOINT == 0 && STEPS % CHECKPOINT == 0, "");

struct alignas(16) Buffer {  // a chunk's inputs; y takes the place of x
    T x[STEPS * WIDTH], dt[STEPS * WIDTH];
#if GATE
    T z[STEPS * WIDTH];
#endif
    T BC[2 * STEPS * PADDED];
};
struct alignas(16) Warp {
    float B[STEPS * PADDED], C[STEPS * PADDED];
    Buffer buffer[2];
};

// FULL: all steps exist and none begins a document.
template <bool FULL>
__device__ __forceinline__ void chunk(
    Buffer& in, const Warp& warp, float (&h)[CHANNELS][STATES], const float (&rate)[CHANNELS][STATES],
    float skip, float bias, Kept* checkpoints, i64 checkpoint_size, int my_place, int steps, u32 starts, int lane)
{
    const int item = lane % LANES, my_step = item / CHANNELS, my_state = item * STATES;
    const int mine = my_step * WIDTH + lane / LANES * CHANNELS + item % CHANNELS;
    constexpr int UNROLLED = FULL ? UNROLL : 1;
    int rounds = FULL ? ROUNDS : (steps + ROUND - 1) / ROUND;
    asm volatile("" : "+r"(rounds));  // a number that the compiler knows would be unrolled without end
#pragma unroll 1
    for (int first = 0; first < rounds; first += UNROLLED) {
#pragma unroll
        for (int k = first; k < first + UNROLLED; ++k) {
            const int at = k * ROUND * WIDTH + mine;
            const bool inside = FULL || k * ROUND + my_step < steps;
            const float x = to_float(in.x[at]);
            const float delta = inside ? step_size(to_float(in.dt[at]) + bias) : 0.0f;  // beyond the end h stays
            const float drive = delta * x;
            float sum[ROUND][CHANNELS];
#pragma unroll
            for (int s = 0; s < ROUND; ++s) {
                const int t = k * ROUND + s;
                if (KEEP && ((FULL ? k - first : k) * ROUND + s) % CHECKPOINT == 0 && (FULL || t < steps)) {
                    keep(checkpoints + my_place, &h[0][0]);
                    checkpoints += checkpoint_size;
                }
                float B[STATES], C[STATES];
                load_states(B, warp.B + t * PADDED + my_state);
                load_states(C, warp.C + t * PADDED + my_state);
                if (!FULL && (starts >> t & 1)) {
#pragma unroll
                    for (int i = 0; i < CHANNELS; ++i)
#pragma unroll
                        for (int j = 0; j < STATES; ++j) h[i][j] = 0.0f;
                }
#pragma unroll
                for (int i = 0; i < CHANNELS; ++i) {
                    const float delta_i = from_item(delta, i, s, lane), drive_i = from_item(drive, i, s, lane);
#pragma unroll
                    for (int j = 0; j < STATES; ++j) {
                        h[i][j] = fmaf(exp2_approximate(delta_i * rate[i][j]), h[i][j], drive_i * B[j]);
                        sum[s][i] = j == 0 ? h[i][j] * C[j] : fmaf(h[i][j], C[j], sum[s][i]);
                    }
                }
            }
            float out = fmaf(skip, x, sum_over_states(sum, lane));
#if GATE
            const float z = to_float(in.z[at]);
            out *= z * sigmoid(z);
#endif
            in.x[at] = from_float(out);
        }
    }
}

static_assert(sizeof(Warp) * WARPS <= SHARED, "");  // what a launch reserves

struct Arguments {
    const T *x, *dt, *z, *B, *C;
    const float *A, *D, *dt_bias, *initial_state;
    const u8 *starts;
    T *y;
    float *final_state;
    Kept *checkpoints;
    i64 length, groups, width, padded_width, warps_per_group, warps, x_row, x_time, dt_row, dt_time, z_row,
        z_time, B_row, B_time, C_row, C_time;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) scan_forward(const Arguments arguments)
{
    const T *__restrict__ x = arguments.x, *__restrict__ dt = arguments.dt, *__restrict__ z = arguments.z,
        *__restrict__ B = arguments.B, *__restrict__ C = arguments.C;
    const float *__restrict__ A = arguments.A, *__restrict__ D = arguments.D,
        *__restrict__ dt_bias = arguments.dt_bias, *__restrict__ initial_state = arguments.initial_state;
    const u8 *__restrict__ starts = arguments.starts;
    T *__restrict__ y = arguments.y;
    float *__restrict__ final_state = arguments.final_state;
    Kept *__restrict__ checkpoints = arguments.checkpoints;
    const i64 length = arguments.length, groups = arguments.groups, width = arguments.width,
        padded_width = arguments.padded_width, warps_per_group = arguments.warps_per_group,
        warps = arguments.warps, x_row = arguments.x_row, x_time = arguments.x_time,
        dt_row = arguments.dt_row, dt_time = arguments.dt_time, z_row = arguments.z_row,
        z_time = arguments.z_time, B_row = arguments.B_row, B_time = arguments.B_time,
        C_row = arguments.C_row, C_time = arguments.C_time;
    extern __shared__ __align__(16) char memory[];
    const int lane = threadIdx.x % 32;
    Warp& mine = reinterpret_cast<Warp*>(memory)[threadIdx.x / 32];
    const u32 warp = blockIdx.x * WARPS + threadIdx.x / 32;
    if (warp >= warps) return;
    const u32 warps_per_row = (u32)(groups * warps_per_group);
    const i64 row = warp / warps_per_row;
    const u32 group = warp % warps_per_row / (u32)warps_per_group;
    const int begin = (warp % warps_per_row - group * (u32)warps_per_group) * WIDTH;
    const int columns = min(WIDTH, (int)width - begin);
    const i64 channel = group * width + begin, channels = groups * width;
    const int item = lane % LANES, my_column = lane / LANES * CHANNELS + item % CHANNELS;
    const bool exists = my_column < columns;

    float h[CHANNELS][STATES], rate[CHANNELS][STATES];
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
        const int column = my_column ^ i;
        const bool there = column < columns;
        get_states(rate[i], A + (channel + column) * N, item * STATES, there);
        get_states(h[i], initial_state + (row * channels + channel + column) * N, item * STATES, there && initial_state);
#pragma unroll
        for (int j = 0; j < STATES; ++j) rate[i][j] *= LOG2_E;
    }
    const float skip = exists && D ? D[channel + my_column] : 0.0f;
    const float bias = exists && dt_bias ? dt_bias[channel + my_column] : 0.0f;

    Rows<WIDTH> x_rows(row * x_row + channel, x_time, columns, lane);
    Rows<WIDTH> dt_rows(row * dt_row + channel, dt_time, columns, lane);
    Rows<WIDTH> z_rows(row * z_row + channel, z_time, columns, lane);
    Rows<WIDTH> y_rows(row * length * channels + channel, channels, columns, lane);
    StateRows BC_rows(B + row * B_row + group * N, C + row * C_row + group * N, B_time, C_time, lane);
    if (starts) starts += row * length;
    const int chunks = ((int)length + STEPS - 1) / STEPS;
    const int kept_states = ((int)length + CHECKPOINT - 1) / CHECKPOINT;
    if (KEEP) checkpoints += (row * kept_states * groups + group) * padded_width * PADDED;
    const i64 checkpoint_size = groups * padded_width * PADDED;
    const int my_place = kept_place(begin + my_column, item * STATES);

    int loaded = 0;
    auto load = [&]() {
        if (loaded < chunks) {
            Buffer& to = mine.buffer[loaded % 2];
            const int steps = (int)length - loaded * STEPS;
            x_rows.load(to.x, x, steps, lane), x_rows.move(STEPS);
            dt_rows.load(to.dt, dt, steps, lane), dt_rows.move(STEPS);
#if GATE
            z_rows.load(to.z, z, steps, lane), z_rows.move(STEPS);
#endif
            BC_rows.load(to.BC, steps, lane), BC_rows.move(STEPS, lane);
        }
        copy_commit();
        ++loaded;
    };
    load();
    for (int k = 0; k < chunks; ++k) {
        copy_wait<0>();
        __syncwarp();
        Buffer& in = mine.buffer[k % 2];
        widen(mine.B, in.BC, lane);
        __syncwarp();
        load();
        const int steps = min((int)length - k * STEPS, STEPS);
        u32 bits = 0;
        if (starts) bits = __ballot_sync(ALL, lane < steps && starts[k * STEPS + lane]);
        if (steps == STEPS && bits == 0)
            chunk<true>(in, mine, h, rate, skip, bias, checkpoints, checkpoint_size, my_place, steps, bits, lane);
        else
            chunk<false>(in, mine, h, rate, skip, bias, checkpoints, checkpoint_size, my_place, steps, bits, lane);
        __syncwarp();
        y_rows.store(y, in.x, steps, lane), y_rows.move(STEPS);
        if (KEEP) checkpoints += STEPS / CHECKPOINT * checkpoint_size;
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i)
        if ((my_column ^ i) < columns)
            put_states(final_state + (row * channels + channel + (my_column ^ i)) * N, h[i], item * STATES);
}
