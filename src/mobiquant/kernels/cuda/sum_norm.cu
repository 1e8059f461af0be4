// The residual sum and the norm behind it: h += more, out = weight * h / rms(h), one block for each token.
//
// A thread takes eight columns at a time, all that it reads is on its way before it writes. Rounded where the modules of transformers
// round: the sum, the normalised value and the product with the weight.
//
// Set by the compiler's command line: BF16.

#include "device.h"

constexpr int WARPS = 16, THREADS = WARPS * 32, TURNS = 2;

struct Params {
    u16 *hidden;        // [tokens, columns], changed where there is more
    const u16 *more;    // [tokens, columns] or null
    const u16 *weight;  // [columns]
    u16 *out;           // [tokens, columns]
    int columns;        // a multiple of 8, at most 8 * THREADS * TURNS
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(THREADS) sum_norm(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    float *sums = (float *)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * p.columns;
    const Four none = {0, 0, 0, 0};
    Four hidden[TURNS], more[TURNS], weight[TURNS];
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int column = (threadIdx.x + t * THREADS) * 8;
        weight[t] = column < p.columns ? *(const Four *)(p.weight + column) : none;
    }
    wait_for_last();
    // not before: a block of the next launch has no room beside this one and one of the launch before, and would go where another is
    let_next_begin();
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int column = (threadIdx.x + t * THREADS) * 8;
        const bool there = column < p.columns;
        hidden[t] = there ? load_fresh((const Four *)(p.hidden + row + column)) : none;
        more[t] = there && p.more ? load_fresh((const Four *)(p.more + row + column)) : none;
    }
    float energy = 0;
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int column = (threadIdx.x + t * THREADS) * 8;
        if (p.more) {
            float sum[8], added[8];
            widen(sum, hidden[t]), widen(added, more[t]);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += added[i];
            hidden[t] = narrowed(sum);
            if (column < p.columns) *(Four *)(p.hidden + row + column) = hidden[t];
        }
        float x[8];
        widen(x, hidden[t]);
#pragma unroll
        for (int i = 0; i < 8; i++) energy = fmaf(x[i], x[i], energy);
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) energy += shuffle_xor(energy, by);
    if (lane == 0) sums[warp] = energy;
    __syncthreads();
    energy = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) energy += sums[w];
    const float inverse = 1.0f / sqrtf(energy / p.columns + p.epsilon);
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int column = (threadIdx.x + t * THREADS) * 8;
        float x[8], by[8];
        widen(x, hidden[t]), widen(by, weight[t]);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = wide(narrow(x[i] * inverse)) * by[i];
        if (column < p.columns) *(Four *)(p.out + row + column) = narrowed(x);
    }
}
