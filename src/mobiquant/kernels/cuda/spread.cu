// Weights written out at some of their depths, [slots, rows, columns] in fp16 or bf16, for dense products of many tokens.
//
// Slot s holds the weight at depth `depth[s]`; a slot for which `counts[s]` (on the device) is zero is not written, and slices that
// no slot needs are not read. A warp takes one tile of 32 rows and 64 columns; a lane writes 16 bytes, eight neighbours of a row,
// at a time. The value is that of `slices.dequantize`: one rounding to fp32, one to the dtype of the activations.
//
// Set by the compiler's command line: BF16, GROUP, BASE, PIECES, WIDTHS, DEPTHS, ENDS as for `few.cu`.

#ifdef EMULATED
#include "simt.h"
#else
#include "device.h"
#endif

constexpr int WIDTH[] = {WIDTHS}, DEPTH[] = {DEPTHS}, END[] = {ENDS}, SLOTS = 8, WARPS = 8;

struct Params {
    const u8 *pieces[PIECES];
    const u8 *scale, *zero;
    u16 *out;
    const int *counts;  // [slots], or null where all are wanted
    int depth[SLOTS];
    int slots, rows, columns, column_tiles, groups;
};

// where the words of each piece begin
struct Offsets {
    int at[PIECES + 1];
    constexpr Offsets() : at() {
        for (int i = 0; i < PIECES; i++) at[i + 1] = at[i] + 2 * WIDTH[i];
    }
};
constexpr Offsets OFFSETS;
constexpr int WORDS = Offsets().at[PIECES];

DEVICE u32 narrow_two(float low, float high) { return BF16 ? two_bf16(low, high) : two_fp16(low, high); }

// the 32 columns f of a tile
template <int f>
DEVICE void write(const Params &p, const u32 (&words)[WORDS], int row_tile, int column_tile, int lane) {
    const int first = column_tile * 64 + f * 32, column = first + lane % 4 * 8;
    if (column >= p.columns) return;
    const u64 at = ((u64)row_tile * p.groups + first / GROUP) * 8 + lane / 4;
    const Two scales = fetch_two(p.scale + at * 8, true);
    const u32 zeros = fetch_one(p.zero + at * 4, true);
#pragma unroll
    for (int mu = 0; mu < 4; mu++) {
        const int m = mu / 2, u = mu % 2, row = row_tile * 32 + m * 16 + u * 8 + lane / 4;
        const float scale = from_fp16((u16)((m ? scales.y : scales.x) >> (16 * u)));
        const float zero = (float)(zeros >> (8 * mu) & 255) * (1.0f / (1 << (8 - BASE)));
        u32 codes[8];  // of eight neighbours, in the upper bits of a byte
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int a = u + n / 4 * 2;
            codes[n] = 0;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                const int width = WIDTH[piece], field = width == 2 ? a : 4 * f + a;
                const u32 word = words[OFFSETS.at[piece] + (width == 2 ? 2 * m + f : m)];
                codes[n] |= (word >> (8 * (n % 4) + 8 - width * (field + 1)) & ((1 << width) - 1)) << (8 - END[piece]);
            }
        }
        for (int slot = 0; slot < p.slots; slot++) {
            if (p.counts && !p.counts[slot]) continue;
            int end = 0;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                if (DEPTH[piece] <= p.depth[slot]) end = END[piece];
            // level - z = code * cell - (zi + 1/2 - cell / 2): both sides are exact, the product with the scale rounds
            const float cell = 1.0f / (1 << end) * (1 << BASE), shift = zero + (0.5f - cell / 2);
            u32 pairs[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float low = (float)(codes[2 * n] >> (8 - end)) * cell - shift;
                const float high = (float)(codes[2 * n + 1] >> (8 - end)) * cell - shift;
                pairs[n] = narrow_two(low * scale, high * scale);
            }
            if (row < p.rows) *(Four *)(p.out + ((u64)slot * p.rows + row) * p.columns + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) spread(const __grid_constant__ Params p) {
    const int lane = threadIdx.x % 32, tile = blockIdx.x * WARPS + threadIdx.x / 32;
    const int row_tile = tile / p.column_tiles, column_tile = tile % p.column_tiles, row_tiles = (p.rows + 31) / 32;
    if (row_tile >= row_tiles) return;
    int deepest = 0;
    for (int s = 0; s < p.slots; s++)
        if ((!p.counts || p.counts[s]) && p.depth[s] > deepest) deepest = p.depth[s];
    u32 words[WORDS];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        u32 *to = words + OFFSETS.at[i];
        const u8 *from = p.pieces[i] + ((u64)tile * 32 + lane) * (8 * WIDTH[i]);
        if (WIDTH[i] == 2) {
            const Four got = fetch_four(from, DEPTH[i] <= deepest);
            to[0] = got.x, to[1] = got.y, to[2] = got.z, to[3] = got.w;
        } else {
            const Two got = fetch_two(from, DEPTH[i] <= deepest);
            to[0] = got.x, to[1] = got.y;
        }
    }
    write<0>(p, words, row_tile, column_tile, lane);
    write<1>(p, words, row_tile, column_tile, lane);
}
