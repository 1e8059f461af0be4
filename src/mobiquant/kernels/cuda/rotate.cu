// Queries and keys of one new token of each sequence get their position; keys and values go into the cache.
//
// A warp takes one head: first the norm of the head where the family has one (Qwen3), then x cos + (-upper, lower) sin over the
// halves of the head. Cosines and sines are those that transformers rounds to the dtype of the model.
//
// Set by the compiler's command line: BF16, HEAD (elements of a head, a multiple of 64).

#include "device.h"

constexpr int WARPS = 4, PER_LANE = HEAD / 64;

struct Params {
    u16 *query;        // [sequences, heads * HEAD], changed
    const u16 *key, *value;  // [sequences, key heads * HEAD]
    u16 *keys, *values;      // [sequences, key heads, positions, HEAD]
    const float *cosine, *sine;  // [positions, HEAD / 2]
    const u16 *query_norm, *key_norm;  // [HEAD] or null
    const int *position;     // [sequences]
    int sequences, heads, key_heads, positions;
    float epsilon;
};

// elements lane, lane + 32, .. of the lower half and those of the upper half
struct Halves {
    float low[PER_LANE], high[PER_LANE];
};

DEVICE void normalise(Halves &x, const u16 *weight, float epsilon, int lane) {
    float energy = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) energy += x.low[i] * x.low[i] + x.high[i] * x.high[i];
#pragma unroll
    for (int by = 1; by < 32; by *= 2) energy += shuffle_xor(energy, by);
    const float inverse = 1.0f / sqrtf(energy / HEAD + epsilon);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int at = lane + 32 * i;
        x.low[i] = wide(narrow(wide(narrow(x.low[i] * inverse)) * wide(weight[at])));
        x.high[i] = wide(narrow(wide(narrow(x.high[i] * inverse)) * wide(weight[at + HEAD / 2])));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) rotate(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    const int lane = threadIdx.x % 32, every = p.heads + 2 * p.key_heads;
    const int unit = blockIdx.x * WARPS + threadIdx.x / 32, head = unit % every, sequence = unit / every;
    if (sequence >= p.sequences) return;
    const int position = p.position[sequence];
    const bool is_query = head < p.heads, is_value = head >= p.heads + p.key_heads;
    const int own = is_query ? head : (head - p.heads) % p.key_heads;
    const u16 *from = (is_query ? p.query : is_value ? p.value : p.key) + ((u64)sequence * (is_query ? p.heads : p.key_heads) + own) * HEAD;
    u16 *to = is_query ? p.query + ((u64)sequence * p.heads + own) * HEAD
                       : (is_value ? p.values : p.keys) + (((u64)sequence * p.key_heads + own) * p.positions + position) * HEAD;
    Halves x;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x.low[i] = wide(from[lane + 32 * i]), x.high[i] = wide(from[lane + 32 * i + HEAD / 2]);
    if (is_query && p.query_norm) normalise(x, p.query_norm, p.epsilon, lane);
    if (!is_query && !is_value && p.key_norm) normalise(x, p.key_norm, p.epsilon, lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int at = lane + 32 * i;
        float low = x.low[i], high = x.high[i];
        if (!is_value) {
            const float c = wide(narrow(p.cosine[position * (HEAD / 2) + at])), s = wide(narrow(p.sine[position * (HEAD / 2) + at]));
            const float turned = wide(narrow(low * c)) - wide(narrow(high * s));
            high = wide(narrow(high * c)) + wide(narrow(low * s));
            low = turned;
        }
        to[at] = narrow(low), to[at + HEAD / 2] = narrow(high);
    }
}
