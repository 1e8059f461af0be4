// What a block of `many.cu` is given and works on, and the warp that brings it x, codes, scales and zero points.
//
// A stage is two steps of 64 columns: x of both, then of each piece and row tile two column tiles as they lie in memory, then scales
// and zero points of each row tile. Each is one copy by the bulk engine, and all report to one barrier.

#pragma once

constexpr int ROWS = 128, ROW_TILES = ROWS / 32, WARPS = 8, THREADS = 32 * WARPS + 32;
constexpr int GROUPS = 128 / GROUP;                                 // of a stage
constexpr int X_BYTES = TOKENS * 128, STAGE_BYTES = 2 * X_BYTES;    // x of a step and of a stage
constexpr int ALL_CODES = END[PIECES - 1] * ROW_TILES * 512;        // bytes of the codes of a stage
constexpr int CODES_BYTES = ALL_CODES + ROW_TILES * GROUPS * (SCALES + ZEROS);

// in a stage
DEVICE constexpr int place_of_codes(int piece, int row_tile) { return ((END[piece] - WIDTH[piece]) * ROW_TILES + WIDTH[piece] * row_tile) * 512; }
DEVICE constexpr int place_of_scales(int row_tile) { return ALL_CODES + row_tile * (GROUPS * SCALES); }
DEVICE constexpr int place_of_zeros(int row_tile) { return ALL_CODES + ROW_TILES * GROUPS * SCALES + row_tile * (GROUPS * ZEROS); }

struct Params {
    Runs runs;
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale, *zero;    // fp16, uint8 [row tiles][groups][8][4]
    const u8 *x;               // of `arrange.cu` [tiles, steps, TOKENS * 128]
    u16 *out;                  // [tokens, rows]
    int rows, column_tiles, groups, steps;
    int share, split, stages;  // blocks that share x and that share out the columns: a cluster; stages that shared memory holds
};

// a stage on its way: `full` once it has arrived, `empty` once all warps of products have used it
struct Block {
    u8 *x, *codes;
    Barrier *full, *empty;
    int stages, share, first_of_share;  // and the rank in the cluster of the first block that shares x with this one
    int tile, row_tile, beside, part;   // beside: place among those that share x; part: of the columns
    int first, turns;                   // stages of its columns
};

DEVICE Block block_of(const Params &p, u8 *bytes) {
    const int size = p.share * p.split, rank = rank_in_cluster(), cluster = blockIdx.x / size, turns = p.steps / 2;
    Block b;
    b.x = aligned_1024(bytes), b.codes = b.x + p.stages * STAGE_BYTES;
    b.full = (Barrier *)(b.codes + p.stages * CODES_BYTES), b.empty = b.full + p.stages;
    b.stages = p.stages, b.share = p.share, b.beside = rank % p.share, b.part = rank / p.share;
    b.first_of_share = b.part * p.share;
    // tiles of the same rows run side by side
    b.tile = cluster % p.runs.tiles, b.row_tile = (cluster / p.runs.tiles * p.share + b.beside) * ROW_TILES;
    b.first = turns * b.part / p.split, b.turns = turns * (b.part + 1) / p.split - b.first;
    return b;
}

// stage after stage: the place of one, and how often (its lowest bit) all were gone through before
struct Turn {
    int at = 0, round = 0;
};
DEVICE void go_on(Turn &turn, int stages) {
    if (++turn.at == stages) turn.at = 0, turn.round ^= 1;
}
DEVICE int place_before(const Turn &turn, int stages) { return (turn.at ? turn.at : stages) - 1; }

// one of the copies of each stage: where it begins and ends, and its bytes (0: there is none)
struct Copy {
    const u8 *from;
    int to, bytes;
};

// number `number` of a block's copies at a depth; row tiles beyond the last have none
DEVICE Copy copy_of(const Params &p, const Block &b, int depth, int number) {
    const int kind = number / ROW_TILES, own = number % ROW_TILES;
    const u64 row_tile = b.row_tile + own;
    int count = 0;
    Copy copy = {nullptr, 0, 0};
    if (row_tile * 32 >= p.rows) return copy;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        if (DEPTH[piece] > depth) continue;
        if (kind == piece) copy = {p.pieces[piece] + row_tile * p.column_tiles * (256 * WIDTH[piece]), place_of_codes(piece, own), 512 * WIDTH[piece]};
        count++;
    }
    if (kind == count) copy = {p.scale + row_tile * p.groups * SCALES, place_of_scales(own), GROUPS * SCALES};
    if (kind == count + 1) copy = {p.zero + row_tile * p.groups * ZEROS, place_of_zeros(own), GROUPS * ZEROS};
    copy.from += (u64)b.first * copy.bytes;
    return copy;
}

// the copies of a lane, and the bytes of all of a stage
struct Copies {
    static constexpr int OWN = (ROW_TILES * (PIECES + 2) + 31) / 32;
    Copy own[OWN];
    int bytes;
};

DEVICE Copies copies_of(const Params &p, const Block &b, int depth, int lane) {
    Copies copies;
    int bits = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
        if (DEPTH[piece] <= depth) bits = END[piece];
    const int left = (p.rows + 31) / 32 - b.row_tile, tiles = left < 0 ? 0 : left < ROW_TILES ? left : ROW_TILES;
    copies.bytes = STAGE_BYTES + tiles * (bits * 512 + GROUPS * (SCALES + ZEROS));
#pragma unroll
    for (int i = 0; i < Copies::OWN; i++) copies.own[i] = copy_of(p, b, depth, i * 32 + lane);
    return copies;
}

// announce a stage and bring all of it but x; called in order
DEVICE void bring_codes(const Params &p, const Block &b, Copies &copies, int turn, int at, int lane) {
    // a last step without codes gets those of the step before, which are numbers, for x that is zero
    const bool alone = 2 * (b.first + turn) + 1 == p.column_tiles;
    if (lane == 0) announce(b.full + at, copies.bytes);
    warp_sync();
#pragma unroll
    for (int i = 0; i < Copies::OWN; i++) {
        Copy &copy = copies.own[i];
        u8 *to = b.codes + at * CODES_BYTES + copy.to;
        if (alone && copy.to < ALL_CODES) {
            if (copy.bytes) copy_tile(to, copy.from, copy.bytes / 2, b.full + at), copy_tile(to + copy.bytes / 2, copy.from, copy.bytes / 2, b.full + at);
        } else if (copy.bytes) copy_tile(to, copy.from, copy.bytes, b.full + at);
        copy.from += copy.bytes;
    }
}

// x of a stage: of blocks that share it each brings one step to both
DEVICE void bring_x(const Params &p, const Block &b, int turn, int at) {
    const u8 *from = p.x + ((u64)b.tile * p.steps + 2 * (b.first + turn)) * X_BYTES;
    u8 *to = b.x + at * STAGE_BYTES;
    if (p.share == 1) copy_tile(to, from, STAGE_BYTES, b.full + at);
    else copy_to_all(to + b.beside * X_BYTES, from + b.beside * X_BYTES, X_BYTES, b.full + at, (u16)(3 << b.first_of_share));
}

// All of a block's stages, by one warp; what the tile holds. Where the depth is known, codes of the first stages, which no launch
// changes, are asked for before the launch before has ended.
DEVICE Run bring(const Params &p, const Block &b, int lane) {
    Copies copies;
    int begun = 0;
    if (!p.runs.counts) {
        copies = copies_of(p, b, p.runs.depth, lane);
        for (; begun < b.stages && begun < b.turns; begun++) bring_codes(p, b, copies, begun, begun, lane);
    }
    wait_for_last();
    const Run run = run_of(p.runs, b.tile);
    if (p.runs.counts) copies = copies_of(p, b, run.depth, lane);
    Turn turn;
    for (int i = 0; run.depth && i < b.turns; i++) {
        if (i >= b.stages) wait_for_phase(b.empty + turn.at, turn.round ^ 1);
        if (i >= begun) bring_codes(p, b, copies, i, turn.at, lane);
        if (lane == 0) bring_x(p, b, i, turn.at);
        go_on(turn, b.stages);
    }
    warp_sync();
    return run;
}
