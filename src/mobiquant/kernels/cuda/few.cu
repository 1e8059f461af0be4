// Few tokens by the weights of up to four layers that read the same input, in one launch: router, thresholds and products.
//
// What: y_t = x_t read(q, depth_t)^T + bias. With codes cut to the bits of the depth (`slices.prefix`, in the upper bits of a
// byte)
//
//     y = 2^(BASE - 8) sum over groups of s (sum_k code_k x_k + (half a cell - first half - zero) sum_k x_k)
//
// How. x is taken to 16 bits with a scale for each token and group, as two planes of signed bytes (`stage.h`; `bytes.cu` for many)
// x = scale (256 high + low): the error is below that of storing y. Products are then whole numbers on the tensor cores, weights
// being their wide side (m16n8k32), the two planes of up to four tokens their eight columns. A code needs no conversion:
// shifting and masking a word gives four of them (`pieces.h`).
//
// A block owns 32 rows at a time; its warps share out the columns in tiles of 64, mostly two at a time, and are summed in a fixed
// order. Tiles are copied to shared memory some ahead (`ring.h`), in the order in which lanes take them (`tiles.py`).
//
// Routing (`score.h`). Depths were decided by an earlier launch, or are here: some blocks score part of the columns each, all read
// the base slice of their first rows, which every token needs, then all add up the scores and decide. Slices that no token needs are
// not fetched.
//
// A launch begins while the one before it ends: its first weights are on their way before it waits for x.
//
// Set by the compiler's command line: BF16, GROUP, NT (tokens in fours), WARPS, PER (blocks that a processor has room for), RING
// (bytes of a warp's tiles on their way), ROUTED (what routers are for, `score.h`), BASE (width of the base slice), PIECES, and for each
// piece its WIDTHS (1 or 2 bits), DEPTHS (of the slice that it is part of) and ENDS (bits up to and with it).

#include "device.h"
#include "pieces.h"
#include "launch.h"
#include "ring.h"
#include "stage.h"
#include "score.h"

// ---- tiles in registers

// pieces `piece` .. `end` - 1 together of 32 columns, for the tokens that read them
template <int piece, int end, int first, int f>
DEVICE void add_step(Sums &sums, const u32 *words, const Inputs &in, const int (&depth)[NT], bool all) {
    const u32 upper[4] = {fragment<first, piece, end, 0, f, 0>(words), fragment<first, piece, end, 0, f, 1>(words),
                          fragment<first, piece, end, 0, f, 2>(words), fragment<first, piece, end, 0, f, 3>(words)};
    const u32 lower[4] = {fragment<first, piece, end, 1, f, 0>(words), fragment<first, piece, end, 1, f, 1>(words),
                          fragment<first, piece, end, 1, f, 2>(words), fragment<first, piece, end, 1, f, 3>(words)};
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const bool reads = all || depth[c] >= DEPTH[piece];
        const u32 x[2] = {reads ? in.v[c][f][0] : 0, reads ? in.v[c][f][1] : 0};
        multiply_codes(sums[0][c], upper, x[0], x[1]);
        multiply_codes(sums[1][c], lower, x[0], x[1]);
    }
}

// the same for each piece apart
template <int piece, int first, int last, int f> DEVICE void add_apart(Sums &sums, const u32 *words, const Inputs &in, const int (&depth)[NT]) {
    if constexpr (piece < last) {
        add_step<piece, piece + 1, first, f>(sums, words, in, depth, false);
        add_apart<piece + 1, first, last, f>(sums, words, in, depth);
    }
}

// what a warp knows of its tokens: those of its columns of x (`column`) and those of its sums (`offset`, half a cell less the first)
struct Tokens {
    int column[NT];
    float offset[NT];
    bool alike;
};

// the sums of a group's codes with x, in what its scale makes of them
DEVICE void add_group(Rows &y, const Sums &sums, const u8 *group, const Pair *x, bool with_zero, bool begins, int lane, const Tokens &t) {
    const Two scales = *(const Two *)(group + lane / 4 * 8);
    const u32 zeros = with_zero ? *(const u32 *)(group + SCALES + lane / 4 * 4) : 0;
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const Pair of = x[c * 4 + lane % 4];
        const float sum_x = begins ? of.y : 0, more = t.offset[c] * sum_x;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int *sum = sums[r / 2][c] + r % 2 * 2;
            float part = fmaf((float)(sum[0] * 256 + sum[1]), of.x, more);
            if (with_zero) part = fmaf(-(float)(zeros >> (8 * r) & 255), sum_x, part);
            y[r][c] = fmaf(from_fp16((u16)((r / 2 ? scales.y : scales.x) >> (16 * (r % 2)))), part, y[r][c]);
        }
    }
}

// pieces first .. last - 1 of the tiles of a place, of which the first is `column_tile`
template <int first, int last, bool apart>
DEVICE void add_place(Rows &y, const u8 *place, const Params &p, const Shared &s, int column_tile, int lane, const Tokens &t) {
    using Own = PlaceOf<first, last>;
    constexpr int steps = 2 * Own::TILES / Own::GROUPS;  // of 32 columns in a group, or what there is of it
    u32 words[Own::TILES][words_before(last) - words_before(first)];
    Inputs in[Own::TILES];
#pragma unroll
    for (int i = 0; i < Own::TILES; i++) {
        take_words<first, last, Own::TILES>(words[i], place, i, lane);
        load_inputs(in[i], p, s, column_tile + i, lane);
    }
    const bool begins = Own::TILES * 64 >= GROUP || column_tile * 64 % GROUP == 0;
#pragma unroll
    for (int g = 0; g < Own::GROUPS; g++) {
        Sums sums = {};
#pragma unroll
        for (int i = g * steps; i < (g + 1) * steps; i++) {
            const u32 *own = words[i / 2];
            if constexpr (apart) {
                if (i % 2) add_apart<first, first, last, 1>(sums, own, in[i / 2], t.column);
                else add_apart<first, first, last, 0>(sums, own, in[i / 2], t.column);
            } else {
                if (i % 2) add_step<first, last, first, 1>(sums, own, in[i / 2], t.column, true);
                else add_step<first, last, first, 0>(sums, own, in[i / 2], t.column, true);
            }
        }
        const Pair *x = s.groups + (column_tile * 64 / GROUP + g) * TOKENS;
        add_group(y, sums, place + Own::SCALES_AT + g * (SCALES + ZEROS), x, first == 0, begins, lane, t);
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

// pieces first .. last - 1 of rows from, from + blocks, .. below to, whose first tiles are on their way (`fill`) and whose others the
// cursor names. The sums are stored at the end of each 32 rows, unless `keep`, which is for one turn.
template <int first, int last, bool apart>
DEVICE void sweep(const Params &p, const Shared &s, Cursor &ahead, int from, bool keep, const Tokens &t, Rows &y, int &turn) {
    using Own = PlaceOf<first, last>;
    constexpr int bytes = Own::BYTES, end = places<first, last>() * bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8 *ring = s.ring + warp * RING;
    int place = 0;
    for (int row_tile = from; row_tile < ahead.to; row_tile += gridDim.x) {
#pragma unroll 1
        for (int column_tile = warp * Own::TILES; column_tile < p.column_tiles; column_tile += WARPS * Own::TILES) {
            wait_for_copies<end / bytes - 2>();
            warp_sync();  // it is here for all lanes, and all are done with the one before, whose place is free
            copy_next<first, last>(ring + (place ? place : end) - bytes, p, ahead, warp, lane);
            add_place<first, last, apart>(y, ring + place, p, s, column_tile, lane, t);
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
DEVICE int look_up(const Params &p, const int *depth, Tokens &t, int lane) {
    int deepest = 0, least = 1 << 10;
    auto depth_of = [&](int token) { return token < p.tokens ? depth[token] : 0; };
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

constexpr u32 MINUS_INFINITY = 0xff800000u;

// take thresholds, caps and what was decided to shared memory, as they are now
DEVICE void bring(const Params &p, Wanted &to) {
    const int i = threadIdx.x;
    if (i < p.entries) {
        to.tau[i] = load_fresh(p.tau + i);
        to.cap[i] = (int)load_fresh(p.cap + i);
    }
    if (i < p.tokens) {
        const int entry = entry_of(p, i), cap = (int)load_fresh(p.cap + entry);
        const bool fixed = __float_as_uint(load_fresh(p.tau + entry)) == MINUS_INFINITY;
        to.depth[i] = fixed || !p.given ? cap : load_fresh(p.given + p.before + i);
    }
    if (i == 0) to.number = load_fresh(p.routers.state);
}

// whether any entry leaves its depth to routers
DEVICE bool is_routed(const Params &p, const Wanted &wanted, int lane) {
    return ROUTED != NOBODY && !warp_all(lane >= p.entries || __float_as_uint(wanted.tau[lane]) == MINUS_INFINITY);
}

// decide what tokens read beside the base slice of the first rows, and go on with all rows
DEVICE void decide_and_sweep(const Params &p, const Shared &s, Cursor &ahead, int own, int after, Tokens &t, Rows &y, int &turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, tiles = row_tiles_of(p);
    u8 *ring = s.ring + warp * RING;
#pragma unroll
    for (int c = 0; c < NT; c++) t.column[c] = 1, t.offset[c] = 0;
    sweep<0, pieces_to(1), false>(p, s, ahead, own, true, t, y, turn);
    decide(p, s, p.routers.each[0], true);
    const int deepest = look_up(p, s.depth, t, lane);
    if (deepest > 1) {
        ahead = {own, after};
        fill_to<pieces_to(1)>(deepest, ring, p, ahead, warp, lane);
        sweep_to<pieces_to(1)>(deepest, p, s, ahead, own, true, t, y, turn);
    }
    ahead = {own + blocks, tiles};
    fill_to<0>(deepest, ring, p, ahead, warp, lane);
    if (own < tiles) finish(p, s, y, own, turn ^= 1, warp, lane);
    sweep_to<0>(deepest, p, s, ahead, own + blocks, false, t, y, turn);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER) few(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    const Shared s = carve(memory, p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, tiles = row_tiles_of(p), own = blocks - 1 - (int)blockIdx.x;
    u8 *ring = s.ring + warp * RING;
    Tokens t;
    Rows y = {};
    int turn = 0;
    // Before the launch before has ended: weights do not depend on it, and what is said by now is a guess of what is wanted
    bring(p, s.wanted[0]);
    __syncthreads();
    // whether routers have work, and whether rows wait for them
    const bool guess_routed = is_routed(p, s.wanted[0], lane), guess_open = ROUTED == ITSELF && guess_routed;
    const int guess = guess_open ? 1 : look_up(p, s.wanted[0].depth, t, lane), after = own + 1 < tiles ? own + 1 : tiles;
    Cursor ahead = {own, guess_open ? after : tiles};
    fill_to<0>(guess, ring, p, ahead, warp, lane);
    if (guess_open && warp == 0)
        for (int i = 1; i < FIRST_ROWS && own + i * blocks < tiles; i++) prefetch_rows(p, own + i * blocks, 1, lane);
    if (guess_routed) prepare_scores(p, s);
    let_next_begin();
    wait_for_last();
    if (p.staged) {
        for (int i = threadIdx.x * 16; i < staged_bytes(p); i += THREADS * 16) copy_16(s.x + i, p.staged + i);
        copies_end();
        bring(p, s.wanted[1]);
        wait_for_copies<0>();
    } else stage(p, s, [&] { bring(p, s.wanted[1]); });
    __syncthreads();
    const bool routed = is_routed(p, s.wanted[1], lane), open = ROUTED == ITSELF && routed;
    int deepest = open ? 1 : look_up(p, s.wanted[1].depth, t, lane);
    if (open != guess_open || deepest != guess) {
        wait_for_copies<0>();
        ahead = {own, open ? after : tiles};
        fill_to<0>(deepest, ring, p, ahead, warp, lane);
    }
    if (routed) {
        if (!guess_routed) {
            prepare_scores(p, s);
            __syncthreads();
        }
        know_number(p, s);
        score(p, s);
    }
    if (open) decide_and_sweep(p, s, ahead, own, after, t, y, turn);
    else {
        if (own == 0 && threadIdx.x < p.tokens) count(p, threadIdx.x, s.wanted[1].depth[threadIdx.x]);
        // a processor without rows would be given two blocks of the next launch, and would be the last to end
        if (own >= tiles) linger();
        sweep_to<0>(deepest, p, s, ahead, own, false, t, y, turn);
    }
    if (is_routed(p, s.wanted[1], lane)) {
        decide_for_others(p, s);
        number_next(p, s);
    }
}
