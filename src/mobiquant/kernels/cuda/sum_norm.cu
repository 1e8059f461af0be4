// The residual sum and the norm behind it: h += more, out = weight * h / rms(h), one block for each token.
//
// Rounded where the modules of transformers round: the sum, the normalised value and the product with the weight.
//
// Set by the compiler's command line: BF16.

#include "device.h"

constexpr int WARPS = 16, THREADS = WARPS * 32, MOST = 16;

struct Params {
    u16 *hidden;        // [tokens, columns], changed where there is more
    const u16 *more;    // [tokens, columns] or null
    const u16 *weight;  // [columns]
    u16 *out;           // [tokens, columns]
    int columns;        // at most THREADS * MOST
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(THREADS) sum_norm(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    SHARED_BYTES(memory);
    float *sums = (float *)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 row = (u64)blockIdx.x * p.columns;
    float held[MOST], energy = 0;
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int column = threadIdx.x + i * THREADS;
        held[i] = 0;
        if (column >= p.columns) continue;
        u16 stored = p.hidden[row + column];
        if (p.more) {
            stored = narrow(wide(stored) + wide(p.more[row + column]));
            p.hidden[row + column] = stored;
        }
        held[i] = wide(stored);
        energy = fmaf(held[i], held[i], energy);
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
    for (int i = 0; i < MOST; i++) {
        const int column = threadIdx.x + i * THREADS;
        if (column < p.columns) p.out[row + column] = narrow(wide(narrow(held[i] * inverse)) * wide(p.weight[column]));
    }
}
