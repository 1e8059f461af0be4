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
// (bytes of a warp's tiles on their way), ROUTED (what routers are for, `score.h`), MAKES (whether x may be made here, `stage.h`), BASE
// (width of the base slice), PIECES, and for each piece its WIDTHS (1 or 2 bits), DEPTHS (of the slice that it is part of) and ENDS
// (bits up to and with it).

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

// the same for each piece apart, whose words are taken one after another: all of them are many registers
template <int piece, int first, int last, int f>
DEVICE void add_apart(Sums &sums, const u8 *place, int tile, const Inputs &in, const int (&depth)[NT], int lane) {
    if constexpr (piece < last) {
        u32 words[2 * WIDTH[piece]];
        take_piece<first, piece, tiles_of_place<first, last>()>(words, place, tile, lane);
        add_step<piece, piece + 1, piece, f>(sums, words, in, depth, false);
        add_apart<piece + 1, first, last, f>(sums, place, tile, in, depth, lane);
    }
}

// what a warp knows of its tokens: those of its columns of x (`column`) and those of its sums (`offset`, half a cell less the first)
struct Tokens {
    int column[NT];
    float offset[NT];
};
// said beside the deepest token's depth where others read less: one number is one register
constexpr int MIXED = 16;

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
        if constexpr (!apart) take_words<first, last, Own::TILES>(words[i], place, i, lane);
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
                if (i % 2) add_apart<first, first, last, 1>(sums, place, i / 2, in[i / 2], t.column, lane);
                else add_apart<first, first, last, 0>(sums, place, i / 2, in[i / 2], t.column, lane);
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

// the rows of this block's turn; shared out from the last block on, since the first ones have other work too
DEVICE int rows_of_turn(int turn) { return (turn + 1) * (int)gridDim.x - 1 - (int)blockIdx.x; }

// add up the warps and store 32 rows of all tokens; where two buffers take turns, one barrier is enough
DEVICE void finish(const Params &p, const Shared &s, Rows &y, int turn, int warp, int lane) {
    float *sums = s.sums + turn % BUFFERS * SUMS;
    int row_tile = rows_of_turn(turn);
    if (BUFFERS == 1) __syncthreads();  // those of the rows before have been read
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

// pieces first .. last - 1 of the rows of a turn and of those after, as far as the cursor goes, which names the tiles that are not on
// their way yet (`fill`). The sums are stored at the end of each 32 rows, unless `keep`, which is for one turn.
template <int first, int last, bool apart>
DEVICE void sweep(const Params &p, const Shared &s, Cursor &ahead, int turn, bool keep, const Tokens &t, Rows &y) {
    using Own = PlaceOf<first, last>;
    constexpr int bytes = Own::BYTES, end = places<first, last>() * bytes;
    // the kernel with four kinds of sweeps has no register for it
    const u32 thread = ROUTED == ITSELF ? threadIdx.x : thread_anew();
    const int warp = thread / 32, lane = thread % 32;
    u8 *ring = s.ring + warp * RING;
    int place = 0;
    for (; rows_of_turn(turn) < ahead.to; turn++) {
#pragma unroll 1
        for (int column_tile = warp * Own::TILES; column_tile < p.column_tiles; column_tile += WARPS * Own::TILES) {
            wait_for_copies<end / bytes - 2>();
            warp_sync();  // it is here for all lanes, and all are done with the one before, whose place is free
            copy_next<first, last>(ring + (place ? place : end) - bytes, p, ahead, warp, lane);
            add_place<first, last, apart>(y, ring + place, p, s, column_tile, lane, t);
            place = place + bytes == end ? 0 : place + bytes;
        }
        if (!keep) finish(p, s, y, turn, warp, lane);
    }
}

template <int first>
DEVICE void sweep_to(int deepest, const Params &p, const Shared &s, Cursor &ahead, int turn, bool keep, const Tokens &t, Rows &y) {
    at_depth<first>(deepest % MIXED, [&](auto last) {
        // tokens that read the base slice alone are all alike
        if (last.number == pieces_to(1) || deepest < MIXED) sweep<first, last.number, false>(p, s, ahead, turn, keep, t, y);
        else sweep<first, last.number, true>(p, s, ahead, turn, keep, t, y);
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

// depths of the tokens of this lane; returns the deepest of all, and MIXED more where they differ
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
    return -warp_max(-least) == deepest ? deepest : deepest + MIXED;
}

constexpr u32 MINUS_INFINITY = 0xff800000u;

// thresholds, caps and what was decided, on their way: each thread has one of each
struct Asked {
    float tau, own;
    int cap, most, given;
    u32 number;
};

DEVICE Asked ask(const Params &p) {
    const int i = threadIdx.x;
    Asked a = {};
    if (i < p.entries) a.tau = load_fresh(p.tau + i), a.cap = (int)load_fresh(p.cap + i);
    if (i < p.tokens) {
        const int entry = entry_of(p, i);
        a.own = load_fresh(p.tau + entry), a.most = (int)load_fresh(p.cap + entry);
        if (p.given) a.given = load_fresh(p.given + p.before + i);
    }
    if (ROUTED != NOBODY && i == 0) a.number = load_fresh(p.routers.state);
    return a;
}

// and to shared memory
DEVICE void keep(const Params &p, const Asked &a, Wanted &to) {
    const int i = threadIdx.x;
    if (i < p.entries) to.tau[i] = a.tau, to.cap[i] = a.cap;
    if (i < p.tokens) to.depth[i] = p.given && __float_as_uint(a.own) != MINUS_INFINITY ? a.given : a.most;
    if (i == 0) to.number = a.number;
}

// whether any entry leaves its depth to routers
DEVICE bool is_routed(const Params &p, const Wanted &wanted, int lane) {
    return ROUTED != NOBODY && p.routers.count && !warp_all(lane >= p.entries || __float_as_uint(wanted.tau[lane]) == MINUS_INFINITY);
}

// decide what tokens read beside the base slice of the first rows, which are done here; returns what `look_up` does
DEVICE int decide_and_begin(const Params &p, const Shared &s, Cursor &ahead, int own, int after, Tokens &t, Rows &y) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u8 *ring = s.ring + warp * RING;
#pragma unroll
    for (int c = 0; c < NT; c++) t.column[c] = 1, t.offset[c] = 0;
    sweep<0, pieces_to(1), false>(p, s, ahead, 0, true, t, y);
    decide(p, s, p.routers.each[0], true);
    const int deepest = look_up(p, s.depth, t, lane);
    if (deepest > 1) {
        ahead = {own, after};
        fill_to<pieces_to(1)>(deepest % MIXED, ring, p, ahead, warp, lane);
        sweep_to<pieces_to(1)>(deepest, p, s, ahead, 0, true, t, y);
    }
    ahead = {rows_of_turn(1), p.row_tiles};
    fill_to<0>(deepest % MIXED, ring, p, ahead, warp, lane);
    if (own < p.row_tiles) finish(p, s, y, 0, warp, lane);
    return deepest;
}

// x and what is wanted of it, once the launch before has ended
DEVICE void take_inputs(const Params &p, const Shared &s) {
    wait_for_last();
    const Asked asked = ask(p);
    // more than a few tokens are staged by the launch before, those of one that is cut in parts too
    if (NT > 1 || p.staged) {
        for (int i = threadIdx.x * 16; i < staged_bytes(p); i += THREADS * 16) copy_16(s.x + i, p.staged + i);
        copies_end();
        keep(p, asked, s.wanted[1]);
        wait_for_copies<0>();
    } else stage(p, s, rows_of_turn(0) == 0, [&] { keep(p, asked, s.wanted[1]); });
}

extern "C" __global__ void __launch_bounds__(THREADS, PER) few(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    const Shared s = carve(memory, p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, tiles = p.row_tiles, own = rows_of_turn(0);
    const int after = own + 1 < tiles ? own + 1 : tiles;
    Tokens t;
    Rows y = {};
    int deepest = -1;
    // whether routers have work, and whether rows wait for them
    bool routed = false, open = false;
    Cursor ahead = {own, tiles};
    // Twice: weights do not depend on the launch before, so they are sent for before it has ended, by a guess of what is wanted
#pragma unroll 1
    for (int look = 0; look < 2; look++) {
        if (look) take_inputs(p, s);
        else keep(p, ask(p), s.wanted[0]);
        __syncthreads();
        const Wanted &wanted = s.wanted[look];
        const bool routed_now = is_routed(p, wanted, lane), open_now = ROUTED == ITSELF && routed_now;
        const int deepest_now = open_now ? 1 : look_up(p, wanted.depth, t, lane);
        const bool as_before = deepest_now % MIXED == deepest % MIXED && open_now == open;
        deepest = deepest_now, open = open_now;
        if (!as_before) {
            wait_for_copies<0>();
            ahead = {own, open ? after : tiles};
            fill_to<0>(deepest % MIXED, s.ring + warp * RING, p, ahead, warp, lane);
            if (!look && open && warp == 0)
                for (int i = 1; i < FIRST_ROWS && own + i * blocks < tiles; i++) prefetch_rows(p, own + i * blocks, 1, lane);
        }
        if (routed_now && !routed && is_busy(p)) {
            prepare_scores(p, s);
            if (look) __syncthreads();
        }
        routed = routed_now;
        if (!look) let_next_begin();
    }
    if (routed && is_busy(p)) {
        know_number_and_score(p, s);
        // looked up once more rather than kept in registers meanwhile
        if (!open) deepest = look_up(p, s.wanted[1].depth, t, lane);
    }
    if (!open && own == 0 && threadIdx.x < p.tokens) count(p, threadIdx.x, s.wanted[1].depth[threadIdx.x]);
    // a processor without rows would be given two blocks of the next launch, and would be the last to end
    if (own >= tiles && !open) linger();
    if (open) deepest = decide_and_begin(p, s, ahead, own, after, t, y);
    sweep_to<0>(deepest, p, s, ahead, open, false, t, y);
    // said anew: nothing is kept in registers beside the rows
    if (is_routed(p, s.wanted[1], threadIdx.x % 32) && is_busy(p)) decide_for_others(p, s), number_next(p, s);
}
