// What a launch of `few.cu` is given, and how its shared memory is shared out. Set by the compiler's command line as said there.

#pragma once

constexpr int TOKENS = 4 * NT, MEMBERS = 4, MOST_HIDDEN = 128, HIDDEN_TILE = 32;
// columns of x that share a scale: those of a tile, or of a group where that is smaller
constexpr int UNIT = GROUP < 64 ? GROUP : 64, HALVES = 64 / UNIT, THREADS = WARPS * 32, STRIDE = 33;
// bytes from one column of x to the next: 64 more than the columns, so that two columns lie in different banks
constexpr int BESIDE = 64;
constexpr float STEPS = 32512;
// turns of a block whose base slice is asked for before the router has decided
constexpr int FIRST_ROWS = 4;
#ifndef PREFETCH
#define PREFETCH 1
#endif

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
    int *depth;                   // [TOKENS], for who wants to know
    u32 *state;                   // arrived, left: zero between launches
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

// ---- shared memory: x in bytes, scale and sum of x of each unit, sums of the warps, twice, depths of the tokens, and of the
// router all but its first matrix

struct Shared {
    u8 *x;
    Pair *units;
    float *sums;
    int *depth;
    float *rms, *bias, *weight_scale, *out, *out_bias;
};

DEVICE int x_stride(const Params &p) { return p.column_tiles * 64 + BESIDE; }

constexpr int SUMS = WARPS * TOKENS * STRIDE;

DEVICE Shared carve(u8 *memory, const Params &p) {
    Shared s;
    s.x = memory;
    s.units = (Pair *)(memory + 2 * p.tokens * x_stride(p));
    s.sums = (float *)(s.units + p.column_tiles * HALVES * TOKENS);
    s.depth = (int *)(s.sums + 2 * SUMS);
    s.rms = (float *)(s.depth + TOKENS);
    s.bias = s.rms + p.router.hidden, s.weight_scale = s.bias + p.router.hidden;
    s.out = s.weight_scale + p.router.hidden, s.out_bias = s.out + p.router.hidden * p.router.scores;
    return s;
}
