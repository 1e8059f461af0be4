// What a launch of `few.cu` is given, and how its shared memory is shared out. Set by the compiler's command line as said there.

#pragma once

constexpr int TOKENS = 4 * NT, MEMBERS = 4, ROUTERS = 8, MOST_HIDDEN = 128, HIDDEN_TILE = 32;
constexpr int THREADS = WARPS * 32, STRIDE = 33;
// x is there for whole groups of the widest kind: two tiles
constexpr int PANEL = 128;
// bytes from one column of x to the next: 64 more than the columns, so that two columns lie in different banks
constexpr int BESIDE = 64;
constexpr float STEPS = 32512;
// bytes of a warp's tiles on their way
#ifndef RING
#define RING 4608
#endif
// sums of the warps: two that take turns, or one and a barrier more for each 32 rows
#ifndef BUFFERS
#define BUFFERS 2
#endif
// whether x may be made here: what never does is shorter
#ifndef MAKES
#define MAKES 0
#endif
// turns of a block whose base slice is asked for before the router has decided
constexpr int FIRST_ROWS = 4;

struct Member {
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale;           // fp16 [row tiles][groups][8][4]
    const u8 *zero;            // uint8, the same order
    const float *bias;         // [rows] or null
    u16 *out;                  // [tokens, rows]
    int rows, end;             // end: row tiles up to and with this member
};

struct Router {
    const u16 *weight_scale;      // fp16 [hidden]
    const float *rms, *bias;      // [hidden]
    const float *out, *out_bias;  // [scores, hidden], [scores]
    const u8 *weight;             // int8 [hidden tiles][column tiles][4][32 lanes][16]
    Two *partial;                 // a float and the number of its launch [parts][hidden + 1][TOKENS]
    int *depth;                   // [tokens]: what it has decided
};

// Routers that read the input of this launch, all with as many hidden units. Without `given` the first decides for this launch;
// the others decide for later ones.
struct Routers {
    Router each[ROUTERS];
    u32 *state;                   // launches so far; blocks of this one that know their number, zero between launches
    int count, hidden, scores;
};

// what x is made of, for one token: itself, a norm of the sum with another vector, or silu of it times another (`stage.h`)
constexpr int PLAIN = 0, NORM = 1, GATE = 2;

struct Params {
    Member members[MEMBERS];
    Routers routers;
    const int *given;      // [tokens]: depths that an earlier launch has decided, or null
    const u16 *x;          // [tokens, columns]
    const u16 *more;       // [columns]: what is added to x before a norm, or null, or what silu of x is multiplied with
    const u16 *by;         // [columns]: weight of the norm
    u16 *sum;              // [columns]: x and `more` added, not where x is; null where there is nothing to add
    u8 *staged;            // x in bytes as in shared memory, made by `bytes.cu`; null where each block makes its own
    const float *tau;      // [entries]
    const long long *cap;  // [entries]
    double *read;          // [entries, depths]: weights read at each depth
    double weights;        // of all members
    int tokens, columns, column_tiles, row_tiles, groups, entries, depths;
    int parts;           // blocks that share out the columns for a router
    int deciders, busy;  // the block that decides for the first router, others follow; blocks that score or decide, from the first on
    int before, per;     // tokens of other launches before these, and tokens of an entry
    int input;           // PLAIN, NORM or GATE
    float epsilon;       // of the norm
};

// which member a row tile is of; the row tile becomes that of the member
DEVICE const Member &member_of(const Params &p, int &row_tile) {
    int i = 0;
    while (row_tile >= p.members[i].end) i++;
    if (i) row_tile -= p.members[i - 1].end;
    return p.members[i];
}

constexpr int ENTRIES = 16;

// the entry of thresholds and caps that is a token's
DEVICE int entry_of(const Params &p, int token) { return p.entries == 1 ? 0 : (p.before + token) / p.per; }

// ---- shared memory: tiles on their way to each warp, x in bytes, scale and sum of x of each group, sums of the warps, mostly twice,
// depths of the tokens, thresholds and caps, and of the router all but its first matrix

// thresholds and caps of all entries, depths of tokens, the number of the launch, and blocks that knew it before this one
struct Wanted {
    float tau[ENTRIES];
    int cap[ENTRIES], depth[ENTRIES];
    u32 number, before, unused[2];
};

struct Shared {
    u8 *ring, *x;
    Pair *groups;
    float *sums;
    int *depth;
    Wanted *wanted;  // as they were before the launch before had ended, and as they are
    float *rms, *bias, *weight_scale, *out, *out_bias;
};

DEVICE int panels_of(const Params &p) { return (p.column_tiles + 1) / 2; }
DEVICE int x_stride(const Params &p) { return panels_of(p) * PANEL + BESIDE; }
// x in bytes with scale and sum of each group
DEVICE int staged_bytes(const Params &p) { return 2 * p.tokens * x_stride(p) + panels_of(p) * (PANEL / GROUP) * TOKENS * (int)sizeof(Pair); }

constexpr int SUMS = WARPS * TOKENS * STRIDE;

DEVICE Shared carve(u8 *memory, const Params &p) {
    Shared s;
    s.ring = memory;
    s.x = memory + WARPS * RING;
    s.groups = (Pair *)(s.x + 2 * p.tokens * x_stride(p));
    s.sums = (float *)(s.groups + panels_of(p) * (PANEL / GROUP) * TOKENS);
    s.depth = (int *)(s.sums + BUFFERS * SUMS);
    s.wanted = (Wanted *)(s.depth + TOKENS);
    s.rms = (float *)(s.wanted + 2);
    const int hidden = p.routers.hidden;
    s.bias = s.rms + hidden, s.weight_scale = s.bias + hidden;
    s.out = s.weight_scale + hidden, s.out_bias = s.out + hidden * p.routers.scores;
    return s;
}
