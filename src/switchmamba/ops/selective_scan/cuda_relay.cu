// Selective scan, forward, for few channels: the warps of a block take turns in time and hand the state on.
// Further macros: WARPS, KEEP, CHECKPOINT, as in cuda_forward.cu.
//
// Only h_t = a_t h_{t-1} + b_t must wait for the past. A warp computes the a and b of its chunk of STEPS steps ahead, waits
// for the state, runs through the chunk, hands the state to the next warp and computes y from the states it kept. The
// arithmetic is that of scan_forward, bit for bit.

static_assert(CHANNELS == 1, "");

struct alignas(16) Buffer {  // a chunk's inputs; y takes the place of x
    T x[STEPS * WIDTH], dt[STEPS * WIDTH];
#if GATE
    T z[STEPS * WIDTH];
#endif
    T BC[2 * STEPS * PADDED];
};
struct alignas(16) Warp {
    float B[STEPS * PADDED], C[STEPS * PADDED];
    float4 state[STATES / 4 * 32];  // handed to this warp
    Buffer buffer[2];
};

// Named barriers: warp w waits at barrier 1 + w for the warp before it.
__device__ __forceinline__ void hand_over(int to) { asm volatile("bar.arrive %0, 64;" ::"r"(1 + to) : "memory"); }
__device__ __forceinline__ void wait_for_state(int me) { asm volatile("bar.sync %0, 64;" ::"r"(1 + me) : "memory"); }

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

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) scan_forward(const Arguments arguments)
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
    const int lane = threadIdx.x % 32, me = threadIdx.x / 32;
    Warp& mine = reinterpret_cast<Warp*>(memory)[me];
    Warp& after = reinterpret_cast<Warp*>(memory)[(me + 1) % WARPS];
    const u32 tiles_per_row = (u32)(groups * warps_per_group);
    const i64 row = blockIdx.x / tiles_per_row;
    const u32 group = blockIdx.x % tiles_per_row / (u32)warps_per_group;
    const int begin = (blockIdx.x % tiles_per_row - group * (u32)warps_per_group) * WIDTH;
    const int columns = min(WIDTH, (int)width - begin);
    const i64 channel = group * width + begin, channels = groups * width;
    const int item = lane % LANES, my_column = lane / LANES, my_state = item * STATES;
    const bool exists = my_column < columns;
    const int at = item * WIDTH + my_column;  // the lane's own step of the first round

    float h[STATES], rate[STATES];
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
        const bool there = exists && my_state + j < N;
        const i64 place = (channel + my_column) * N + my_state + j;
        rate[j] = there ? A[place] * LOG2_E : 0.0f;
        h[j] = there && initial_state ? initial_state[row * channels * N + place] : 0.0f;
    }
    const float skip = exists && D ? D[channel + my_column] : 0.0f;
    const float bias = exists && dt_bias ? dt_bias[channel + my_column] : 0.0f;

    const i64 first = (i64)me * STEPS;
    Rows<WIDTH> x_rows(row * x_row + first * x_time + channel, x_time, columns, lane);
    Rows<WIDTH> dt_rows(row * dt_row + first * dt_time + channel, dt_time, columns, lane);
    Rows<WIDTH> z_rows(row * z_row + first * z_time + channel, z_time, columns, lane);
    Rows<WIDTH> y_rows((row * length + first) * channels + channel, channels, columns, lane);
    StateRows BC_rows(B + row * B_row + first * B_time + group * N, C + row * C_row + first * C_time + group * N,
                      B_time, C_time, lane);
    if (starts) starts += row * length;
    const int chunks = ((int)length + STEPS - 1) / STEPS;
    const int kept_states = ((int)length + CHECKPOINT - 1) / CHECKPOINT;
    if (KEEP) checkpoints += (row * kept_states * groups + group) * padded_width * PADDED + kept_place(begin + my_column, my_state);

    int loading = me;
    auto load = [&]() {
        if (loading < chunks) {
            Buffer& to = mine.buffer[loading / WARPS % 2];
            const int steps = (int)length - loading * STEPS;
            x_rows.load(to.x, x, steps, lane);
            dt_rows.load(to.dt, dt, steps, lane);
#if GATE
            z_rows.load(to.z, z, steps, lane);
#endif
            BC_rows.load(to.BC, steps, lane);
        }
        copy_commit();
        x_rows.move(STEPS * WARPS), dt_rows.move(STEPS * WARPS), z_rows.move(STEPS * WARPS);
        BC_rows.move(STEPS * WARPS, lane);
        loading += WARPS;
    };
    load();
    for (int k = me; k < chunks; k += WARPS) {
        copy_wait<0>();
        __syncwarp();
        Buffer& in = mine.buffer[k / WARPS % 2];
        widen(mine.B, in.BC, lane);
        __syncwarp();
        load();
        const int steps = min((int)length - k * STEPS, STEPS);
        u32 bits = 0;
        if (starts) bits = __ballot_sync(ALL, lane < steps && starts[k * STEPS + lane]);

        float a[STEPS][STATES], b[STEPS][STATES];
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            const float own_x = to_float(in.x[at + r * ROUND * WIDTH]);
            const bool inside = r * ROUND + item < steps;
            const float delta = inside ? step_size(to_float(in.dt[at + r * ROUND * WIDTH]) + bias) : 0.0f;
            const float drive = delta * own_x;
#pragma unroll
            for (int s = 0; s < ROUND; ++s) {
                const int t = r * ROUND + s;
                const float delta_t = __shfl_sync(ALL, delta, s, LANES), drive_t = __shfl_sync(ALL, drive, s, LANES);
                float B_t[STATES];
                load_states(B_t, mine.B + t * PADDED + my_state);
#pragma unroll
                for (int j = 0; j < STATES; ++j) {
                    a[t][j] = exp2_approximate(delta_t * rate[j]);
                    b[t][j] = drive_t * B_t[j];
                }
            }
        }
        if (k > 0) {
            wait_for_state(me);
#pragma unroll
            for (int j = 0; j < STATES; j += 4) {
                const float4 v = mine.state[j / 4 * 32 + lane];
                h[j] = v.x, h[j + 1] = v.y, h[j + 2] = v.z, h[j + 3] = v.w;
            }
        }
        float entering[STATES];
#pragma unroll
        for (int j = 0; j < STATES; ++j) entering[j] = h[j];
        if (bits == 0) {
#pragma unroll
            for (int t = 0; t < STEPS; ++t)
#pragma unroll
                for (int j = 0; j < STATES; ++j) h[j] = a[t][j] = fmaf(a[t][j], h[j], b[t][j]);
        } else {
#pragma unroll
            for (int t = 0; t < STEPS; ++t)
#pragma unroll
                for (int j = 0; j < STATES; ++j) h[j] = a[t][j] = fmaf(a[t][j], bits >> t & 1 ? 0.0f : h[j], b[t][j]);
        }
        if (k + 1 < chunks) {
#pragma unroll
            for (int j = 0; j < STATES; j += 4)
                after.state[j / 4 * 32 + lane] = make_float4(h[j], h[j + 1], h[j + 2], h[j + 3]);
            hand_over((me + 1) % WARPS);
        } else {
#pragma unroll
            for (int j = 0; j < STATES; ++j)
                if (exists && my_state + j < N) final_state[(row * channels + channel + my_column) * N + my_state + j] = h[j];
        }
        if (KEEP) {
#pragma unroll
            for (int t = 0; t < STEPS; t += CHECKPOINT)
                if (t < steps)
                    keep(checkpoints + (k * (i64)(STEPS / CHECKPOINT) + t / CHECKPOINT) * groups * padded_width * PADDED,
                         t == 0 ? entering : a[t - 1]);
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            float sum[ROUND][CHANNELS];
#pragma unroll
            for (int s = 0; s < ROUND; ++s) {
                float C_t[STATES];
                load_states(C_t, mine.C + (r * ROUND + s) * PADDED + my_state);
#pragma unroll
                for (int j = 0; j < STATES; ++j)
                    sum[s][0] = j == 0 ? a[r * ROUND + s][j] * C_t[j] : fmaf(a[r * ROUND + s][j], C_t[j], sum[s][0]);
            }
            float out = fmaf(skip, to_float(in.x[at + r * ROUND * WIDTH]), sum_over_states(sum, lane));
#if GATE
            const float own_z = to_float(in.z[at + r * ROUND * WIDTH]);
            out *= own_z * sigmoid(own_z);
#endif
            in.x[at + r * ROUND * WIDTH] = from_float(out);
        }
        __syncwarp();
        y_rows.store(y, in.x, steps, lane), y_rows.move(STEPS * WARPS);
    }
}
