// Many tokens by the weights of up to four layers that read the same input, on Hopper: weights are made in registers on their way to
// the tensor cores.
//
// What: y_t = x_t read(q, depth_t)^T. The value of a weight is that of `slices.dequantize`: one rounding to fp32, one to the dtype
// of the activations.
//
// How. A block takes a tile of up to TOKENS tokens of one depth by 128 rows: two groups of four warps by 64 rows each. Weights are
// the registers of the products, x is their matrix in shared memory. More warps bring x as `arrange.cu` has laid it out, and
// codes, scales and zero points, in stages of two steps of 64 columns. While the products of a step run, the codes of the next are
// turned into weights.
//
// Weights that read the same x are one launch. Blocks of a cluster have the same tokens and rows, and each a part of the columns: their
// sums are added up at the end, always in the same order.
//
// Set by the compiler's command line: BF16, GROUP, BASE, PIECES, WIDTHS, DEPTHS, ENDS as for `few.cu`, and TOKENS, 64, 128 or 256.

#include "warpgroup.h"
#include "pieces.h"
#include "runs.h"
#include "bring.h"

constexpr int OUT_STRIDE = ROWS * 2 + 16, SUMS_STRIDE = ROWS + 4;  // of a token: results in bytes, sums of one part in numbers

// what a warp of products works on: half m of a row tile of the block
struct Own {
    int row_tile, m, lane;
};

// ---- weights

// whether a piece of one bit is taken together with the next, which has one bit too
constexpr bool is_joined(int piece, int last) {
    int before = 0;
    while (before < piece && WIDTH[piece - 1 - before] == 1) before++;
    return WIDTH[piece] == 1 && before % 2 == 0 && piece + 1 < last && WIDTH[piece + 1] == 1;
}

// The words of a lane of step `step` of a stage, in the places that those of half 0 of a tile have. Two pieces of one bit become
// fields of two bits, which takes half the work for each code: of u = 0 in one word, of u = 1 in the other.
template <int last, int piece = 0> DEVICE void take_words(u32 *words, const u8 *codes, const Own &own, int step) {
    if constexpr (piece < last) {
        constexpr int width = WIDTH[piece];
        u32 *to = words + words_before(piece);
        const u8 *from = codes + place_of_codes(piece, own.row_tile) + (step * 64 + own.lane * 2 + own.m) * (4 * width);
        if constexpr (width == 2) {
            const Two got = *(const Two *)from;
            to[0] = got.x, to[1] = got.y;
        } else to[0] = *(const u32 *)from;
        take_words<last, piece + 1>(words, codes, own, step);
        if constexpr (is_joined(piece, last)) {
            const u32 upper = to[0], lower = to[2];
            to[0] = (upper & 0xaaaaaaaau) | (lower >> 1 & 0x55555555u);
            to[1] = (upper << 1 & 0xaaaaaaaau) | (lower & 0x55555555u);
        }
    }
}

// as `fragment`, of these words, in codes of `less` bits less than eight
template <int last, int f, int a, int less, int piece = 0> DEVICE u32 codes_of(const u32 *words) {
    const u32 *own = words + words_before(piece);
    constexpr bool joined = is_joined(piece, last);
    u32 found;
    if constexpr (WIDTH[piece] == 2) found = codes<2, END[piece], a, less>(own[f]);
    else if constexpr (joined) found = codes<2, END[piece] + 1, 2 * f + a / 2, less>(own[a % 2]);
    else found = codes<1, END[piece], 4 * f + a, less>(own[0]);
    constexpr int next = piece + 1 + joined;
    if constexpr (next < last) found |= codes_of<last, f, a, less, next>(words);
    return found;
}

// what makes weights of the codes of a row
struct Row {
    float scale, less, half;
};

template <int last> constexpr bool whole_bytes = END[last - 1] == 8;

// All is exact but for the rounding to the dtype. Codes below 128 are raised by 128, so that `less` has 21 bits at most; one of
// eight bits is put in the middle of a larger number first, and `half` is the half code to the middle of its cell.
template <int last> DEVICE float value(u32 word, int byte, const Row &row) {
    if constexpr (whole_bytes<last>) return multiply_add(raised_byte(word, byte) - row.less, row.scale, row.half);
    else return multiply_add(raised_seven(word, byte), row.scale, row.less);
}

// the two rows of a lane, of group `group` of a stage
template <int last> DEVICE void rows_of(Row (&rows)[2], const u8 *codes, const Own &own, int group) {
    constexpr int end = END[last - 1];
    // in codes of eight bits: half a base step, less half a cell; at eight bits the half code is taken off later
    constexpr int less = (1 << (7 - BASE)) - (end == 8 ? 1 : 1 << (7 - end));
    const u32 scales = *(const u32 *)(codes + place_of_scales(own.row_tile) + group * SCALES + own.lane / 4 * 8 + own.m * 4);
    const u32 zeros = *(const u32 *)(codes + place_of_zeros(own.row_tile) + group * ZEROS + own.lane / 4 * 4) >> (16 * own.m);
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const float scale = from_fp16((u16)(scales >> (16 * u))), zero = (float)((zeros >> (8 * u) & 255) + less);
        if constexpr (whole_bytes<last>) {
            rows[u].scale = scale * (1.0f / (1 << (8 - BASE)));
            rows[u].less = 8388608.0f + zero, rows[u].half = -0.5f * rows[u].scale;
        } else {
            rows[u].scale = scale * (1.0f / (1 << (7 - BASE)));
            rows[u].less = -(128.0f + 0.5f * zero) * rows[u].scale;
        }
    }
}

// the weights of 16 columns: eights' half h of the 32 columns f
template <int last, int f, int h> DEVICE void make_sixteen(u32 (&a)[4], const u32 *words, const Row (&rows)[2]) {
    constexpr int less = whole_bytes<last> ? 0 : 1;
    const u32 both[2] = {codes_of<last, f, 2 * h, less>(words), codes_of<last, f, 2 * h + 1, less>(words)};
#pragma unroll
    for (int u = 0; u < 2; u++) {
        a[u] = narrow_two(value<last>(both[u], 0, rows[u]), value<last>(both[u], 1, rows[u]));
        a[2 + u] = narrow_two(value<last>(both[u], 2, rows[u]), value<last>(both[u], 3, rows[u]));
    }
}

typedef u32 Weights[4][4];  // of 64 columns, in steps of 16

// of step `step` of a stage; `rows` are those of the step before, and stay so where the group does
template <int last, int step> DEVICE void make_weights(Weights &weights, Row (&rows)[2], const u32 *words, const u8 *codes, const Own &own) {
    if (step * 64 % GROUP == 0) rows_of<last>(rows, codes, own, step * 64 / GROUP);
    make_sixteen<last, 0, 0>(weights[0], words, rows);
    make_sixteen<last, 0, 1>(weights[1], words, rows);
    if (GROUP == 32) rows_of<last>(rows, codes, own, step * 2 + 1);
    make_sixteen<last, 1, 0>(weights[2], words, rows);
    make_sixteen<last, 1, 1>(weights[3], words, rows);
}

// ---- products

// rows lane / 4 and 8 more of the warp, tokens 8 n + lane % 4 * 2 and the next: at 4 n
template <int tokens> using SumsOf = float[tokens / 2];
typedef SumsOf<TOKENS> Sums;

// begin the products of a step, and wait for those of the step before
template <int tokens> DEVICE void multiply_step(SumsOf<tokens> &sums, const Weights &weights, View x, int beyond) {
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; i++) multiply_tokens(sums, weights[i], view_beyond(x, beyond, i));
    products_end();
    wait_for_products<1>();
}

template <int last, int tokens> DEVICE void multiply(SumsOf<tokens> &sums, const Block &b, const Own &own) {
    Weights even, odd;
    Row rows[2];
    Turn turn;
    const View first = view_of(b.x);
#pragma unroll 1
    for (int left = b.turns; left; left--) {
        const u8 *codes = b.codes + turn.at * CODES_BYTES;
        const View x = view_beyond(first, turn.at * STAGE_BYTES, 0);
        u32 words[2][words_before(last)];
        wait_for_phase(b.full + turn.at, turn.round);
        take_words<last>(words[0], codes, own, 0);
        take_words<last>(words[1], codes, own, 1);
        make_weights<last, 0>(even, rows, words[0], codes, own);
        multiply_step<tokens>(sums, even, x, 0);
        // the products of the stage before are done
        if (left < b.turns && own.lane == 0) come(b.empty + place_before(turn, b.stages));
        make_weights<last, 1>(odd, rows, words[1], codes, own);
        multiply_step<tokens>(sums, odd, x, X_BYTES);
        go_on(turn, b.stages);
    }
    wait_for_products<0>();
}

// ---- results

// eight rows of a token
DEVICE void store_eight(const Params &p, const Member &m, const Run &run, int token, int row, const Four &eight) {
    u16 *to = m.out + (u64)token_of(p.runs, run.first + token) * m.rows + row;
    if (m.rows % 8 == 0) {
        if (row < m.rows) *(Four *)to = eight;
    } else {
        const u32 twos[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (row + k < m.rows) to[k] = (u16)(twos[k / 2] >> (16 * (k % 2)));
    }
}

// results by way of shared memory, so that rows are written side by side
DEVICE void store_out(const Params &p, const Run &run, const Block &b, const Sums &sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
        const float *own = sums + 4 * n;
        u8 *to = b.x + ((n + lane / 16) * 8 + lane % 8) * OUT_STRIDE + (warp * 16 + lane / 8 % 2 * 8) * 2;
        store_turned(to, narrow_two(own[0], own[1]), narrow_two(own[2], own[3]), narrow_two(own[4], own[5]), narrow_two(own[6], own[7]));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < run.count * (ROWS / 8); i += 32 * WARPS) {
        const int token = i / (ROWS / 8), eight = i % (ROWS / 8);
        store_eight(p, *b.member, run, token, b.row_tile * 32 + eight * 8, *(const Four *)(b.x + token * OUT_STRIDE + eight * 16));
    }
}

// the sums of all parts of the columns, each block some of the results
DEVICE void store_parts(const Params &p, const Run &run, const Block &b, const Sums &sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *own = (float *)b.x;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = n * 8 + lane % 4 * 2 + i % 2, row = warp * 16 + i / 2 * 8 + lane / 4;
            own[token * SUMS_STRIDE + row] = sums[4 * n + i];
        }
    come_to_cluster(), wait_for_cluster();
    for (int i = b.part * 32 * WARPS + threadIdx.x; i < run.count * (ROWS / 8); i += p.split * 32 * WARPS) {
        const int token = i / (ROWS / 8), eight = i % (ROWS / 8);
        FourFloats low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
        for (int part = 0; part < p.split; part++) {
            const float *at = own + token * SUMS_STRIDE + eight * 8;
            const FourFloats a = load_from(at, part), c = load_from(at + 4, part);
            low.x += a.x, low.y += a.y, low.z += a.z, low.w += a.w;
            high.x += c.x, high.y += c.y, high.z += c.z, high.w += c.w;
        }
        const Four made = {narrow_two(low.x, low.y), narrow_two(low.z, low.w), narrow_two(high.x, high.y), narrow_two(high.z, high.w)};
        store_eight(p, *b.member, run, token, b.row_tile * 32 + eight * 8, made);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) many(const __grid_constant__ Params p) {
    SHARED_BYTES(bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Block b = block_of(p, bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < b.stages; i++) set_up(b.full + i, ROW_TILES), set_up(b.empty + i, WARPS);
        show_barriers();
    }
    __syncthreads();
    let_next_begin();
    // each kind of warps in a branch of its own to the end: products of many tokens take registers that others leave
    if (warp >= WARPS) {
        if (TOKENS > 128) leave_registers<40>();
        const Run run = bring(p, b, warp - WARPS, lane);
        // all blocks of the cluster have this tile
        if (!run.depth) return;
        __syncthreads();
        if (p.split > 1) come_to_cluster(), wait_for_cluster(), come_with_reads();
        else __syncthreads();
    } else {
        if (TOKENS > 128) take_registers<232>();
        wait_for_last();
        const Run run = run_of(p.runs, b.tile);
        if (!run.depth) return;
        Sums sums = {};
        const Own own = {warp / 2, warp % 2, lane};
        // tiles that are not half full, as the last one and some of mixed depths are, take half the products
        constexpr int half = TOKENS > 64 ? TOKENS / 2 : TOKENS;
        if (run.count > half || TOKENS == 64) at_depth<0>(run.depth, [&](auto last) { multiply<last.number, TOKENS>(sums, b, own); });
        else at_depth<0>(run.depth, [&](auto last) { multiply<last.number, half>(*(SumsOf<half> *)&sums, b, own); });
        // x has been read: results take its place
        __syncthreads();
        if (p.split > 1) {
            store_parts(p, run, b, sums);
            // what was read of others has come: results are made of it
            come_with_reads();
        } else store_out(p, run, b, sums);
    }
    // who has left cannot be read
    if (p.split > 1) wait_for_cluster();
}
