// Weights written out at some of their depths, [slots, rows, columns] in fp16 or bf16, for dense products of many tokens.
//
// Slot s holds the weight at depth `depth[s]`; a slot for which `counts[s]` (on the device) is zero is not written, and slices that
// no slot needs are not read. A warp takes one tile of 32 rows and 64 columns; a lane writes 16 bytes, eight neighbours of a row,
// at a time. The value is that of `slices.dequantize`: one rounding to fp32, one to the dtype of the activations.
//
// Set by the compiler's command line: BF16, GROUP, BASE, PIECES, WIDTHS, DEPTHS, ENDS as for `few.cu`.

#include "device.h"
#include "pieces.h"

constexpr int SLOTS = 8, WARPS = 8, WORDS = words_before(PIECES);

struct Params {
    const u8 *pieces[PIECES];
    const u8 *scale, *zero;
    u16 *out;
    const int *counts;  // [slots], or null where all are wanted
    int depth[SLOTS];
    int slots, rows, columns, column_tiles, groups;
};

// what a slot makes of a code: value = scale * (code / 2^(8 - BASE) - shift), with the bits below its depth put to zero
struct Reading {
    u32 mask;    // of the bits of four codes
    float less;  // half a cell, which is less to be taken off
};

DEVICE Reading reading_of(int depth) {
    int end = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (DEPTH[i] <= depth) end = END[i];
    return {(255u << (8 - end) & 255u) * 0x01010101u, 0.5f - (float)(1 << BASE) / (float)(2 << end)};
}

// rows 16 m + 8 u and the 32 columns f of a tile: eight neighbours of a row from each lane
template <int m, int u, int f>
DEVICE void write(const Params &p, const u32 *words, const Reading *readings, int row_tile, int column_tile, int lane) {
    const int first = column_tile * 64 + f * 32, column = first + lane % 4 * 8, row = row_tile * 32 + m * 16 + u * 8 + lane / 4;
    if (column >= p.columns || row >= p.rows) return;
    const u64 at = ((u64)row_tile * p.groups + first / GROUP) * 8 + lane / 4;
    const Two scales = fetch_two(p.scale + at * 8, true);
    const float scale = from_fp16((u16)((m ? scales.y : scales.x) >> (16 * u)));
    const float zero = (float)(fetch_one(p.zero + at * 4, true) >> (8 * (2 * m + u)) & 255) * (1.0f / (1 << (8 - BASE)));
    const u32 both[2] = {fragment<0, 0, PIECES, m, f, u>(words), fragment<0, 0, PIECES, m, f, u + 2>(words)};
    for (int slot = 0; slot < p.slots; slot++) {
        if (p.counts && !p.counts[slot]) continue;
        const Reading how = readings[slot];
        // level - z = code - (zi + 1/2 - half a cell), all in base steps: both sides are exact, the product with the scale rounds
        const float shift = zero + how.less;
        u32 pairs[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const u32 codes = both[n / 2] & how.mask;
            const float low = whole_byte(codes, n % 2 * 2) * (1.0f / (1 << (8 - BASE))) - shift;
            const float high = whole_byte(codes, n % 2 * 2 + 1) * (1.0f / (1 << (8 - BASE))) - shift;
            pairs[n] = narrow_two(low * scale, high * scale);
        }
        *(Four *)(p.out + ((u64)slot * p.rows + row) * p.columns + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}

template <int m, int f> DEVICE void write_half(const Params &p, const u32 *words, const Reading *readings, int row_tile, int column_tile, int lane) {
    write<m, 0, f>(p, words, readings, row_tile, column_tile, lane);
    write<m, 1, f>(p, words, readings, row_tile, column_tile, lane);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) spread(const __grid_constant__ Params p) {
    SHARED_BYTES(memory);
    Reading *readings = (Reading *)memory;
    const int lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + threadIdx.x / 32;
    const int row_tile = tile / p.column_tiles, column_tile = tile % p.column_tiles, row_tiles = (p.rows + 31) / 32;
    for (int slot = threadIdx.x; slot < p.slots; slot += WARPS * 32) readings[slot] = reading_of(p.depth[slot]);
    __syncthreads();
    if (row_tile >= row_tiles) return;
    int deepest = 0;
    for (int s = 0; s < p.slots; s++)
        if ((!p.counts || p.counts[s]) && p.depth[s] > deepest) deepest = p.depth[s];
    u32 words[WORDS];
    fetch_words<0, PIECES>(words, p.pieces, (u64)tile * 32 + lane, deepest);
    write_half<0, 0>(p, words, readings, row_tile, column_tile, lane);
    write_half<0, 1>(p, words, readings, row_tile, column_tile, lane);
    write_half<1, 0>(p, words, readings, row_tile, column_tile, lane);
    write_half<1, 1>(p, words, readings, row_tile, column_tile, lane);
}
