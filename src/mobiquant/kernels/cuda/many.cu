// Many tokens by the weight of one layer, on Hopper: weights are made in registers on their way to the tensor cores.
//
// What: y_t = x_t read(q, depth_t)^T. The value of a weight is that of `slices.dequantize`: one rounding to fp32, one to the dtype
// of the activations.
//
// How. Tokens come in the order of their depths, and a block takes up to TOKENS of one depth by 128 rows: two groups of four warps
// by 64 rows each. The weights are the registers of the products, x is their matrix in shared memory (`warpgroup.h`). Each step of
// 64 columns, while the products of the step before run: x goes from registers to shared memory, that of the next step is asked
// for, codes (copied some steps ahead) are turned into weights.
//
// The columns of a step may come in any order, if it is the same on both sides: a lane takes its eight neighbours of a row as they
// lie in the tile (`tiles.py`), and x is laid down so that it fits. That is an order of registers, and costs nothing.
//
// Set by the compiler's command line: BF16, GROUP, BASE, PIECES, WIDTHS, DEPTHS, ENDS as for `few.cu`, and TOKENS, 64 or 128.

#include "warpgroup.h"
#include "pieces.h"

constexpr int ROWS = 128, ROW_TILES = ROWS / 32, THREADS = 256, STAGES = 4, BUFFERS = 3;
constexpr int SCALES = 64, ZEROS = 32, GROUPS = GROUP < 64 ? 64 / GROUP : 1;  // of a group of 32 rows; groups of a tile
constexpr int X_BYTES = TOKENS * 128, OUT_STRIDE = ROWS * 2 + 16;
constexpr int STAGE_BYTES = ROW_TILES * (words_before(PIECES) * 128 + GROUPS * (SCALES + ZEROS));
static_assert(TOKENS * OUT_STRIDE <= BUFFERS * X_BYTES, "results take the place of x");

struct Params {
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale, *zero;    // fp16, uint8 [row tiles][groups][8][4]
    const u16 *x;              // [tokens, columns]
    u16 *out;                  // [tokens, rows]
    const int *order;          // [tokens], by depth, or null where it is that of x
    const int *counts;         // [depths]: tokens of each, or null where all have `depth`
    int tokens, rows, columns, column_tiles, groups, depth, depths, tiles;  // tiles: of tokens
};

// what a block works on
struct Part {
    int first, count, depth, row_tile;
};

DEVICE Part part_of(const Params &p) {
    int tile = blockIdx.x % p.tiles, before = 0;
    const int row_tile = blockIdx.x / p.tiles * ROW_TILES;
    auto piece = [&](int left, int depth) { return Part{before + tile * TOKENS, left < TOKENS ? left : TOKENS, depth, row_tile}; };
    if (!p.counts) return piece(p.tokens - tile * TOKENS, p.depth);
    for (int d = 0; d < p.depths; d++) {
        const int count = p.counts[d], tiles = (count + TOKENS - 1) / TOKENS;
        if (tile < tiles) return piece(count - tile * TOKENS, d + 1);
        tile -= tiles, before += count;
    }
    return {0, 0, 0, 0};
}

// ---- codes on their way: of each stage the pieces of all row tiles, then their scales and zero points

template <int last> constexpr int scales_at() { return ROW_TILES * words_before(last) * 128; }

// this thread's share of `count` things that come after `before` others: itself or none
DEVICE int share_of(int before, int count) {
    const int own = (threadIdx.x + THREADS - before % THREADS) % THREADS;
    return own < count ? own : -1;
}

template <int last, int piece = 0> DEVICE void copy_codes(u8 *stage, const Params &p, int row_tile, int column_tile) {
    if constexpr (piece < last) {
        constexpr int each = 16 * WIDTH[piece];  // copies of a tile
        const int own = share_of(words_before(piece) * 8 * ROW_TILES, ROW_TILES * each), row = row_tile + own / each;
        if (own >= 0 && row * 32 < p.rows)
            copy_16(stage + ROW_TILES * words_before(piece) * 128 + own * 16,
                    p.pieces[piece] + ((u64)row * p.column_tiles + column_tile) * (each * 16) + own % each * 16);
        copy_codes<last, piece + 1>(stage, p, row_tile, column_tile);
    }
}

// start the copies of a step; counts as a group of copies in any case
template <int last> DEVICE void copy_stage(u8 *stages, const Params &p, int row_tile, int number) {
    u8 *stage = stages + number % STAGES * STAGE_BYTES;
    // steps come in pairs: one beyond the last has weights that are numbers, for x that is zero
    const int column_tile = number < p.column_tiles ? number : p.column_tiles - 1;
    if (number <= p.column_tiles) {
        copy_codes<last>(stage, p, row_tile, column_tile);
        const int own = share_of(words_before(last) * 8 * ROW_TILES, ROW_TILES * GROUPS * 6), row = row_tile + own / (GROUPS * 6);
        if (own >= 0 && row * 32 < p.rows) {
            const u64 group = (u64)row * p.groups + column_tile * 64 / GROUP + own / 6 % GROUPS;
            const int part = own % 6;
            copy_16(stage + scales_at<last>() + own * 16, part < 4 ? p.scale + group * SCALES + part * 16 : p.zero + group * ZEROS + (part - 4) * 16);
        }
    }
    copies_end();
}

// ---- x: eight neighbouring threads take a row of 64 columns, each eight of them, and of a step several rows 32 tokens apart

constexpr int SHARE = TOKENS / 32;

struct Block {
    Four four[SHARE];
};

// where the rows of this thread begin, in eights of columns; none where there is no token
typedef u32 Offsets[SHARE];
constexpr u32 NONE = ~0u;

DEVICE void find_rows(Offsets &rows, const Params &p, const Part &part) {
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int token = i * 32 + threadIdx.x / 8, place = part.first + token;
        rows[i] = token < part.count ? (u32)(p.order ? p.order[place] : place) * (p.columns / 8) : NONE;
    }
}

DEVICE void load_x(Block &block, const Params &p, const Offsets &rows, int column_tile) {
    const int eight = column_tile * 8 + threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < SHARE; i++)
        block.four[i] = rows[i] != NONE && eight * 8 < p.columns ? load_kept((const Four *)p.x + (rows[i] + eight)) : Four{0, 0, 0, 0};
}

// two columns of each of the four eights of a half side by side, as the lanes of a row have them
DEVICE void store_x(u8 *tile, const Block &block) {
    const int half = threadIdx.x / 4 % 2, two = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int token = i * 32 + threadIdx.x / 8;
        const u32 words[4] = {block.four[i].x, block.four[i].y, block.four[i].z, block.four[i].w};
#pragma unroll
        for (int w = 0; w < 4; w++) *(u32 *)(tile + place_of_sixteen(token, half * 4 + w) + two * 4) = words[w];
    }
}

// ---- weights

DEVICE u32 narrow_two(float low, float high) { return BF16 ? two_bf16(low, high) : two_fp16(low, high); }

// what makes weights of the codes of a row: the lower end of its byte, in raised bytes, and the step of a byte
struct Row {
    float less, scale;
};

template <int last> DEVICE float value(u32 word, int byte, const Row &row) {
    // the middle of a cell of eight bits is half a code from its end, which a raised byte cannot hold
    const float whole = raised_byte(word, byte) - row.less;
    return (END[last - 1] == 8 ? whole - 0.5f : whole) * row.scale;
}

// the rows of a lane in its warp's half m of a row tile
template <int last> DEVICE void rows_of(Row (&rows)[2], const u8 *group, int m, int lane) {
    constexpr int end = END[last - 1];
    // in codes of eight bits: half a base step, less half a cell; at eight bits the half code is taken off later
    constexpr int less = (1 << (7 - BASE)) - (end == 8 ? 1 : 1 << (7 - end));
    const u32 scales = *(const u32 *)(group + lane / 4 * 8 + m * 4);
    const u16 zeros = *(const u16 *)(group + SCALES + lane / 4 * 4 + m * 2);
#pragma unroll
    for (int u = 0; u < 2; u++) {
        rows[u].less = 8388608.0f + (float)((zeros >> (8 * u) & 255) + less);
        rows[u].scale = from_fp16((u16)(scales >> (16 * u))) * (1.0f / (1 << (8 - BASE)));
    }
}

// a lane's words of half m of a row tile, in the places that half 0 has
template <int last, int piece = 0> DEVICE void take_half(u32 *words, const u8 *stage, int tile, int m, int lane) {
    if constexpr (piece < last) {
        u32 *to = words + words_before(piece);
        const u8 *own = stage + ROW_TILES * words_before(piece) * 128 + (tile * 32 + lane) * (8 * WIDTH[piece]) + m * (4 * WIDTH[piece]);
        if constexpr (WIDTH[piece] == 2) {
            const Two got = *(const Two *)own;
            to[0] = got.x, to[1] = got.y;
        } else to[0] = *(const u32 *)own;
        take_half<last, piece + 1>(words, stage, tile, m, lane);
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

template <int last> DEVICE void make_weights(Weights &weights, const u8 *stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = warp / 2, m = warp % 2;
    u32 words[words_before(last)];
    take_half<last>(words, stage, tile, m, lane);
    const u8 *groups = stage + scales_at<last>() + tile * GROUPS * (SCALES + ZEROS);
    Row rows[2];
    rows_of<last>(rows, groups, m, lane);
    make_step<last, 0, 0>(weights[0], words, rows);
    make_step<last, 0, 1>(weights[1], words, rows);
    if (GROUPS == 2) rows_of<last>(rows, groups + SCALES + ZEROS, m, lane);
    make_step<last, 1, 0>(weights[2], words, rows);
    make_step<last, 1, 1>(weights[3], words, rows);
}

// ---- a block

typedef float Sums[TOKENS / 2];  // rows lane / 4 and 8 more of the warp, tokens 8 n + lane % 4 * 2 and the next: at 4 n

struct Memory {
    u8 *x, *stages;
};

// One step. `weights` are not those of the step before, whose products may still run; `block` is x of this step, and becomes that of
// the one after the next.
template <int last>
DEVICE void step(Sums &sums, Weights &weights, Block &block, const Params &p, const Memory &memory, const Offsets &rows, int row_tile, int column_tile) {
    u8 *x = memory.x + column_tile % BUFFERS * X_BYTES;
    store_x(x, block);
    load_x(block, p, rows, column_tile + 2);
    wait_for_copies<STAGES - 2>();
    show_products();
    __syncthreads();
    copy_stage<last>(memory.stages, p, row_tile, column_tile + STAGES - 1);
    make_weights<last>(weights, memory.stages + column_tile % STAGES * STAGE_BYTES);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_tokens(sums, weights[i], view_of(x, i));
    products_end();
    wait_for_products<1>();
}

template <int last> DEVICE void multiply(Sums &sums, const Params &p, const Memory &memory, const Part &part) {
    Offsets rows;
    Block x_even, x_odd;
    Weights even, odd;
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) copy_stage<last>(memory.stages, p, part.row_tile, i);
    find_rows(rows, p, part);
    load_x(x_even, p, rows, 0);
    load_x(x_odd, p, rows, 1);
#pragma unroll 1
    for (int column_tile = 0; column_tile < p.column_tiles; column_tile += 2) {
        step<last>(sums, even, x_even, p, memory, rows, part.row_tile, column_tile);
        step<last>(sums, odd, x_odd, p, memory, rows, part.row_tile, column_tile + 1);
    }
    wait_for_products<0>();
}

// results by way of shared memory, so that rows are written side by side
DEVICE void store_out(const Params &p, const Part &part, u8 *memory, const Sums &sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = part.row_tile * 32;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
        const float *own = sums + 4 * n;
        u8 *to = memory + ((n + lane / 16) * 8 + lane % 8) * OUT_STRIDE + (warp * 16 + lane / 8 % 2 * 8) * 2;
        store_turned(to, narrow_two(own[0], own[1]), narrow_two(own[2], own[3]), narrow_two(own[4], own[5]), narrow_two(own[6], own[7]));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < part.count * (ROWS / 8); i += THREADS) {
        const int token = i / (ROWS / 8), eight = i % (ROWS / 8), row = first_row + eight * 8, place = part.first + token;
        const u8 *from = memory + token * OUT_STRIDE + eight * 16;
        u16 *to = p.out + (u64)(p.order ? p.order[place] : place) * p.rows + row;
        if (p.rows % 8 == 0) {
            if (row < p.rows) *(Four *)to = *(const Four *)from;
        } else
            for (int k = 0; k < 8 && row + k < p.rows; k++) to[k] = ((const u16 *)from)[k];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) many(const __grid_constant__ Params p) {
    SHARED_BYTES(bytes);
    u8 *aligned = aligned_1024(bytes);
    const Memory memory = {aligned, aligned + BUFFERS * X_BYTES};
    const Part part = part_of(p);
    if (!part.depth) return;
    Sums sums = {};
    at_depth<0>(part.depth, [&](auto last) { multiply<last.number>(sums, p, memory, part); });
    store_out(p, part, memory.x, sums);
}
