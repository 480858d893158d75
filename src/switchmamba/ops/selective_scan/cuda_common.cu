// What the forward and the backward kernel of the selective scan share; cuda.py describes the layout.
//
// Macros: T_KIND (0 float, 1 bf16, 2 fp16), N, LANES, CHANNELS, STATES, STEPS, SPREAD, SOFTPLUS, GATE, ALIGNED.
// A group of LANES lanes, side by side or (SPREAD) GROUPS apart, serves CHANNELS channels; each lane keeps STATES states of each of them: LANES * STATES >= N.
// Its registers hold channel i ^ (item % CHANNELS) at index i, so that sums over lanes need no selection.
// What is needed once per channel and step is computed by one lane: a round is ROUND steps, in which
// lane r of a group has channel r % CHANNELS of step r / CHANNELS.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int ROUND = LANES / CHANNELS;
constexpr int ROUNDS = STEPS / ROUND;
constexpr int PADDED = LANES * STATES;           // states, with those beyond N that are zero
constexpr int GROUPS = 32 / LANES;               // of lanes in a warp
constexpr int WIDTH = GROUPS * CHANNELS;         // channels of a warp
constexpr int ITEM_STRIDE = SPREAD ? GROUPS : 1;  // lanes from one item of a group to the next
constexpr u32 ALL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
static_assert(ROUND * CHANNELS == LANES && ROUNDS * ROUND == STEPS && PADDED >= N && STATES % 4 == 0, "");

#if T_KIND == 0
typedef float T;
__device__ __forceinline__ float to_float(T v) { return v; }
__device__ __forceinline__ T from_float(float v) { return v; }
#else
typedef u16 T;
#if T_KIND == 1
__device__ __forceinline__ float to_float(T v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ T from_float(float v) {
    T r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
#else
__device__ __forceinline__ float to_float(T v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}
__device__ __forceinline__ T from_float(float v) {
    T r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
#endif
#endif

__device__ __forceinline__ float exp2_approximate(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// log(1 + x) for x in [0, 1]; relative error 1e-7, for 16-bit inputs 6e-6.
__device__ __forceinline__ float log1p_polynomial(float x) {
#if T_KIND == 0
    float p = -3.176056998e-3f;
    p = fmaf(p, x, 1.954252717e-2f);
    p = fmaf(p, x, -5.637361265e-2f);
    p = fmaf(p, x, 1.054362378e-1f);
    p = fmaf(p, x, -1.526966706e-1f);
    p = fmaf(p, x, 1.966327425e-1f);
    p = fmaf(p, x, -2.495161626e-1f);
    p = fmaf(p, x, 3.332971050e-1f);
    p = fmaf(p, x, -4.999989265e-1f);
#else
    float p = 1.926751141e-02f;
    p = fmaf(p, x, -8.124619004e-02f);
    p = fmaf(p, x, 1.651675837e-01f);
    p = fmaf(p, x, -2.427976810e-01f);
    p = fmaf(p, x, 3.327522710e-01f);
    p = fmaf(p, x, -4.999920257e-01f);
#endif
    p = fmaf(p, x, 1.0f);
    return p * x;
}

__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Delta; softplus as torch's: above 20 the logarithm is below half a unit in the last place.
__device__ __forceinline__ float step_size(float raw) {
#if SOFTPLUS
    return max_nan(raw, 0.0f) + log1p_polynomial(exp2_approximate(-LOG2_E * fabsf(raw)));
#else
    return raw;
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_approximate(-LOG2_E * x)); }

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool exists) {
    const int size = exists ? BYTES : 0;  // fewer bytes than the copy's size: the rest is zeros
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(size), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

template <int BYTES> struct Bytes;
template <> struct Bytes<16> { typedef uint4 type; };
template <> struct Bytes<8> { typedef uint2 type; };
template <> struct Bytes<4> { typedef u32 type; };

// A lane's share of tiles of STEPS rows of COLUMNS elements, of which `columns` exist: vectors of up to 16 bytes.
template <int COLUMNS>
struct Rows {
    static constexpr int BYTES = COLUMNS * sizeof(T) < 16 ? COLUMNS * sizeof(T) : 16;
    static constexpr int ELEMENTS = BYTES / sizeof(T), PER_ROW = COLUMNS / ELEMENTS, VECTORS = STEPS * PER_ROW;
    static constexpr int PER_LANE = (VECTORS + 31) / 32, ROWS_APART = 32 / PER_ROW;
    typedef typename Bytes<BYTES>::type Vector;
    i64 time, offset;  // elements from row to row, and of this lane's first vector (ALIGNED) or of the tile
    int columns, step;  // step: of the first vector; a large number if it does not exist

    __device__ __forceinline__ Rows(i64 start, i64 time, int columns, int lane) : time(time), columns(columns) {
        const int column = lane % PER_ROW * ELEMENTS;
        step = column < columns && lane < VECTORS ? lane / PER_ROW : 1 << 30;
        offset = start + (ALIGNED ? lane / PER_ROW * time + column : 0);
    }
    __device__ __forceinline__ void move(int steps) { offset += steps * time; }
    // Zeros beyond `steps` and `columns`.
    __device__ __forceinline__ void load(T* tile, const T* from, int steps, int lane) const {
        if constexpr (ALIGNED && BYTES >= 4) {
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k)
                if (VECTORS % 32 == 0 || lane + 32 * k < VECTORS)
                    copy_async<BYTES>(shared_address(tile) + (lane + 32 * k) * BYTES,
                                      from + offset + k * ROWS_APART * time, step + k * ROWS_APART < steps);
        } else {
            for (int v = lane; v < STEPS * COLUMNS; v += 32) {
                const int s = v / COLUMNS, column = v % COLUMNS;
                tile[v] = s < steps && column < columns ? from[offset + s * time + column] : T(0);
            }
        }
    }
    __device__ __forceinline__ void store(T* to, const T* tile, int steps, int lane) const {
        if constexpr (ALIGNED && BYTES >= 4) {
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k)
                if (step + k * ROWS_APART < steps)
                    *reinterpret_cast<Vector*>(to + offset + k * ROWS_APART * time) =
                        reinterpret_cast<const Vector*>(tile)[lane + 32 * k];
        } else {
            for (int v = lane; v < STEPS * COLUMNS; v += 32) {
                const int s = v / COLUMNS, column = v % COLUMNS;
                if (s < steps && column < columns) to[offset + s * time + column] = tile[v];
            }
        }
    }
};

// B and C, tiles of STEPS rows of PADDED states one after the other.
struct StateRows {
    static constexpr int BYTES = 16, ELEMENTS = BYTES / sizeof(T), PER_ROW = PADDED / ELEMENTS, VECTORS = STEPS * PER_ROW;
    static constexpr int PER_LANE = (2 * VECTORS + 31) / 32;
    static constexpr bool ASYNC = ALIGNED && N == PADDED && (2 * VECTORS) % 32 == 0;
    const T* from[ASYNC ? PER_LANE : 2];
    i64 B_time, C_time;
    __device__ __forceinline__ StateRows(const T* B, const T* C, i64 B_time, i64 C_time, int lane) : B_time(B_time), C_time(C_time) {
        if constexpr (ASYNC) {
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k) {
                const int v = lane + 32 * k, u = v % VECTORS;
                from[k] = (v < VECTORS ? B + u / PER_ROW * B_time : C + u / PER_ROW * C_time) + u % PER_ROW * ELEMENTS;
            }
        } else {
            from[0] = B, from[1] = C;
        }
    }
    __device__ __forceinline__ void move(int steps, int lane) {
        if constexpr (ASYNC) {
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k) from[k] += steps * (lane + 32 * k < VECTORS ? B_time : C_time);
        } else {
            from[0] += steps * B_time, from[1] += steps * C_time;
        }
    }
    __device__ __forceinline__ void load(T* tiles, int steps, int lane) const {
        if constexpr (ASYNC) {
#pragma unroll
            for (int k = 0; k < PER_LANE; ++k) {
                const int v = lane + 32 * k;
                copy_async<BYTES>(shared_address(tiles) + v * BYTES, from[k], v % VECTORS / PER_ROW < steps);
            }
        } else {
            for (int v = lane; v < 2 * STEPS * PADDED; v += 32) {
                const int u = v % (STEPS * PADDED), s = u / PADDED, n = u % PADDED;
                const bool there = s < steps && n < N;
                tiles[v] = !there ? T(0) : v < STEPS * PADDED ? from[0][s * B_time + n] : from[1][s * C_time + n];
            }
        }
    }
};

__device__ __forceinline__ int item_of(int lane) { return lane / ITEM_STRIDE % LANES; }
__device__ __forceinline__ int group_of(int lane) { return SPREAD ? lane % GROUPS : lane / LANES; }

// Sum the values of a group's lanes. value[s][i] belongs to step s and the channel at index i; a lane receives the sum
// of its own channel and step.
__device__ __forceinline__ float sum_over_states(float (&value)[ROUND][CHANNELS], int lane) {
#pragma unroll
    for (int half = CHANNELS / 2; half > 0; half /= 2)
#pragma unroll
        for (int s = 0; s < ROUND; ++s)
#pragma unroll
            for (int i = 0; i < half; ++i) value[s][i] += __shfl_xor_sync(ALL, value[s][i + half], half * ITEM_STRIDE);
#pragma unroll
    for (int half = ROUND / 2; half > 0; half /= 2) {
        const bool upper = lane & (half * CHANNELS * ITEM_STRIDE);
#pragma unroll
        for (int s = 0; s < half; ++s) {
            const float mine = upper ? value[s + half][0] : value[s][0];
            const float other = upper ? value[s][0] : value[s + half][0];
            value[s][0] = mine + __shfl_xor_sync(ALL, other, half * CHANNELS * ITEM_STRIDE);
        }
    }
    return value[0][0];
}

// The value of the channel at index i and step s of the round, from the lane that has it.
__device__ __forceinline__ float from_item(float value, int i, int s, int lane) {
    if constexpr (ROUND == 1) return i == 0 ? value : __shfl_xor_sync(ALL, value, i * ITEM_STRIDE);
    const int owner = lane & ~((LANES - CHANNELS) * ITEM_STRIDE);
    return __shfl_sync(ALL, value, owner ^ ((i | s * CHANNELS) * ITEM_STRIDE));
}

// B or C of one step for this lane's states.
__device__ __forceinline__ void load_states(float (&value)[STATES], const float* from) {
#pragma unroll
    for (int j = 0; j < STATES; j += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + j);
        value[j] = v.x, value[j + 1] = v.y, value[j + 2] = v.z, value[j + 3] = v.w;
    }
}

// STATES numbers from n on of a channel's N, zeros beyond them or for a channel that is not there.
__device__ __forceinline__ void get_states(float (&value)[STATES], const float* channel, int n, bool there) {
#pragma unroll
    for (int j = 0; j < STATES; j += 4) {
        if constexpr (N % 4 == 0) {
            const bool inside = there && n + j < N;
            const float4 v = inside ? *reinterpret_cast<const float4*>(channel + n + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            value[j] = v.x, value[j + 1] = v.y, value[j + 2] = v.z, value[j + 3] = v.w;
        } else {
#pragma unroll
            for (int m = j; m < j + 4; ++m) value[m] = there && n + m < N ? channel[n + m] : 0.0f;
        }
    }
}
__device__ __forceinline__ void put_states(float* channel, const float (&value)[STATES], int n) {
#pragma unroll
    for (int j = 0; j < STATES; j += 4) {
        if constexpr (N % 4 == 0) {
            if (n + j < N)
                *reinterpret_cast<float4*>(channel + n + j) = make_float4(value[j], value[j + 1], value[j + 2], value[j + 3]);
        } else {
#pragma unroll
            for (int m = j; m < j + 4; ++m)
                if (n + m < N) channel[n + m] = value[m];
        }
    }
}

// Turn the tiles of B and C into fp32.
__device__ __forceinline__ void widen(float* to, const T* from, int lane) {
#pragma unroll
    for (int k = 0; k < (2 * STEPS * PADDED + 255) / 256; ++k) {
        const int v = 8 * (lane + 32 * k);
        if (2 * STEPS * PADDED % 256 == 0 || v < 2 * STEPS * PADDED) {
#if T_KIND == 0
            reinterpret_cast<uint4*>(to + v)[0] = reinterpret_cast<const uint4*>(from + v)[0];
            reinterpret_cast<uint4*>(to + v)[1] = reinterpret_cast<const uint4*>(from + v)[1];
#else
            const uint4 raw = *reinterpret_cast<const uint4*>(from + v);
            reinterpret_cast<float4*>(to + v)[0] = make_float4(
                to_float((T)raw.x), to_float((T)(raw.x >> 16)), to_float((T)raw.y), to_float((T)(raw.y >> 16)));
            reinterpret_cast<float4*>(to + v)[1] = make_float4(
                to_float((T)raw.z), to_float((T)(raw.z >> 16)), to_float((T)raw.w), to_float((T)(raw.w >> 16)));
#endif
        }
    }
}

// Where a state lies among a group's states of one time: the places of four channels are permuted so that the registers of
// a lane with four channels lie evenly.
__device__ __forceinline__ int state_place(int column, int n) {
    return ((column & ~3) + ((column ^ n / STATES) & 3)) * PADDED + n;
}

// States that the forward pass keeps for the backward pass: bf16 with bf16 inputs, where two channels of a lane lie together,
// else fp32. A lane writes or reads 16 bytes at once, a warp whole sectors.
#if T_KIND == 1
typedef u16 Kept;
__device__ __forceinline__ int kept_place(int column, int n) {
    const int item = n / STATES, i = (column ^ item) & 3;
    return (column & ~3) * PADDED + i / 2 * 2 * PADDED + (2 * item + i % 2) * STATES + n % STATES;
}
#else
typedef float Kept;
__device__ __forceinline__ int kept_place(int column, int n) { return state_place(column, n); }
#endif
constexpr int KEPT = CHANNELS * STATES;  // by a lane
constexpr int PIECE = 16 / sizeof(Kept) < KEPT ? 16 / sizeof(Kept) : KEPT;

// How far register r = STATES * i + j lies from the first.
__device__ __forceinline__ constexpr int kept_apart(int r) {
    return sizeof(Kept) == 2 ? r / STATES / 2 * 2 * PADDED + r % (2 * STATES) : r / STATES * PADDED + r % STATES;
}

__device__ __forceinline__ void keep(Kept* to, const float* h) {
#pragma unroll
    for (int r = 0; r < KEPT; r += PIECE) {
#if T_KIND == 1
        u32 pair[PIECE / 2];
#pragma unroll
        for (int k = 0; k < PIECE / 2; ++k)
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair[k]) : "f"(h[r + 2 * k + 1]), "f"(h[r + 2 * k]));
        if constexpr (PIECE == 8)
            *reinterpret_cast<uint4*>(to + kept_apart(r)) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        else
            *reinterpret_cast<uint2*>(to + kept_apart(r)) = make_uint2(pair[0], pair[1]);
#else
        *reinterpret_cast<float4*>(to + kept_apart(r)) = make_float4(h[r], h[r + 1], h[r + 2], h[r + 3]);
#endif
    }
}
