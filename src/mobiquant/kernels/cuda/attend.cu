// Attention of one new token of each sequence over the cache, which takes up its key and value first; the queries that share keys
// together.
//
// A block takes CHUNK positions of one key head. What is in the cache is fetched while the launch before still runs, which writes
// neither that nor the position of the token. Then each warp gives a query its position: first the norm of the head where the family has one (Qwen3), then x cos + (-upper, lower) sin over the halves of the head. LANES
// lanes hold a row of the cache, eight elements each, and score it for all queries; the same lanes weigh the rows of the values. The
// block that is last to arrive for its head joins the chunks, in their order.
//
// Cosines and sines are those that transformers rounds to the dtype of the model, and values are rounded where its modules do.
//
// Set by the compiler's command line: BF16, HEAD (elements of a head, a multiple of 64 up to 256), SHARE (queries that share keys).

#include "device.h"

constexpr int CHUNK = 64, WARPS = 4, THREADS = WARPS * 32, PER_LANE = HEAD / 64;
// lanes of a row (a power of two: a head of 192 leaves some without work), rows of the block at a time, and turns
constexpr int LANES = HEAD <= 64 ? 8 : HEAD <= 128 ? 16 : 32, ROWS = THREADS / LANES, TURNS = CHUNK / ROWS;
// queries that are scored side by side: long heads have no registers for more
constexpr int TOGETHER = HEAD > 128 ? 1 : 4;

struct Params {
    const u16 *query;        // [sequences, heads * HEAD]
    const u16 *key, *value;  // [sequences, key heads * HEAD]
    u16 *keys, *values;      // [sequences, key heads, positions, HEAD]
    u16 *out;                // [sequences, heads * HEAD]
    const float *cosine, *sine;        // [positions, HEAD / 2]
    const u16 *query_norm, *key_norm;  // [HEAD] or null
    const int *position;               // [sequences]: of the new token
    float *partial;  // [sequences, key heads, chunks, SHARE * HEAD sums, then SHARE pairs of largest score and sum of weights]
    u32 *arrived;    // [sequences, key heads], zero between launches
    int key_heads, positions, chunks;
    float scale, epsilon;
};

struct Shared {
    float *query;    // [SHARE, HEAD], scaled
    float *weights;  // [SHARE, CHUNK]
    float *sums;     // [WARPS, SHARE, HEAD]
    u16 *fresh;      // [2, HEAD]: key and value of the new token
};

DEVICE Shared carve(u8 *memory) {
    float *at = (float *)memory;
    return {at, at + SHARE * HEAD, at + SHARE * (HEAD + CHUNK), (u16 *)(at + SHARE * (HEAD + CHUNK + WARPS * HEAD))};
}

// ---- a head gets its position

// elements lane, lane + 32, .. of the lower half of a head and those of the upper half
struct Halves {
    float low[PER_LANE], high[PER_LANE];
};

DEVICE Halves halves_of(const u16 *from, int lane) {
    Halves x;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) x.low[i] = wide(from[lane + 32 * i]), x.high[i] = wide(from[lane + 32 * i + HEAD / 2]);
    return x;
}

DEVICE void normalise(Halves &x, const u16 *weight, float epsilon, int lane) {
    float energy = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) energy += x.low[i] * x.low[i] + x.high[i] * x.high[i];
#pragma unroll
    for (int by = 1; by < 32; by *= 2) energy += shuffle_xor(energy, by);
    const float inverse = 1.0f / sqrtf(energy / HEAD + epsilon);
    const Halves by = halves_of(weight, lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        x.low[i] = wide(narrow(wide(narrow(x.low[i] * inverse)) * by.low[i]));
        x.high[i] = wide(narrow(wide(narrow(x.high[i] * inverse)) * by.high[i]));
    }
}

// cosines in the lower halves, sines in the upper
DEVICE Halves angles_of(const Params &p, int position, int lane) {
    Halves turn;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        turn.low[i] = wide(narrow(p.cosine[position * (HEAD / 2) + lane + 32 * i]));
        turn.high[i] = wide(narrow(p.sine[position * (HEAD / 2) + lane + 32 * i]));
    }
    return turn;
}

DEVICE void rotate(Halves &x, const Halves &turn) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const float low = x.low[i], high = x.high[i], c = turn.low[i], s = turn.high[i];
        x.low[i] = wide(narrow(wide(narrow(low * c)) - wide(narrow(high * s))));
        x.high[i] = wide(narrow(wide(narrow(high * c)) + wide(narrow(low * s))));
    }
}

// queries of a key head to shared memory; where the new token is in this chunk, its key and value there and to the cache
DEVICE void take_new(const Params &p, const Shared &s, const Halves &turn, u64 group, int position, bool here) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // two units more for key and value
    for (int unit = warp; unit < SHARE + (here ? 2 : 0); unit += WARPS) {
        const bool is_query = unit < SHARE, is_key = unit == SHARE;
        Halves x = halves_of(is_query ? p.query + (group * SHARE + unit) * HEAD : (is_key ? p.key : p.value) + group * HEAD, lane);
        const u16 *norm = is_query ? p.query_norm : is_key ? p.key_norm : nullptr;
        if (norm) normalise(x, norm, p.epsilon, lane);
        if (is_query || is_key) rotate(x, turn);
        u16 *fresh = s.fresh + (is_key ? 0 : HEAD), *kept = (is_key ? p.keys : p.values) + (group * p.positions + position) * HEAD;
#pragma unroll
        for (int i = 0; i < 2 * PER_LANE; i++) {
            const int at = lane + 32 * (i % PER_LANE) + i / PER_LANE * (HEAD / 2);
            const float v = i < PER_LANE ? x.low[i % PER_LANE] : x.high[i % PER_LANE];
            if (is_query) s.query[unit * HEAD + at] = v * p.scale;
            else fresh[at] = kept[at] = narrow(v);
        }
    }
}

// ---- a chunk

// eight elements of a row of the cache, each turn another row; nothing of rows from `end` on
DEVICE void fetch(Four (&rows)[TURNS], const u16 *cache, int end) {
    const int row = threadIdx.x / LANES, at = threadIdx.x % LANES * 8;
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        rows[i] = at < HEAD && row + i * ROWS < end ? *(const Four *)(cache + (u64)(row + i * ROWS) * HEAD + at) : Four{0, 0, 0, 0};
}

// the row of the new token
DEVICE void put_new(Four (&rows)[TURNS], const u16 *fresh, int place) {
    const int row = threadIdx.x / LANES, at = threadIdx.x % LANES * 8;
#pragma unroll
    for (int i = 0; i < TURNS; i++)
        if (at < HEAD && row + i * ROWS == place) rows[i] = *(const Four *)(fresh + at);
}

// scores of the rows below `there` by all queries, minus infinity for the others
DEVICE void score(const Shared &s, const Four (&keys)[TURNS], int there) {
    const int row = threadIdx.x / LANES, at = threadIdx.x % LANES * 8;
#pragma unroll TOGETHER
    for (int q = 0; q < SHARE; q++) {
        float query[8];
#pragma unroll
        for (int i = 0; i < 8; i++) query[i] = at < HEAD ? s.query[q * HEAD + at + i] : 0;
#pragma unroll
        for (int t = 0; t < TURNS; t++) {
            float key[8], sum = 0;
            widen(key, keys[t]);
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(query[i], key[i], sum);
#pragma unroll
            for (int by = 1; by < LANES; by *= 2) sum += shuffle_xor(sum, by);
            if (at == 0) s.weights[q * CHUNK + row + t * ROWS] = row + t * ROWS < there ? sum : __uint_as_float(0xff800000u);
        }
    }
}

// scores become weights, a warp takes a query; its largest score and the sum of its weights go to `pairs`
DEVICE void weigh(const Shared &s, float *pairs) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int q = warp; q < SHARE; q += WARPS) {
        float *own = s.weights + q * CHUNK + lane, most = fmaxf(own[0], own[32]);
#pragma unroll
        for (int by = 1; by < 32; by *= 2) most = fmaxf(most, shuffle_xor(most, by));
        const float low = expf(own[0] - most), high = expf(own[32] - most);
        own[0] = low, own[32] = high;
        float total = low + high;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) total += shuffle_xor(total, by);
        if (lane == 0) pairs[2 * q] = most, pairs[2 * q + 1] = total;
    }
}

// weighted rows, summed over the lanes of a warp that hold the same elements, then over warps
DEVICE void add_values(const Shared &s, const Four (&values)[TURNS], float *to) {
    const int row = threadIdx.x / LANES, at = threadIdx.x % LANES * 8, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int q = 0; q < SHARE; q++) {
        float sums[8] = {};
#pragma unroll
        for (int t = 0; t < TURNS; t++) {
            float value[8];
            widen(value, values[t]);
            const float weight = s.weights[q * CHUNK + row + t * ROWS];
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i] = fmaf(weight, value[i], sums[i]);
        }
#pragma unroll
        for (int by = LANES; by < 32; by *= 2)
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i] += shuffle_xor(sums[i], by);
        if (threadIdx.x % 32 < LANES && at < HEAD)
#pragma unroll
            for (int i = 0; i < 8; i++) s.sums[(warp * SHARE + q) * HEAD + at + i] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SHARE * HEAD; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += s.sums[w * SHARE * HEAD + i];
        to[i] = sum;
    }
}

// ---- all chunks

// the chunks of a head in their order, each sum brought to the largest score so far
DEVICE void join(const Params &p, u64 group, int used) {
    constexpr int next = SHARE * (HEAD + 2);
    const float *from = p.partial + group * p.chunks * next;
    for (int i = threadIdx.x; i < SHARE * HEAD; i += THREADS) {
        const float *pair = from + SHARE * HEAD + 2 * (i / HEAD);
        float most = __uint_as_float(0xff800000u), total = 0, sum = 0;
#pragma unroll 8
        for (int c = 0; c < used; c++) {
            const float high = load_fresh(pair + (u64)c * next), weights = load_fresh(pair + (u64)c * next + 1);
            const float value = load_fresh(from + (u64)c * next + i), now = fmaxf(most, high);
            const float old = expf(most - now), own = expf(high - now);
            total = fmaf(own, weights, old * total);
            sum = fmaf(own, value, old * sum);
            most = now;
        }
        p.out[group * SHARE * HEAD + i] = narrow(sum / total);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    SHARED_INT(said);
    const Shared s = carve(memory);
    const int chunk = blockIdx.x % p.chunks, first = chunk * CHUNK;
    const u64 group = blockIdx.x / p.chunks;
    const int position = p.position[group / p.key_heads], used = position / CHUNK + 1;
    if (chunk >= used) return;
    const int before = position - first;  // rows of the chunk that are in the cache already, or more
    const u64 place = (group * p.positions + first) * HEAD;
    Four keys[TURNS], values[TURNS];
    fetch(keys, p.keys + place, before);
    fetch(values, p.values + place, before);
    const Halves turn = angles_of(p, position, threadIdx.x % 32);
    wait_for_last();
    // not before: blocks of the next launch would be where there is room beside these, two on one processor
    let_next_begin();
    take_new(p, s, turn, group, position, before < CHUNK);
    __syncthreads();
    if (before < CHUNK) {
        put_new(keys, s.fresh, before);
        put_new(values, s.fresh + HEAD, before);
    }
    score(s, keys, before + 1);
    __syncthreads();
    float *partial = p.partial + (group * p.chunks + chunk) * (SHARE * (HEAD + 2));
    weigh(s, partial + SHARE * HEAD);
    __syncthreads();
    add_values(s, values, partial);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) said = atomicAdd(p.arrived + group, 1u);
    __syncthreads();
    if (said != used - 1) return;
    __threadfence();
    if (threadIdx.x == 0) p.arrived[group] = 0;
    join(p, group, used);
}
