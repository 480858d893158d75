// One of the two products of a decoding step's experts, each expert's weights read once for all its tokens.
//
//     up    y[a] = act(w[e] x[a / TOP_K])                      e = index[a], for each assignment a
//     down  y[a] = residual[a] + scores[a] · w[e] x[a]
//
// What binds is memory, so it must never wait. One block runs on each multiprocessor and has an equal share of all
// pieces of work: ROWS rows of one expert's matrix, for up to TOKENS of its tokens. One warp does nothing but ask for the
// pieces' weights, in a ring of STAGES in shared memory, by bulk copies whose arrival an mbarrier counts; eight warps
// multiply. Each has 16 rows and a share of the columns; shares are added in a fixed order. A product of matrices m16n8k16
// sums over k in any order: in each 32 columns a lane holds eight that lie together, of weights and tokens alike, so that
// it reads 16 bytes at once; rows in shared memory lie 64 bytes more than their length apart, in other banks.
//
// Programmatic dependent launch: the product up waits for the router, then lets the product down start as its own blocks
// end. That one asks for its weights before it waits for what the product up has written; index is complete by then.
//
// Macros: T_KIND (1 bf16, 2 fp16), COLUMNS, OUTPUTS (rows of y), EXPERTS, TOP_K, KIND (0 down; 1 ReLU, 2 GELU, 3 SiLU,
// 4 SwiGLU), ROWS (a multiple of 16), TOKENS (a multiple of 8), STAGES, LIST (the most assignments).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int GATES = KIND == 4 ? 2 : 1;          // SwiGLU's matrix holds the gate's rows, then the others
constexpr int WARPS = 8;                          // that multiply
constexpr int THREADS = WARPS * 32;
constexpr int STRIPS = ROWS / 16 * GATES;
constexpr int SHARES = WARPS / STRIPS;            // of the columns
constexpr int SHARE = COLUMNS / SHARES;
constexpr int TILES = TOKENS / 8;
constexpr int STRIDE = COLUMNS + 32;              // of a row in shared memory
constexpr int STAGE = ROWS * GATES * STRIDE;
constexpr int PART = 20;                          // floats from a token's 16 sums to the next's: other banks
constexpr int ITEMS = (TOKENS * (ROWS / 4) + THREADS - 1) / THREADS;   // of four outputs, for each thread
constexpr int PIECES = OUTPUTS / ROWS;            // of an expert's matrix
static_assert(WARPS % STRIPS == 0 && COLUMNS % SHARES == 0 && SHARE % 32 == 0 && OUTPUTS % ROWS == 0, "");
static_assert(ROWS % 16 == 0 && TOKENS % 8 == 0 && ROWS * GATES <= 64 && COLUMNS % 64 == 0, "");

struct Arguments {
    const u16* x;
    const int* index;
    const float* scores;
    const u16* w;
    const u16* residual;
    u16* y;
    i64 count;   // of assignments
};

struct Shared {                                   // beside the dynamic part: ring, tokens, sums
    u64 full[STAGES], empty[STAGES];
    int sizes[EXPERTS];
    int totals[WARPS];
    float scores[TOKENS];
    u16 index[LIST], list[LIST];
};

__device__ __forceinline__ float to_float(u16 v) {
#if T_KIND == 1
    return __uint_as_float((u32)v << 16);
#else
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
#endif
}

__device__ __forceinline__ u16 from_float(float v) {
    u16 r;
#if T_KIND == 1
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
    return r;
}

__device__ __forceinline__ void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if T_KIND == 1
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float activate(float v) {
    if (KIND == 1) return fmaxf(v, 0.0f);
    if (KIND == 2) return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
    return v / (1.0f + __expf(-v));
}

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" :: "r"(address(barrier)), "r"(phase) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }

__device__ __forceinline__ int passes(int size) { return (size + TOKENS - 1) / TOKENS; }

// A piece of work: an expert, which of its tokens, which rows of its matrix. Rows run fastest, so that a block keeps its
// tokens; then passes over an expert's tokens, then experts.
struct Piece {
    int expert, pass, rows;
};

__device__ __forceinline__ void step(const int* sizes, Piece& piece) {
    if (++piece.rows < PIECES) return;
    piece.rows = 0;
    if (++piece.pass < passes(sizes[piece.expert])) return;
    piece.pass = 0;
    do ++piece.expert;
    while (piece.expert < EXPERTS && sizes[piece.expert] == 0);
}

static_assert((STAGES * STAGE + TOKENS * STRIDE) * 2 + WARPS * TOKENS * PART * 4 <= SHARED, "");  // what a launch reserves

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) experts(const Arguments args) {
    extern __shared__ __align__(128) u16 dynamic[];
    __shared__ __align__(16) Shared shared;
    u16* const ring = dynamic;
    u16* const tokens = ring + STAGES * STAGE;
    float* const parts = reinterpret_cast<float*>(tokens + TOKENS * STRIDE);   // (WARPS, TOKENS, PART)

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int count = (int)args.count;

    for (int e = thread; e < EXPERTS; e += THREADS + 32) shared.sizes[e] = 0;
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(address(&shared.full[s])) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address(&shared.empty[s])), "n"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (KIND != 0) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    }
    for (int a = thread; a < count; a += THREADS + 32) {
        const int e = args.index[a];
        shared.index[a] = (u16)e;
        atomicAdd(&shared.sizes[e], 1);
    }
    __syncthreads();
    int upto[(EXPERTS + 31) / 32], total = 0;   // passes of a lane's expert and all before it
#pragma unroll
    for (int c = 0; c < (EXPERTS + 31) / 32; ++c) {
        int sum = c * 32 + lane < EXPERTS ? passes(shared.sizes[c * 32 + lane]) : 0;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int v = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += v;
        }
        upto[c] = total + sum;
        total = __shfl_sync(0xffffffffu, upto[c], 31);
    }
    const int begin = (int)((i64)total * PIECES * blockIdx.x / gridDim.x);
    const int end = (int)((i64)total * PIECES * (blockIdx.x + 1) / gridDim.x);
    if (begin == end) return;
    Piece piece = {-1, 0, begin % PIECES};
#pragma unroll
    for (int c = 0; c < (EXPERTS + 31) / 32; ++c) {
        const u32 later = __ballot_sync(0xffffffffu, upto[c] > begin / PIECES);
        if (later && piece.expert < 0) {
            piece.expert = c * 32 + __ffs(later) - 1;
            piece.pass = begin / PIECES - (__shfl_sync(0xffffffffu, upto[c], __ffs(later) - 1) - passes(shared.sizes[piece.expert]));
        }
    }

    if (warp == WARPS) {   // asks for weights
        for (int n = begin; n < end; ++n) {
            const int stage = (n - begin) % STAGES, round = (n - begin) / STAGES;
            if (round > 0) wait(&shared.empty[stage], (round - 1) & 1);
            u64* const full = &shared.full[stage];
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                             :: "r"(address(full)), "n"(ROWS * GATES * COLUMNS * 2) : "memory");
            __syncwarp();
            for (int row = lane; row < ROWS * GATES; row += 32) {
                const i64 from = ((i64)piece.expert * GATES + row / ROWS) * OUTPUTS + piece.rows * ROWS + row % ROWS;
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                    :: "r"(address(ring + stage * STAGE + row * STRIDE)), "l"(args.w + from * COLUMNS),
                       "n"(COLUMNS * 2), "r"(address(full)) : "memory");
            }
            step(shared.sizes, piece);
        }
        return;
    }

    const int group = lane / 4, quad = lane % 4, strip = warp % STRIPS, share = warp / STRIPS;
    int expert = -1, pass = -1, number = 0;
    if (KIND == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int n = begin; n < end; ++n, step(shared.sizes, piece)) {
        if (piece.expert != expert || piece.pass != pass) {   // other tokens
            together();
            if (piece.expert != expert) {   // list its assignments in order: each thread looks through some that lie together
                const int each = (count + THREADS - 1) / THREADS, first = thread * each;
                int own = 0;
                for (int a = first; a < first + each && a < count; ++a) own += shared.index[a] == piece.expert;
                int before = own;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    const int v = __shfl_up_sync(0xffffffffu, before, d);
                    if (lane >= d) before += v;
                }
                if (lane == 31) shared.totals[warp] = before;
                before -= own;
                together();
                for (int w = 0; w < warp; ++w) before += shared.totals[w];
                for (int a = first; a < first + each && a < count; ++a)
                    if (shared.index[a] == piece.expert) shared.list[before++] = (u16)a;
                together();
            }
            expert = piece.expert;
            pass = piece.pass;
            number = min(TOKENS, shared.sizes[expert] - pass * TOKENS);
            for (int item = thread; item < TOKENS * (COLUMNS / 8); item += THREADS) {
                const int token = item / (COLUMNS / 8), column = item % (COLUMNS / 8) * 8;
                const int a = token < number ? shared.list[pass * TOKENS + token] : 0;
                const u16* const from = args.x + (i64)(KIND == 0 ? a : a / TOP_K) * COLUMNS + column;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                             :: "r"(address(tokens + token * STRIDE + column)), "l"(from), "r"(token < number ? 16 : 0) : "memory");
            }
            if (KIND == 0 && thread < number) shared.scores[thread] = args.scores[shared.list[pass * TOKENS + thread]];
            asm volatile("cp.async.commit_group;" ::: "memory");
            asm volatile("cp.async.wait_group 0;" ::: "memory");
            together();
        }

        uint2 residual[ITEMS];   // asked for early
        if (KIND == 0) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const int item = i * THREADS + thread, token = item / (ROWS / 4), row = item % (ROWS / 4) * 4;
                residual[i] = make_uint2(0, 0);
                if (args.residual && token < number)
                    residual[i] = *reinterpret_cast<const uint2*>(
                        args.residual + (i64)shared.list[pass * TOKENS + token] * OUTPUTS + piece.rows * ROWS + row);
            }
        }
        const int stage = (n - begin) % STAGES;
        wait(&shared.full[stage], ((n - begin) / STAGES) & 1);
        const u16* const w = ring + stage * STAGE + (strip * 16 + group) * STRIDE + share * SHARE + quad * 8;
        const u16* const x = tokens + group * STRIDE + share * SHARE + quad * 8;
        float sums[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < SHARE; k += 32) {
            const uint4 low = *reinterpret_cast<const uint4*>(w + k);
            const uint4 high = *reinterpret_cast<const uint4*>(w + 8 * STRIDE + k);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint4 v = *reinterpret_cast<const uint4*>(x + t * 8 * STRIDE + k);
                multiply(sums[t], low.x, high.x, low.y, high.y, v.x, v.y);
                multiply(sums[t], low.z, high.z, low.w, high.w, v.z, v.w);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(&shared.empty[stage]);

#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                parts[(warp * TOKENS + t * 8 + quad * 2 + i % 2) * PART + i / 2 * 8 + group] = sums[t][i];
        together();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int item = i * THREADS + thread, token = item / (ROWS / 4), row = item % (ROWS / 4) * 4;
            if (token >= number) break;
            float v[GATES][4];
#pragma unroll
            for (int g = 0; g < GATES; ++g) {
                const float* from = parts + ((g * (ROWS / 16) + row / 16) * TOKENS + token) * PART + row % 16;
                float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
                for (int s = 1; s < SHARES; ++s) {
                    const float4 part = *reinterpret_cast<const float4*>(from + s * STRIPS * TOKENS * PART);
                    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
                }
                v[g][0] = sum.x, v[g][1] = sum.y, v[g][2] = sum.z, v[g][3] = sum.w;
            }
            const int a = shared.list[pass * TOKENS + token];
            const i64 place = (i64)a * OUTPUTS + piece.rows * ROWS + row;
            u16 result[4];
            if (KIND == 0) {
                const float score = shared.scores[token];
                const u32 words[2] = {residual[i].x, residual[i].y};
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    result[j] = from_float(v[0][j] * score + to_float((u16)(words[j / 2] >> (j % 2 * 16))));
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float act = activate(v[0][j]);
                    if (KIND == 4) act *= v[GATES - 1][j];
                    result[j] = from_float(act);
                }
            }
            *reinterpret_cast<uint2*>(args.y + place) =
                make_uint2(result[0] | (u32)result[1] << 16, result[2] | (u32)result[3] << 16);
        }
        together();
    }
}
