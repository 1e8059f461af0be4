// Many tokens by the weight of one layer, on Hopper: weights are made in registers on their way to the tensor cores.
//
// What: y_t = x_t read(q, depth_t)^T. The value of a weight is that of `slices.dequantize`: one rounding to fp32, one to the dtype
// of the activations.
//
// How. A block takes a tile of up to TOKENS tokens of one depth by 128 rows: two groups of four warps by 64 rows each. Weights are
// the registers of the products, x is their matrix in shared memory. A ninth warp brings x, step by step of 64 columns, as
// `arrange.cu` has laid it out; each lane brings the codes, scales and zero points that it needs itself, so that warps of products
// wait for no other. While the products of a step run, the codes of the next are turned into weights.
//
// Set by the compiler's command line: BF16, GROUP, BASE, PIECES, WIDTHS, DEPTHS, ENDS as for `few.cu`, and TOKENS, 64 or 128.

#include "warpgroup.h"
#include "pieces.h"
#include "runs.h"

constexpr int ROWS = 128, WARPS = 8, THREADS = 32 * WARPS + 32, STAGES = 6, BUFFERS = 6;
constexpr int GROUPS = GROUP < 64 ? 64 / GROUP : 1;  // of a tile
constexpr int X_BYTES = TOKENS * 128, OUT_STRIDE = ROWS * 2 + 16;
constexpr int STAGE_BYTES = words_before(PIECES) * 64 + GROUPS * 256;  // of a warp
static_assert(TOKENS * OUT_STRIDE <= BUFFERS * X_BYTES, "results take the place of x");

struct Params {
    Runs runs;
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale, *zero;    // fp16, uint8 [row tiles][groups][8][4]
    const u8 *x;               // of `arrange.cu` [tiles, steps, TOKENS * 128]
    u16 *out;                  // [tokens, rows]
    int rows, column_tiles, groups, steps;
};

// what a warp of products works on: half m of a row tile
struct Own {
    int row_tile, m, lane;
    u8 *stages;
};

// ---- codes on their way: of each stage and piece the words of the lanes, then scales and zero points of each group

template <int last, int piece = 0> DEVICE void copy_words(u8 *stage, const Params &p, const Own &own, u64 tile) {
    if constexpr (piece < last) {
        constexpr int bytes = 4 * WIDTH[piece];
        copy_own<bytes>(stage + words_before(piece) * 64 + own.lane * bytes,
                        p.pieces[piece] + (tile * 32 + own.lane) * (2 * bytes) + own.m * bytes);
        copy_words<last, piece + 1>(stage, p, own, tile);
    }
}

// start the copies of a step; counts as a group of copies in any case
template <int last> DEVICE void copy_stage(const Params &p, const Own &own, int step) {
    u8 *stage = own.stages + step % STAGES * STAGE_BYTES, *groups = stage + words_before(last) * 64 + own.lane * 4;
    // steps come in pairs: one beyond the last has weights that are numbers, for x that is zero
    const int column_tile = step < p.column_tiles ? step : p.column_tiles - 1;
    if (step < p.steps && own.row_tile * 32 < p.rows) {
        copy_words<last>(stage, p, own, (u64)own.row_tile * p.column_tiles + column_tile);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const u64 group = (u64)own.row_tile * p.groups + column_tile * 64 / GROUP + g;
            copy_own<4>(groups + g * 256, p.scale + group * SCALES + own.lane / 4 * 8 + own.m * 4);
            copy_own<4>(groups + g * 256 + 128, p.zero + group * ZEROS + own.lane / 4 * 4);
        }
    }
    copies_end();
}

// a lane's words, in the places that those of half 0 of a tile have
template <int last, int piece = 0> DEVICE void take_words(u32 *words, const u8 *stage, int lane) {
    if constexpr (piece < last) {
        u32 *to = words + words_before(piece);
        const u8 *from = stage + words_before(piece) * 64 + lane * (4 * WIDTH[piece]);
        if constexpr (WIDTH[piece] == 2) {
            const Two got = *(const Two *)from;
            to[0] = got.x, to[1] = got.y;
        } else to[0] = *(const u32 *)from;
        take_words<last, piece + 1>(words, stage, lane);
    }
}

// ---- weights

// what makes weights of the codes of a row: the lower end of its byte, in raised bytes, and the step of a byte
struct Row {
    float less, scale;
};

template <int last> DEVICE float value(u32 word, int byte, const Row &row) {
    // the middle of a cell of eight bits is half a code from its end, which a raised byte cannot hold
    const float whole = raised_byte(word, byte) - row.less;
    return (END[last - 1] == 8 ? whole - 0.5f : whole) * row.scale;
}

// the two rows of a lane, of the scales and zero points (of all four rows) that it has copied
template <int last> DEVICE void rows_of(Row (&rows)[2], const u8 *group, int m) {
    constexpr int end = END[last - 1];
    // in codes of eight bits: half a base step, less half a cell; at eight bits the half code is taken off later
    constexpr int less = (1 << (7 - BASE)) - (end == 8 ? 1 : 1 << (7 - end));
    const u32 scales = *(const u32 *)group, zeros = *(const u32 *)(group + 128) >> (16 * m);
#pragma unroll
    for (int u = 0; u < 2; u++) {
        rows[u].less = 8388608.0f + (float)((zeros >> (8 * u) & 255) + less);
        rows[u].scale = from_fp16((u16)(scales >> (16 * u))) * (1.0f / (1 << (8 - BASE)));
    }
}

// the weights of 16 columns: eights' half h of the 32 columns f
template <int last, int f, int h> DEVICE void make_step(u32 (&a)[4], const u32 *words, const Row (&rows)[2]) {
    const u32 both[2] = {fragment<0, 0, last, 0, f, 2 * h>(words), fragment<0, 0, last, 0, f, 2 * h + 1>(words)};
#pragma unroll
    for (int u = 0; u < 2; u++) {
        a[u] = narrow_two(value<last>(both[u], 0, rows[u]), value<last>(both[u], 1, rows[u]));
        a[2 + u] = narrow_two(value<last>(both[u], 2, rows[u]), value<last>(both[u], 3, rows[u]));
    }
}

typedef u32 Weights[4][4];  // of 64 columns, in steps of 16

template <int last> DEVICE void make_weights(Weights &weights, const u8 *stage, const Own &own) {
    u32 words[words_before(last)];
    take_words<last>(words, stage, own.lane);
    const u8 *groups = stage + words_before(last) * 64 + own.lane * 4;
    Row rows[2];
    rows_of<last>(rows, groups, own.m);
    make_step<last, 0, 0>(weights[0], words, rows);
    make_step<last, 0, 1>(weights[1], words, rows);
    if (GROUPS == 2) rows_of<last>(rows, groups + 256, own.m);
    make_step<last, 1, 0>(weights[2], words, rows);
    make_step<last, 1, 1>(weights[3], words, rows);
}

// ---- a block

typedef float Sums[TOKENS / 2];  // rows lane / 4 and 8 more of the warp, tokens 8 n + lane % 4 * 2 and the next: at 4 n

// tiles of x on their way: `full` of x, `empty` of warps that have used it
struct Buffers {
    u8 *x;
    Barrier *full, *empty;
};

DEVICE void bring_x(const Params &p, const Buffers &b, int tile) {
    const u8 *from = p.x + (u64)tile * p.steps * X_BYTES;
    for (int step = 0; step < p.steps; step++) {
        const int at = step % BUFFERS, round = step / BUFFERS;
        if (round) wait_for_phase(b.empty + at, round - 1);
        announce(b.full + at, X_BYTES);
        copy_tile(b.x + at * X_BYTES, from + (u64)step * X_BYTES, X_BYTES, b.full + at);
    }
}

// one step; `weights` are not those of the step before, whose products may still run
template <int last> DEVICE void take_step(Sums &sums, Weights &weights, const Params &p, const Buffers &b, const Own &own, int step) {
    const int at = step % BUFFERS;
    wait_for_copies<STAGES - 2>();
    make_weights<last>(weights, own.stages + step % STAGES * STAGE_BYTES, own);
    copy_stage<last>(p, own, step + STAGES - 1);
    wait_for_phase(b.full + at, step / BUFFERS);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_tokens(sums, weights[i], view_of(b.x + at * X_BYTES, i));
    products_end();
    wait_for_products<1>();
    // the products of the step before are done
    if (own.lane == 0 && step) come(b.empty + (step - 1) % BUFFERS);
}

template <int last> DEVICE void multiply(Sums &sums, const Params &p, const Buffers &b, const Own &own) {
    Weights even, odd;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) copy_stage<last>(p, own, i);
#pragma unroll 1
    for (int step = 0; step < p.steps; step += 2) {
        take_step<last>(sums, even, p, b, own, step);
        take_step<last>(sums, odd, p, b, own, step + 1);
    }
    wait_for_products<0>();
}

// results by way of shared memory, so that rows are written side by side
DEVICE void store_out(const Params &p, const Run &run, u8 *memory, const Sums &sums, int first_row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    if (warp < WARPS) {
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n += 2) {
            const float *own = sums + 4 * n;
            u8 *to = memory + ((n + lane / 16) * 8 + lane % 8) * OUT_STRIDE + (warp * 16 + lane / 8 % 2 * 8) * 2;
            store_turned(to, narrow_two(own[0], own[1]), narrow_two(own[2], own[3]), narrow_two(own[4], own[5]), narrow_two(own[6], own[7]));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < run.count * (ROWS / 8); i += THREADS) {
        const int token = i / (ROWS / 8), eight = i % (ROWS / 8), row = first_row + eight * 8;
        const u8 *from = memory + token * OUT_STRIDE + eight * 16;
        u16 *to = p.out + (u64)token_of(p.runs, run.first + token) * p.rows + row;
        if (p.rows % 8 == 0) {
            if (row < p.rows) *(Four *)to = *(const Four *)from;
        } else
            for (int k = 0; k < 8 && row + k < p.rows; k++) to[k] = ((const u16 *)from)[k];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) many(const __grid_constant__ Params p) {
    SHARED_BYTES(bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x % p.runs.tiles, row_tile = blockIdx.x / p.runs.tiles * (ROWS / 32);
    u8 *x = aligned_1024(bytes), *stages = x + BUFFERS * X_BYTES;
    Barrier *barriers = (Barrier *)(stages + WARPS * STAGES * STAGE_BYTES);
    const Buffers buffers = {x, barriers, barriers + BUFFERS};
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) set_up(buffers.full + i, 1), set_up(buffers.empty + i, WARPS);
        show_barriers();
    }
    __syncthreads();
    let_next_begin();
    wait_for_last();
    const Run run = run_of(p.runs, tile);
    if (!run.depth) return;
    Sums sums = {};
    if (warp == WARPS) {
        if (lane == 0) bring_x(p, buffers, tile);
        warp_sync();
    } else {
        const Own own = {row_tile + warp / 2, warp % 2, lane, stages + warp * (STAGES * STAGE_BYTES)};
        at_depth<0>(run.depth, [&](auto last) { multiply<last.number>(sums, p, buffers, own); });
    }
    store_out(p, run, x, sums, row_tile * 32);
}
