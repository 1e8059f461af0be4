// Few tokens by the weights of up to four layers that read the same input, in one launch: router, thresholds and products.
//
// What: y_t = x_t read(q, depth_t)^T + bias. With codes cut to the bits of the depth (`slices.prefix`, in the upper bits of a byte)
//
//     y = 2^(BASE - 8) sum over groups of s (sum_k code_k x_k + (half a cell - first half - zero) sum_k x_k)
//
// How. x is taken to 16 bits with a scale for each token and 64 columns, as two planes of signed bytes x = scale (256 high + low): the error is
// below that of storing y. Products are then whole numbers on the tensor cores, weights being their wide side (m16n8k32), the two
// planes of up to four tokens their eight columns. A code needs no conversion: shifting and masking a word gives four of them.
//
// A block owns 32 rows at a time; its warps share out the columns in tiles of 64 and are summed in a fixed order. A lane fetches
// its part of a tile with one load of 8 bytes for each bit (`tiles.py`) while it works on the tiles before.
//
// Routing. Blocks first score part of the columns each; the last to arrive adds up and decides. Meanwhile the others read the base
// slice of their first rows, which every token needs. Slices that no token needs are not fetched.
//
// Set by the compiler's command line: BF16, GROUP, NT (tokens in fours), WARPS, BASE (width of the base slice), PIECES, and for each
// piece its WIDTHS (1 or 2 bits), DEPTHS (of the slice that it is part of) and ENDS (bits up to and with it).

#ifdef EMULATED
#include "simt.h"
#else
#include "device.h"
#endif
#include "pieces.h"

constexpr int TOKENS = 4 * NT, MEMBERS = 4, MOST_HIDDEN = 128, HIDDEN_TILE = 32;
// columns of x that share a scale: those of a tile, or of a group where that is smaller
constexpr int UNIT = GROUP < 64 ? GROUP : 64, HALVES = 64 / UNIT, THREADS = WARPS * 32, STRIDE = 33;
// bytes from one column of x to the next: 64 more than the columns, so that two columns lie in different banks
constexpr int BESIDE = 64;
constexpr float STEPS = 32512;

struct Member {
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale;           // fp16 [row tiles][groups][8][4]
    const u8 *zero;            // uint8, the same order
    const float *bias;         // [rows] or null
    u16 *out;                  // [tokens, rows]
    int rows, end;             // end: row tiles up to and with this member
};

struct Router {
    const u8 *weight;             // int8 [hidden tiles][column tiles][4][32 lanes][16]
    const u16 *weight_scale;      // fp16 [hidden]
    const float *rms, *bias;      // [hidden]
    const float *out, *out_bias;  // [scores, hidden], [scores]
    float *partial;               // [parts][hidden + 1][TOKENS]
    int *depth;                   // [TOKENS]
    u32 *state;                   // arrived, ready, left: zero between launches
    int hidden, scores;           // no router where hidden is 0
};

struct Params {
    Member members[MEMBERS];
    Router router;
    const u16 *x;          // [tokens, columns]
    const float *tau;      // [entries]
    const long long *cap;  // [entries]
    double *read;          // [entries, depths]: weights read at each depth
    int tokens, columns, column_tiles, groups, entries, depths, parts;
};

// ---- shared memory: x in bytes, scale and sum of x of each unit, and sums of the warps, twice

struct Shared {
    u8 *x;
    Pair *units;
    float *sums;
};

DEVICE int x_stride(const Params &p) { return p.column_tiles * 64 + BESIDE; }

constexpr int SUMS = WARPS * TOKENS * STRIDE;

DEVICE Shared carve(u8 *memory, const Params &p) {
    Shared s;
    s.x = memory;
    s.units = (Pair *)(memory + 2 * TOKENS * x_stride(p));
    s.sums = (float *)(s.units + p.column_tiles * HALVES * TOKENS);
    return s;
}

DEVICE float wide(u16 value) { return BF16 ? from_bf16(value) : from_fp16(value); }
DEVICE u16 narrow(float value) { return BF16 ? to_bf16(value) : to_fp16(value); }

// where the eight bytes of columns 8 n .. 8 n + 7 lie in a column of x: the two steps of a tile side by side for each lane
DEVICE int place_of_eight(int n) { return n / 8 * 64 + n % 4 * 16 + n / 4 % 2 * 8; }

// x to two planes of bytes; a thread takes eight columns, the lanes of a unit agree on its scale
DEVICE void stage(const Params &p, const Shared &s) {
    constexpr int lanes = UNIT / 8;
    const int lane = threadIdx.x % 32, stride = x_stride(p), eights = p.column_tiles * 8, total = eights * TOKENS;
    for (int first = threadIdx.x - lane; first < total; first += THREADS) {
        const int at = first + lane, token = at / eights, eight = at % eights;
        const bool there = at < total && token < p.tokens && eight * 8 < p.columns;
        Four four = {0, 0, 0, 0};
        if (there) four = *(const Four *)(p.x + (u64)token * p.columns + eight * 8);
        const u32 twos[4] = {four.x, four.y, four.z, four.w};
        float v[8];
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = wide((u16)(twos[i / 2] >> (16 * (i % 2))));
            const u32 size = __float_as_uint(v[i]) & 0x7fffffffu;  // in this order NaN is the largest
            most = most > size ? most : size;
        }
#pragma unroll
        for (int by = 1; by < lanes; by *= 2) {
            const u32 other = shuffle_xor(most, by);
            most = most > other ? most : other;
        }
        const float largest = __uint_as_float(most), scale = largest < 1e-33f ? 0 : largest / STEPS;
        const float inverse = largest < 1e-33f ? 0 : STEPS / largest;
        u32 bits[8];
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // the nearest whole number in the low bits of a float
            bits[i] = __float_as_uint(fmaf(v[i], inverse, 12582912.0f));
            sum += (int)(bits[i] - 0x4b400000u);
        }
#pragma unroll
        for (int by = 1; by < lanes; by *= 2) sum += shuffle_xor(sum, by);
        if (at >= total) continue;
        u8 *high = s.x + (u64)(2 * token) * stride + place_of_eight(eight), *low = high + stride;
        Two highs, lows;
        u32 *words[2] = {&highs.x, &highs.y}, *under[2] = {&lows.x, &lows.y};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 above = 0, below = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const u32 whole = bits[half * 4 + i];
                below |= (whole & 255) << (8 * i);
                above |= ((whole + 128) >> 8 & 255) << (8 * i);  // low is signed
            }
            *words[half] = above, *under[half] = below;
        }
        *(Two *)high = highs;
        *(Two *)low = lows;
        if (eight % lanes == 0) s.units[eight / lanes * TOKENS + token] = {scale, scale * (float)sum};
    }
}

// ---- tiles in registers

template <int first, int last> struct Tile {
    u32 words[words_before(last) - words_before(first)];
    u32 scale[HALVES][2];  // fp16 of four rows
    u32 zero[HALVES];      // bytes of four rows
};

template <int first, int last>
DEVICE void fetch(Tile<first, last> &tile, const Params &p, const Member &m, int row_tile, int column_tile, int lane, bool wanted) {
    const u64 index = (u64)row_tile * p.column_tiles + column_tile;
    fetch_words<first, last>(tile.words, m.pieces, index * 32 + lane, wanted ? DEPTH[last - 1] : 0);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        int group = (column_tile * 64 + h * 32) / GROUP;
        group = group < p.groups ? group : p.groups - 1;  // padding, where x is zero
        const u64 at = ((u64)row_tile * p.groups + group) * 8 + lane / 4;
        const Two scale = fetch_two(m.scale + at * 8, wanted);
        tile.scale[h][0] = scale.x, tile.scale[h][1] = scale.y;
        if (first == 0) tile.zero[h] = fetch_one(m.zero + at * 4, wanted);
    }
}

typedef int Sums[HALVES][2][NT][4];

// the two planes of all tokens in one tile: [NT][step][register]
struct Inputs {
    u32 v[NT][2][2];
};

DEVICE void load_inputs(Inputs &in, const Params &p, const Shared &s, int column_tile, int lane) {
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const Four four = *(const Four *)(s.x + (u64)(c * 8 + lane / 4) * x_stride(p) + column_tile * 64 + lane % 4 * 16);
        in.v[c][0][0] = four.x, in.v[c][0][1] = four.y, in.v[c][1][0] = four.z, in.v[c][1][1] = four.w;
    }
}

// pieces `piece` .. `end` - 1 together, for the tokens that read them
template <int piece, int end, int m, int f, int first, int last>
DEVICE void add_step(Sums &sums, const Tile<first, last> &tile, const Inputs &in, const int (&depth)[NT], bool all) {
    const u32 a[4] = {fragment<first, piece, end, m, f, 0>(tile.words), fragment<first, piece, end, m, f, 1>(tile.words),
                      fragment<first, piece, end, m, f, 2>(tile.words), fragment<first, piece, end, m, f, 3>(tile.words)};
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const bool reads = all || depth[c] >= DEPTH[piece];
        multiply_codes(sums[HALVES == 2 ? f : 0][m][c], a, reads ? in.v[c][f][0] : 0, reads ? in.v[c][f][1] : 0);
    }
}

template <int piece, int end, int first, int last>
DEVICE void add_pieces(Sums &sums, const Tile<first, last> &tile, const Inputs &in, const int (&depth)[NT], bool all) {
    add_step<piece, end, 0, 0>(sums, tile, in, depth, all);
    add_step<piece, end, 0, 1>(sums, tile, in, depth, all);
    add_step<piece, end, 1, 0>(sums, tile, in, depth, all);
    add_step<piece, end, 1, 1>(sums, tile, in, depth, all);
}

template <int piece, int first, int last>
DEVICE void add_apart(Sums &sums, const Tile<first, last> &tile, const Inputs &in, const int (&depth)[NT]) {
    if constexpr (piece < last) {
        add_pieces<piece, piece + 1>(sums, tile, in, depth, false);
        add_apart<piece + 1>(sums, tile, in, depth);
    }
}

// what a warp knows of its tokens: those of its columns of x (`column`) and those of its sums (`offset`, half a cell less the first)
struct Tokens {
    int column[NT];
    float offset[NT];
    bool alike;
};

typedef float Rows[4][NT];  // row 16 m + 8 u + lane / 4 at 2 m + u, token 4 c + lane % 4

template <int first, int last, bool apart>
DEVICE void add_tile(Rows &y, const Tile<first, last> &tile, const Params &p, const Shared &s, int column_tile, int lane, const Tokens &t) {
    Inputs in;
    load_inputs(in, p, s, column_tile, lane);
    Sums sums = {};
    if constexpr (apart) add_apart<first>(sums, tile, in, t.column);
    else add_pieces<first, last>(sums, tile, in, t.column, true);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
#pragma unroll
        for (int c = 0; c < NT; c++) {
            const Pair x = s.units[(column_tile * HALVES + h) * TOKENS + c * 4 + lane % 4];
            const float more = t.offset[c] * x.y;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int *sum = sums[h][r / 2][c] + r % 2 * 2;
                float part = fmaf((float)(sum[0] * 256 + sum[1]), x.x, more);
                if (first == 0) part = fmaf(-(float)(tile.zero[h] >> (8 * r) & 255), x.y, part);
                y[r][c] = fmaf(from_fp16((u16)(tile.scale[h][r / 2] >> (16 * (r % 2)))), part, y[r][c]);
            }
        }
    }
}

// ---- rows

DEVICE const Member &member_of(const Params &p, int &row_tile) {
    int i = 0;
    while (row_tile >= p.members[i].end) i++;
    if (i) row_tile -= p.members[i - 1].end;
    return p.members[i];
}

DEVICE int row_tiles_of(const Params &p) {
    int most = 0;
    for (int i = 0; i < MEMBERS; i++) most = p.members[i].end > most ? p.members[i].end : most;
    return most;
}

DEVICE int place_of(int warp, int token, int row) { return (warp * TOKENS + token) * STRIDE + row; }

DEVICE void put(float *sums, const Rows &y, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < NT; c++) sums[place_of(warp, c * 4 + lane % 4, r * 8 + lane / 4)] = y[r][c];
}

// add up the warps and store 32 rows of all tokens; the two buffers take turns, so one barrier is enough
DEVICE void finish(const Params &p, const Shared &s, Rows &y, int row_tile, int turn, int warp, int lane) {
    float *sums = s.sums + turn * SUMS;
    put(sums, y, warp, lane);
    __syncthreads();
    const Member &m = member_of(p, row_tile);
    for (int i = threadIdx.x; i < 32 * p.tokens; i += THREADS) {
        const int token = i / 32, row = row_tile * 32 + i % 32;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += sums[place_of(w, token, i % 32)];
        total *= 1.0f / (1 << (8 - BASE));
        if (row < m.rows) {
            if (m.bias) total += m.bias[row];
            m.out[(u64)token * m.rows + row] = narrow(total);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < NT; c++) y[r][c] = 0;
}

// tiles of one lane that are on their way at a time
template <int first, int last> constexpr int ahead() {
    return (words_before(last) - words_before(first) <= 4 ? 4 : words_before(last) - words_before(first) <= 8 ? 2 : 1);
}

template <int first, int last> struct Batch {
    Tile<first, last> tiles[ahead<first, last>()];
};

template <int first, int last>
DEVICE void fetch_batch(Batch<first, last> &batch, const Params &p, int row_tile, int column_tile, int lane, bool wanted) {
    if (!wanted) return;
    const Member &m = member_of(p, row_tile);
#pragma unroll
    for (int i = 0; i < ahead<first, last>(); i++) {
        const int column = column_tile + i * WARPS;
        fetch(batch.tiles[i], p, m, row_tile, column < p.column_tiles ? column : 0, lane, column < p.column_tiles);
    }
}

// pieces first .. last - 1 of rows from, from + by, .. below to. `begin` runs once, after the first tiles were asked for. The sums
// are stored at the end of each 32 rows, unless `keep`, which is for one turn.
template <int first, int last, bool apart, class Begin>
DEVICE void sweep(const Params &p, const Shared &s, int from, int by, int to, bool keep, const Tokens &t, Rows &y, int &turn, Begin begin) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = WARPS * ahead<first, last>();
    Batch<first, last> batch, next;
    int row_tile = from, column_tile = warp;
    fetch_batch(batch, p, row_tile, column_tile, lane, row_tile < to && column_tile < p.column_tiles);
    begin();
    while (row_tile < to) {
        const bool ends = column_tile + stride >= p.column_tiles;
        const int next_row = ends ? row_tile + by : row_tile, next_column = ends ? warp : column_tile + stride;
        fetch_batch(next, p, next_row, next_column, lane, next_row < to && next_column < p.column_tiles);
#pragma unroll
        for (int i = 0; i < ahead<first, last>(); i++)
            if (column_tile + i * WARPS < p.column_tiles)
                add_tile<first, last, apart>(y, batch.tiles[i], p, s, column_tile + i * WARPS, lane, t);
        if (ends && !keep) finish(p, s, y, row_tile, turn ^= 1, warp, lane);
        batch = next, row_tile = next_row, column_tile = next_column;
    }
}

template <int first, int depth, class Begin>
DEVICE void sweep_to(int deepest, const Params &p, const Shared &s, int from, int by, int to, bool keep, const Tokens &t, Rows &y, int &turn, Begin begin) {
    constexpr int last = pieces_to(depth);
    if constexpr (last > first) {
        if (deepest == depth) {
            if (t.alike) sweep<first, last, false>(p, s, from, by, to, keep, t, y, turn, begin);
            else sweep<first, last, true>(p, s, from, by, to, keep, t, y, turn, begin);
            return;
        }
    }
    if constexpr (last < COUNT_OF_PIECES) sweep_to<first, depth + 1>(deepest, p, s, from, by, to, keep, t, y, turn, begin);
}

// ---- the router: some columns of its first matrix in each block, the rest in the block that is last to arrive

// products of 32 hidden units with all tokens over this block's columns, and the energy of x there, into `partial`
DEVICE void score_part(const Params &p, const Shared &s, int block) {
    const Router &r = p.router;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *partial = r.partial + block * (r.hidden + 1) * TOKENS;
    for (int hidden_tile = 0; hidden_tile * HIDDEN_TILE < r.hidden; hidden_tile++) {
        Rows y = {};
        float energy[NT] = {};
        for (int tile = block + warp * p.parts; tile < p.column_tiles; tile += WARPS * p.parts) {
            const u8 *from = r.weight + ((u64)hidden_tile * p.column_tiles + tile) * 2048 + lane * 16;
            Inputs in;
            load_inputs(in, p, s, tile, lane);
            Sums sums = {};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Four four = fetch_four(from + i * 512, true);
                const u32 a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int c = 0; c < NT; c++) multiply_bytes(sums[HALVES == 2 ? i % 2 : 0][i / 2][c], a, in.v[c][i % 2][0], in.v[c][i % 2][1]);
            }
#pragma unroll
            for (int c = 0; c < NT; c++) {
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const Pair x = s.units[(tile * HALVES + h) * TOKENS + c * 4 + lane % 4];
#pragma unroll
                    for (int row = 0; row < 4; row++) {
                        const int *sum = sums[h][row / 2][c] + row % 2 * 2;
                        y[row][c] = fmaf((float)(sum[0] * 256 + sum[1]), x.x, y[row][c]);
                    }
                }
                const int token = c * 4 + lane / 8, column = tile * 64 + lane % 8 * 8;
                if (hidden_tile == 0 && token < p.tokens && column < p.columns) {
                    const Four four = *(const Four *)(p.x + (u64)token * p.columns + column);
                    const u32 twos[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const float v = wide((u16)(twos[i / 2] >> (16 * (i % 2))));
                        energy[c] = fmaf(v, v, energy[c]);
                    }
                }
            }
        }
        float *energies = s.sums + SUMS;
        put(s.sums, y, warp, lane);
#pragma unroll
        for (int c = 0; c < NT; c++) {
#pragma unroll
            for (int by = 1; by < 8; by *= 2) energy[c] += shuffle_xor(energy[c], by);
            if (lane % 8 == 0) energies[warp * TOKENS + c * 4 + lane / 8] = energy[c];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < HIDDEN_TILE * TOKENS; i += THREADS) {
            const int token = i / HIDDEN_TILE, unit = hidden_tile * HIDDEN_TILE + i % HIDDEN_TILE;
            float total = 0;
            for (int w = 0; w < WARPS; w++) total += s.sums[place_of(w, token, i % HIDDEN_TILE)];
            if (unit < r.hidden) partial[unit * TOKENS + token] = total;
        }
        for (int token = threadIdx.x; hidden_tile == 0 && token < TOKENS; token += THREADS) {
            float total = 0;
            for (int w = 0; w < WARPS; w++) total += energies[w * TOKENS + token];
            partial[r.hidden * TOKENS + token] = total;
        }
        __syncthreads();
    }
}

DEVICE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

DEVICE int entry_of(const Params &p, int token) { return token / (p.tokens / p.entries); }

// what a token reads in all layers of the launch
DEVICE void count(const Params &p, int token, int depth) {
    double weights = 0;
    for (int i = 0; i < MEMBERS; i++) weights += (double)p.members[i].rows * p.columns;
    // whole numbers: any order of additions gives the same sum
    atomicAdd(p.read + entry_of(p, token) * p.depths + depth - 1, weights);
}

// scores as in `router.scores`, depths as in `router.depths`
DEVICE void decide(const Params &p, const Shared &s) {
    const Router &r = p.router;
    const int stride = (r.hidden + 1) * TOKENS;
    float *active = s.sums, *scores = s.sums + MOST_HIDDEN * TOKENS;
    for (int i = threadIdx.x; i < r.hidden * p.tokens; i += THREADS) {
        const int unit = i / p.tokens, token = i % p.tokens;
        float sum = 0, energy = 0;
        for (int b = 0; b < p.parts; b++) {
            sum += load_shared_by_all(r.partial + b * stride + unit * TOKENS + token);
            energy += load_shared_by_all(r.partial + b * stride + r.hidden * TOKENS + token);
        }
        float rms = sqrtf(energy / p.columns);
        rms = rms < 1e-6f ? 1e-6f : rms;  // NaN stays NaN
        const float z = sum / rms * from_fp16(r.weight_scale[unit]) + logf(rms) * r.rms[unit] + r.bias[unit];
        active[unit * TOKENS + token] = z / (1 + expf(-z));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < r.scores * p.tokens; i += THREADS) {
        const int score = i / p.tokens, token = i % p.tokens;
        float sum = 0;
        for (int unit = 0; unit < r.hidden; unit++) sum += r.out[score * r.hidden + unit] * active[unit * TOKENS + token];
        scores[score * TOKENS + token] = sum + r.out_bias[score];
    }
    __syncthreads();
    if (threadIdx.x < p.tokens) {
        const int token = threadIdx.x, entry = entry_of(p, token), cap = (int)p.cap[entry];
        const float tau = p.tau[entry];
        int depth = 1 + (scores[token] > tau);
        float fall = 0;
        for (int i = 1; i < r.scores; i++) {
            fall += softplus(scores[i * TOKENS + token]);
            depth += scores[token] - fall > tau;
        }
        depth = depth < cap ? depth : cap;
        r.depth[token] = depth;
        count(p, token, depth);
    }
}

// this block's part of the scores, and the decision where it is the last
DEVICE void route(const Params &p, const Shared &s, int *said) {
    if (blockIdx.x >= p.parts) return;
    u32 *state = p.router.state;
    score_part(p, s, blockIdx.x);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *said = atomicAdd(state, 1u);
    __syncthreads();
    if (*said != p.parts - 1) return;
    __threadfence();
    decide(p, s);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) store_release(state + 1, 1);
}

constexpr float half_a_cell(int bits) { return bits == 8 ? 0.5f : 1 << (7 - (bits < 8 ? bits : 7)); }

DEVICE int bits_at(int depth) {
    int bits = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (DEPTH[i] <= depth) bits = END[i];
    return bits;
}

// depths of the tokens of this lane; returns the deepest of all
DEVICE int look_up(const Params &p, Tokens &t, bool routed, int lane) {
    int deepest = 0, least = 1 << 10;
    auto depth_of = [&](int token) {
        if (token >= p.tokens) return 0;
        return routed ? load_shared_by_all(p.router.depth + token) : (int)p.cap[entry_of(p, token)];
    };
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const int own = depth_of(c * 4 + lane % 4);
        t.column[c] = depth_of(c * 4 + lane / 8);
        const int bits = bits_at(own);
        t.offset[c] = own ? (bits == 8 ? 0.5f : (float)(1 << (7 - bits % 8))) - half_a_cell(BASE) : 0;
        deepest = deepest > own ? deepest : own;
        if (own) least = least < own ? least : own;
    }
    deepest = warp_max(deepest);
    t.alike = -warp_max(-least) == deepest;
    return deepest;
}

extern "C" __global__ void __launch_bounds__(THREADS) few(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    SHARED_INT(said);
    const Shared s = carve(memory, p);
    const int lane = threadIdx.x % 32, blocks = gridDim.x, tiles = row_tiles_of(p);
    u32 *state = p.router.state;
    const bool routed = p.router.hidden && !warp_all(lane >= p.entries || __float_as_uint(p.tau[lane]) == 0xff800000u);
    int own = blockIdx.x, turn = 0, deepest;
    Rows y = {};
    Tokens t;
    auto begin = [&]() {
        stage(p, s);
        __syncthreads();
    };
    auto nothing = []() {};
    if (routed) {
#pragma unroll
        for (int c = 0; c < NT; c++) t.column[c] = 1, t.offset[c] = 0;
        sweep<0, pieces_to(1), false>(p, s, own, blocks, own + 1, true, t, y, turn, [&]() { begin(); route(p, s, &said); });
        if (threadIdx.x == 0)
            while (!load_acquire(state + 1)) pause();
        __syncthreads();
        deepest = look_up(p, t, true, lane);
        if (deepest > 1) sweep_to<pieces_to(1), 2>(deepest, p, s, own, blocks, own + 1, true, t, y, turn, nothing);
        finish(p, s, y, own, turn ^= 1, threadIdx.x / 32, lane);
        own += blocks;
        sweep_to<0, 1>(deepest, p, s, own, blocks, tiles, false, t, y, turn, nothing);
    } else {
        if (blockIdx.x == 0 && threadIdx.x < p.tokens) count(p, threadIdx.x, (int)p.cap[entry_of(p, threadIdx.x)]);
        deepest = look_up(p, t, false, lane);
        sweep_to<0, 1>(deepest, p, s, own, blocks, tiles, false, t, y, turn, begin);
    }
    if (routed && threadIdx.x == 0 && atomicAdd(state + 2, 1u) == blocks - 1) state[0] = state[1] = state[2] = 0;
}
