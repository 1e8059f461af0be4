// What a block of `many.cu` is given and works on, and the warps that bring it x, codes, scales and zero points.
//
// A stage is two steps of 64 columns: x of both, then of each piece and row tile two column tiles as they lie in memory, then scales
// and zero points of each row tile. Each is one copy by the bulk engine, and all report to one barrier. A warp brings one row tile,
// each copy from a lane of its own: lanes send one after the other, and one warp would take as long for all as the products do.

#pragma once

constexpr int ROWS = 128, ROW_TILES = ROWS / 32, WARPS = 8, THREADS = 32 * (WARPS + ROW_TILES);
constexpr int GROUPS = 128 / GROUP;                                 // of a stage
constexpr int X_BYTES = TOKENS * 128, STAGE_BYTES = 2 * X_BYTES;    // x of a step and of a stage
constexpr int ALL_CODES = END[PIECES - 1] * ROW_TILES * 512;        // bytes of the codes of a stage
constexpr int CODES_BYTES = ALL_CODES + ROW_TILES * GROUPS * (SCALES + ZEROS);

// in a stage
DEVICE constexpr int place_of_codes(int piece, int row_tile) { return ((END[piece] - WIDTH[piece]) * ROW_TILES + WIDTH[piece] * row_tile) * 512; }
DEVICE constexpr int place_of_scales(int row_tile) { return ALL_CODES + row_tile * (GROUPS * SCALES); }
DEVICE constexpr int place_of_zeros(int row_tile) { return ALL_CODES + ROW_TILES * GROUPS * SCALES + row_tile * (GROUPS * ZEROS); }

constexpr int MEMBERS = 4;

// a weight of those that read the same x
struct Member {
    const u8 *pieces[PIECES];  // [row tiles][column tiles][32 lanes][8 bytes * width]
    const u8 *scale, *zero;    // fp16, uint8 [row tiles][groups][8][4]
    u16 *out;                  // [tokens, rows]
    int rows, end;             // end: blocks of 128 rows up to and with this member
};

struct Params {
    Runs runs;
    Member members[MEMBERS];
    const u8 *x;  // of `arrange.cu` [tiles, steps, TOKENS * 128]
    int column_tiles, groups, steps;
    int first_block;    // of 128 rows: those of this launch
    int split, stages;  // blocks that share out the columns, a cluster; stages that shared memory holds
};

// a stage on its way: `full` once it has arrived, `empty` once all warps of products have used it
struct Block {
    u8 *x, *codes;
    Barrier *full, *empty;
    const Member *member;
    int stages, tile, row_tile, part;  // row_tile: of the member; part: of the columns
    int first, turns;                  // stages of its columns
};

DEVICE Block block_of(const Params &p, u8 *bytes) {
    const int cluster = blockIdx.x / p.split, turns = p.steps / 2;
    Block b;
    b.x = aligned_1024(bytes), b.codes = b.x + p.stages * STAGE_BYTES;
    b.full = (Barrier *)(b.codes + p.stages * CODES_BYTES), b.empty = b.full + p.stages;
    b.stages = p.stages, b.part = blockIdx.x % p.split;
    // tiles of the same rows run side by side
    b.tile = cluster % p.runs.tiles;
    int i = 0, block = p.first_block + cluster / p.runs.tiles;
    while (block >= p.members[i].end) i++;
    b.member = p.members + i, b.row_tile = (block - (i ? p.members[i - 1].end : 0)) * ROW_TILES;
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

// what a lane brings of each stage: where it lies and goes to, and its bytes (0: nothing); `all` bytes its warp does, without x
struct Copy {
    const u8 *from;
    int to, bytes, all;
};

// lane by lane the pieces up to a depth, scales and zero points of row tile `own` of a block; there are none beyond the last
DEVICE Copy copy_of(const Params &p, const Block &b, int depth, int own, int lane) {
    const Member &m = *b.member;
    const u64 row_tile = b.row_tile + own;
    int count = 0, bits = 0;
    Copy copy = {nullptr, 0, 0, 0};
    if (row_tile * 32 >= m.rows) return copy;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        if (DEPTH[piece] > depth) continue;
        if (lane == piece) copy = {m.pieces[piece] + row_tile * p.column_tiles * (256 * WIDTH[piece]), place_of_codes(piece, own), 512 * WIDTH[piece]};
        count++, bits = END[piece];
    }
    if (lane == count) copy = {m.scale + row_tile * p.groups * SCALES, place_of_scales(own), GROUPS * SCALES};
    if (lane == count + 1) copy = {m.zero + row_tile * p.groups * ZEROS, place_of_zeros(own), GROUPS * ZEROS};
    copy.from += (u64)b.first * copy.bytes;
    copy.all = bits * 512 + GROUPS * (SCALES + ZEROS);
    return copy;
}

// announce what this warp has of a stage, and bring all of it but x; called in order
DEVICE void bring_codes(const Params &p, const Block &b, Copy &copy, int turn, int at, int own, int lane) {
    // a last step without codes gets those of the step before, which are numbers, for x that is zero
    const bool twice = 2 * (b.first + turn) + 1 == p.column_tiles && copy.to < ALL_CODES;
    if (lane == 0) announce(b.full + at, copy.all + (own ? 0 : STAGE_BYTES));
    warp_sync();
    u8 *to = b.codes + at * CODES_BYTES + copy.to;
    const int bytes = twice ? copy.bytes / 2 : copy.bytes;
    if (bytes) copy_tile(to, copy.from, bytes, b.full + at);
    if (bytes && twice) copy_tile(to + bytes, copy.from, bytes, b.full + at);
    copy.from += copy.bytes;
}

// x of a stage
DEVICE void bring_x(const Params &p, const Block &b, int turn, int at) {
    const u8 *from = p.x + ((u64)b.tile * p.steps + 2 * (b.first + turn)) * X_BYTES;
    copy_tile(b.x + at * STAGE_BYTES, from, STAGE_BYTES, b.full + at);
}

// All stages of a block, by a warp its row tile `own`, and by the first x; what the tile holds. Where the depth is known, codes of the
// first stages, which no launch changes, are asked for before the launch before has ended.
DEVICE Run bring(const Params &p, const Block &b, int own, int lane) {
    Copy copy = {nullptr, 0, 0, 0};
    int begun = 0;
    if (!p.runs.counts) {
        copy = copy_of(p, b, p.runs.depth, own, lane);
        for (; begun < b.stages && begun < b.turns; begun++) bring_codes(p, b, copy, begun, begun, own, lane);
    }
    wait_for_last();
    const Run run = run_of(p.runs, b.tile);
    if (p.runs.counts) copy = copy_of(p, b, run.depth, own, lane);
    Turn turn;
    for (int i = 0; run.depth && i < b.turns; i++) {
        if (i >= b.stages) wait_for_phase(b.empty + turn.at, turn.round ^ 1);
        if (i >= begun) bring_codes(p, b, copy, i, turn.at, own, lane);
        if (own == 0 && lane == 0) bring_x(p, b, i, turn.at);
        go_on(turn, b.stages);
    }
    warp_sync();
    return run;
}
