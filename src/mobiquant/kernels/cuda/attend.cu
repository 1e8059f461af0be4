// Attention of one new token of each sequence over the cache, the queries that share keys together.
//
// A block takes CHUNK positions of one key head: a thread scores one position for all queries, then one element of the values for
// all positions. The block that is last to arrive for its head joins the chunks, in their order.
//
// Set by the compiler's command line: BF16, HEAD (elements of a head, at most 256), SHARE (queries that share keys).

#include "device.h"

constexpr int CHUNK = 64, THREADS = HEAD < 64 ? 64 : HEAD;

struct Params {
    const u16 *query;         // [sequences, heads * HEAD]
    const u16 *keys, *values;  // [sequences, key heads, positions, HEAD]
    u16 *out;                 // [sequences, heads * HEAD]
    const int *position;      // [sequences]: of the new token, which is in the cache already
    float *partial;           // [sequences, key heads, chunks, SHARE, HEAD + 2]
    u32 *arrived;             // [sequences, key heads], zero between launches
    int key_heads, positions, chunks;
    float scale;
};

// largest score, sum of weights and weighted values of one chunk for each query, into `partial`
DEVICE void take_chunk(const Params &p, u64 group, int chunk, int there, float *query, float *weights, float *partial) {
    for (int i = threadIdx.x; i < SHARE * HEAD; i += THREADS) query[i] = wide(p.query[group * SHARE * HEAD + i]) * p.scale;
    __syncthreads();
    if (threadIdx.x < CHUNK) {
        float sums[SHARE] = {};
        if (threadIdx.x < there) {
            const Four *key = (const Four *)(p.keys + (group * p.positions + chunk * CHUNK + threadIdx.x) * HEAD);
            for (int i = 0; i < HEAD / 8; i++) {
                const Four four = key[i];
                const u32 twos[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float v = wide((u16)(twos[k / 2] >> (16 * (k % 2))));
#pragma unroll
                    for (int s = 0; s < SHARE; s++) sums[s] = fmaf(v, query[s * HEAD + i * 8 + k], sums[s]);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < SHARE; s++) weights[s * CHUNK + threadIdx.x] = sums[s];
    }
    __syncthreads();
    float most[SHARE], total[SHARE] = {}, sums[SHARE] = {};
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
        most[s] = weights[s * CHUNK];
        for (int i = 1; i < there; i++) most[s] = fmaxf(most[s], weights[s * CHUNK + i]);
    }
    const bool owns = threadIdx.x < HEAD;
    for (int i = 0; i < there; i++) {
        const float v = owns ? wide(p.values[(group * p.positions + chunk * CHUNK + i) * HEAD + threadIdx.x]) : 0;
#pragma unroll
        for (int s = 0; s < SHARE; s++) {
            const float weight = expf(weights[s * CHUNK + i] - most[s]);
            total[s] += weight;
            sums[s] = fmaf(weight, v, sums[s]);
        }
    }
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
        float *to = partial + ((group * p.chunks + chunk) * SHARE + s) * (HEAD + 2);
        if (owns) to[threadIdx.x] = sums[s];
        if (threadIdx.x == 0) to[HEAD] = most[s], to[HEAD + 1] = total[s];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    SHARED_BYTES(memory);
    SHARED_INT(said);
    float *query = (float *)memory, *weights = query + SHARE * HEAD;
    const int chunk = blockIdx.x % p.chunks;
    const u64 group = blockIdx.x / p.chunks;
    const int seen = p.position[group / p.key_heads] + 1, used = (seen + CHUNK - 1) / CHUNK;
    if (chunk >= used) return;
    const int left = seen - chunk * CHUNK;
    take_chunk(p, group, chunk, left < CHUNK ? left : CHUNK, query, weights, p.partial);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) said = atomicAdd(p.arrived + group, 1u);
    __syncthreads();
    if (said != used - 1) return;
    __threadfence();
    if (threadIdx.x == 0) p.arrived[group] = 0;
    if (threadIdx.x >= HEAD) return;
    for (int s = 0; s < SHARE; s++) {
        const float *from = p.partial + (group * p.chunks * SHARE + s) * (HEAD + 2);
        const int next = SHARE * (HEAD + 2);
        float most = load_fresh(from + HEAD), total = 0, sum = 0;
        for (int c = 1; c < used; c++) most = fmaxf(most, load_fresh(from + c * next + HEAD));
        for (int c = 0; c < used; c++) {
            const float weight = expf(load_fresh(from + c * next + HEAD) - most);
            total = fmaf(weight, load_fresh(from + c * next + HEAD + 1), total);
            sum = fmaf(weight, load_fresh(from + c * next + threadIdx.x), sum);
        }
        p.out[(group * SHARE + s) * HEAD + threadIdx.x] = narrow(sum / total);
    }
}
