// Few tokens by the weights of up to four layers that read the same input, in one launch: router, thresholds and products.
//
// What: y_t = x_t read(q, depth_t)^T + bias. With codes cut to the bits of the depth (`slices.prefix`, in the upper bits of a
// byte)
//
//     y = 2^(BASE - 8) sum over groups of s (sum_k code_k x_k + (half a cell - first half - zero) sum_k x_k)
//
// How. x is taken to 16 bits with a scale for each token and 64 columns, as two planes of signed bytes (`stage.h`)
// x = scale (256 high + low): the error is below that of storing y. Products are then whole numbers on the tensor cores, weights
// being their wide side (m16n8k32), the two planes of up to four tokens their eight columns. A code needs no conversion:
// shifting and masking a word gives four of them (`pieces.h`).
//
// A block owns 32 rows at a time; its warps share out the columns in tiles of 64 and are summed in a fixed order. Tiles are
// copied to shared memory some ahead (`ring.h`), in the order in which lanes take them (`tiles.py`).
//
// Routing (`score.h`). Some blocks score part of the columns each, all read the base slice of their first rows, which every token
// needs, then all add up the scores and decide. Slices that no token needs are not fetched.
//
// A launch begins while the one before it ends: its first weights are on their way before it waits for x.
//
// Set by the compiler's command line: BF16, GROUP, NT (tokens in fours), WARPS, PER (blocks that a processor has room for), RING
// (bytes of a warp's tiles on their way), BASE (width of the base slice), PIECES, and for each piece its WIDTHS (1 or 2 bits),
// DEPTHS (of the slice that it is part of) and ENDS (bits up to and with it).

#include "device.h"
#include "pieces.h"
#include "launch.h"
#include "ring.h"
#include "stage.h"
#include "score.h"

// ---- a tile in registers

template <int first, int last> struct Tile {
    u32 words[words_before(last) - words_before(first)];
    u32 scale[HALVES][2];  // fp16 of four rows
    u32 zero[HALVES];      // bytes of four rows
};

template <int first, int last> DEVICE void take(Tile<first, last> &tile, const u8 *from, int lane) {
    take_words<first, last>(tile.words, from, lane);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        const u8 *half = from + codes_bytes<first, last>() + h * (SCALES + ZEROS);
        const Two scale = *(const Two *)(half + lane / 4 * 8);
        tile.scale[h][0] = scale.x, tile.scale[h][1] = scale.y;
        if (first == 0) tile.zero[h] = *(const u32 *)(half + SCALES + lane / 4 * 4);
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

template <int first, int last, bool apart>
DEVICE void add_tile(Rows &y, const u8 *from, const Params &p, const Shared &s, int column_tile, int lane, const Tokens &t) {
    Tile<first, last> tile;
    take(tile, from, lane);
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

// ask for 32 rows up to a depth
DEVICE void prefetch_rows(const Params &p, int row_tile, int depth, int lane) {
    const Member &m = member_of(p, row_tile);
    prefetch_words(m.pieces, row_tile, p.column_tiles, depth, lane);
    if (lane == PIECES) prefetch(m.scale + (u64)row_tile * p.groups * SCALES, p.groups * SCALES);
    if (lane == PIECES + 1) prefetch(m.zero + (u64)row_tile * p.groups * ZEROS, p.groups * ZEROS);
}

// pieces first .. last - 1 of rows from, from + by, .. below to, whose first tiles are on their way (`fill`) and whose others the
// cursor names. The sums are stored at the end of each 32 rows, unless `keep`, which is for one turn.
template <int first, int last, bool apart>
DEVICE void sweep(const Params &p, const Shared &s, Cursor &ahead, int from, bool keep, const Tokens &t, Rows &y, int &turn) {
    constexpr int bytes = tile_bytes<first, last>(), end = places<first, last>() * bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8 *ring = s.ring + warp * RING;
    int place = 0;
    for (int row_tile = from; row_tile < ahead.to; row_tile += ahead.by) {
#pragma unroll 1
        for (int column_tile = warp; column_tile < p.column_tiles; column_tile += WARPS) {
            wait_for_copies<end / bytes - 2>();
            warp_sync();  // it is here for all lanes, and all are done with the tile before, whose place is free
            copy_next<first, last>(ring + (place ? place : end) - bytes, p, ahead, warp, lane);
            add_tile<first, last, apart>(y, ring + place, p, s, column_tile, lane, t);
            place = place + bytes == end ? 0 : place + bytes;
        }
        if (!keep) finish(p, s, y, row_tile, turn ^= 1, warp, lane);
    }
}

template <int first>
DEVICE void sweep_to(int deepest, const Params &p, const Shared &s, Cursor &ahead, int from, bool keep, const Tokens &t, Rows &y, int &turn) {
    at_depth<first>(deepest, [&](auto last) {
        // tokens that read the base slice alone are all alike
        if (last.number == pieces_to(1) || t.alike) sweep<first, last.number, false>(p, s, ahead, from, keep, t, y, turn);
        else sweep<first, last.number, true>(p, s, ahead, from, keep, t, y, turn);
    });
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
DEVICE int look_up(const Params &p, const Shared &s, Tokens &t, bool routed, int lane) {
    int deepest = 0, least = 1 << 10;
    auto depth_of = [&](int token) {
        if (token >= p.tokens) return 0;
        return routed ? s.depth[token] : (int)load_fresh(p.cap + entry_of(p, token));
    };
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const int own = depth_of(c * 4 + lane % 4);
        t.column[c] = depth_of(c * 4 + lane / 8);
        const int bits = bits_at(own);
        t.offset[c] = own ? half_a_cell(bits) - half_a_cell(BASE) : 0;
        deepest = deepest > own ? deepest : own;
        if (own) least = least < own ? least : own;
    }
    deepest = warp_max(deepest);
    t.alike = -warp_max(-least) == deepest;
    return deepest;
}

// whether any entry leaves its depth to the router
DEVICE bool is_routed(const Params &p, int lane) {
    return p.router.hidden && !warp_all(lane >= p.entries || __float_as_uint(load_fresh(p.tau + lane)) == 0xff800000u);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER) few(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    const Shared s = carve(memory, p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, tiles = row_tiles_of(p), own = blockIdx.x;
    u8 *ring = s.ring + warp * RING;
    Tokens t;
    Rows y = {};
    int turn = 0;
    // Before the launch before has ended: weights do not depend on it, and what thresholds say by now is a guess of what is wanted
    bool routed = is_routed(p, lane);
    int deepest = routed ? 1 : look_up(p, s, t, false, lane);
    Cursor ahead = cursor(p, own, blocks, routed ? own + 1 : tiles, warp, lane);
    fill_to<0>(deepest, ring, p, ahead, warp, lane);
    if (routed && warp == 0)
        for (int i = 1; i < FIRST_ROWS && own + i * blocks < tiles; i++) prefetch_rows(p, own + i * blocks, 1, lane);
    if (p.router.hidden) prepare_scores(p, s);
    let_next_begin();
    wait_for_last();
    stage(p, s);
    __syncthreads();
    const bool now_routed = is_routed(p, lane);
    const int now_deepest = now_routed ? 1 : look_up(p, s, t, false, lane);
    if (now_routed != routed || now_deepest != deepest) {
        wait_for_copies<0>();
        routed = now_routed, deepest = now_deepest, ahead = cursor(p, own, blocks, routed ? own + 1 : tiles, warp, lane);
        fill_to<0>(deepest, ring, p, ahead, warp, lane);
    }
    if (!routed) {
        if (own == 0 && threadIdx.x < p.tokens) count(p, threadIdx.x, (int)load_fresh(p.cap + entry_of(p, threadIdx.x)));
        sweep_to<0>(deepest, p, s, ahead, own, false, t, y, turn);
        return;
    }
    score(p, s);
#pragma unroll
    for (int c = 0; c < NT; c++) t.column[c] = 1, t.offset[c] = 0;
    sweep<0, pieces_to(1), false>(p, s, ahead, own, true, t, y, turn);
    await_scores(p);
    decide(p, s);
    deepest = look_up(p, s, t, true, lane);
    if (deepest > 1) {
        ahead = cursor(p, own, blocks, own + 1, warp, lane);
        fill_to<pieces_to(1)>(deepest, ring, p, ahead, warp, lane);
        sweep_to<pieces_to(1)>(deepest, p, s, ahead, own, true, t, y, turn);
    }
    ahead = cursor(p, own + blocks, blocks, tiles, warp, lane);
    fill_to<0>(deepest, ring, p, ahead, warp, lane);
    finish(p, s, y, own, turn ^= 1, warp, lane);
    sweep_to<0>(deepest, p, s, ahead, own + blocks, false, t, y, turn);
    leave(p);
}
