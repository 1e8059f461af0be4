// The order of tokens by depth, and how many read each, which `arrange.cu` and `many.cu` need: a stable sort by counting, in one
// block and one launch.
//
// A thread has neighbouring tokens. It counts them by depth, a warp adds up the counts of one depth, and each token goes behind those
// of lower depths, of threads before, and of its own thread before it.

#include "device.h"

constexpr int THREADS = 256, DEPTHS = 8, LANES = 32, OWN = THREADS / LANES;

struct Params {
    const long long *depth;  // [tokens], from 1
    int *order;              // [tokens]
    int *counts;             // [depths]
    int tokens, depths;
};

extern "C" __global__ void __launch_bounds__(THREADS) order(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    // of each depth: tokens of each thread, then those before them; sums of the lanes of a warp; all
    int *before = (int *)memory, *sums = before + DEPTHS * THREADS, *all = sums + DEPTHS * LANES;
    const int thread = threadIdx.x, warp = thread / LANES, lane = thread % LANES, per = (p.tokens + THREADS - 1) / THREADS;
    const int first = thread * per, end = first + per < p.tokens ? first + per : p.tokens;
    let_next_begin();
    wait_for_last();
    for (int d = 0; d < DEPTHS; d++) before[d * THREADS + thread] = 0;
    for (int i = first; i < end; i++) before[(int)(load_fresh(p.depth + i) - 1) * THREADS + thread]++;
    __syncthreads();
    // warp d has depth d + 1
    int *own = before + warp * THREADS + lane * OWN, sum = 0;
    for (int i = 0; i < OWN; i++) sum += own[i];
    sums[warp * LANES + lane] = sum;
    warp_sync();
    int place = 0;
    for (int i = 0; i < lane; i++) place += sums[warp * LANES + i];
    if (lane == LANES - 1) all[warp] = place + sum;
    for (int i = 0; i < OWN; i++) {
        const int count = own[i];
        own[i] = place, place += count;
    }
    __syncthreads();
    if (thread < p.depths) p.counts[thread] = all[thread];
    for (int i = first; i < end; i++) {
        const int d = (int)load_fresh(p.depth + i) - 1;
        int lower = 0;
        for (int e = 0; e < d; e++) lower += all[e];
        p.order[lower + before[d * THREADS + thread]++] = i;
    }
}
