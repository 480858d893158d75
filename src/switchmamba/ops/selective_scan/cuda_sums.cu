// The last sums of the backward pass, each in a fixed order: dB and dC over the blocks of channels, and over rows and
// segments what belongs to a channel. The first `slab_blocks` blocks of 256 threads take dB and dC.

struct Arguments {
    const float *slabs, *dA_parts, *dD_parts, *bias_parts;
    T *dB, *dC;
    float *dA, *dD, *dbias;
    i64 slab_blocks, blocks, values, parts, channels;
};

extern "C" __global__ void __launch_bounds__(256) scan_sums(const Arguments arguments)
{
    const float *__restrict__ slabs = arguments.slabs, *__restrict__ dA_parts = arguments.dA_parts,
        *__restrict__ dD_parts = arguments.dD_parts, *__restrict__ bias_parts = arguments.bias_parts;
    T *__restrict__ dB = arguments.dB, *__restrict__ dC = arguments.dC;
    float *__restrict__ dA = arguments.dA, *__restrict__ dD = arguments.dD, *__restrict__ dbias = arguments.dbias;
    const i64 slab_blocks = arguments.slab_blocks, blocks = arguments.blocks, values = arguments.values,
        parts = arguments.parts, channels = arguments.channels;
    if (blockIdx.x < slab_blocks) {
        const i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * 4;
        if (at >= values) return;
        float4 sum = *reinterpret_cast<const float4*>(slabs + at);
        for (int k = 1; k < (int)blocks; ++k) {
            const float4 v = *reinterpret_cast<const float4*>(slabs + k * values + at);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const int n = at % PADDED;
        T* to = (at % (2 * PADDED) < PADDED ? dB : dC) + at / (2 * PADDED) * N;
        const float each[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (n + j < N) to[n + j] = from_float(each[j]);
        return;
    }
    i64 at = (i64)(blockIdx.x - slab_blocks) * 256 + threadIdx.x;
    const float* from = dA_parts;
    float* to = dA;
    i64 size = channels * N;
    if (at >= size) at -= size, size = channels, from = dD_parts, to = dD;
    if (from == dD_parts && at >= size) at -= size, from = bias_parts, to = dbias;
    if (at >= size) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < (int)parts; ++k) sum += from[k * size + at];
    to[at] = sum;
}
