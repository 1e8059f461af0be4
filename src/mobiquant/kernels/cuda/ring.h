// Tiles on their way from memory to the warp that works on them: a ring of places in shared memory for each warp, filled by
// asynchronous copies of its own lanes. A warp meets no other, so there is no barrier but that of its lanes.
//
// Copies need no registers while they are under way, so a loop holds one tile at a time and is short: code that does not fit the
// instruction cache costs more than the work. Set by the compiler's command line as said in `few.cu`.

#pragma once

constexpr int SCALES = 64, ZEROS = 32;  // bytes of a tile for each half that has a scale of its own

// bytes of the pieces first .. last - 1 of a tile, which is also where piece `last` begins
template <int first, int last> constexpr int codes_bytes() { return (words_before(last) - words_before(first)) * 128; }
template <int first, int last> constexpr int tile_bytes() { return codes_bytes<first, last>() + HALVES * (SCALES + ZEROS); }
// places in the ring
template <int first, int last> constexpr int places() { return RING / tile_bytes<first, last>(); }

// The tiles of a warp in their order: columns warp, warp + WARPS, .. of rows from, from + by, .. below to.
struct Cursor {
    int row_tile, column_tile, by, to;
    int member;      // of the rows
    u32 tile;        // counted from the first of the member
    const u8 *more;  // 16 bytes of scales or zero points that are this lane's part of the tile, if any
};

// lanes that fetch scales and zero points of a tile: eight for each half, of which four and two do
DEVICE bool is_zero_point(int lane) { return lane % 8 >= 4; }

// work out where the tiles of the cursor's rows lie
DEVICE void enter_rows(Cursor &at, const Params &p, int warp, int lane) {
    at.column_tile = warp;
    if (at.row_tile >= at.to || warp >= p.column_tiles) {
        at.row_tile = at.to;
        return;
    }
    int row_tile = at.row_tile;
    at.member = &member_of(p, row_tile) - p.members;
    at.tile = row_tile * p.column_tiles + warp;
    const Member &m = p.members[at.member];
    const u64 group = (u64)row_tile * p.groups + (warp * 64 + lane / 8 * 32) / GROUP;
    at.more = is_zero_point(lane) ? m.zero + group * ZEROS + lane % 4 * 16 : m.scale + group * SCALES + lane % 4 * 16;
}

DEVICE Cursor cursor(const Params &p, int from, int by, int to, int warp, int lane) {
    Cursor at = {from, warp, by, to, 0, 0, 0};
    enter_rows(at, p, warp, lane);
    return at;
}

template <int first, int last, int piece = first> DEVICE void copy_pieces(u8 *to, const Member &m, u32 tile, int lane) {
    if constexpr (piece < last) {
        if (lane < 16 * WIDTH[piece])
            copy_16(to + codes_bytes<first, piece>() + lane * 16, m.pieces[piece] + ((u64)tile * (256 * WIDTH[piece]) + lane * 16));
        copy_pieces<first, last, piece + 1>(to, m, tile, lane);
    }
}

// start the copies of the cursor's tile, if there is one, and move on; counts as a group of copies in any case
template <int first, int last> DEVICE void copy_next(u8 *to, const Params &p, Cursor &at, int warp, int lane) {
    static_assert(WARPS * 64 % GROUP == 0, "a warp moves on by whole groups");
    if (at.row_tile < at.to) {
        copy_pieces<first, last>(to, p.members[at.member], at.tile, lane);
        if (lane < HALVES * 8 && lane % 8 < (first == 0 ? 6 : 4))
            copy_16(to + codes_bytes<first, last>() + lane / 8 * (SCALES + ZEROS) + lane % 8 * 16, at.more);
        at.tile += WARPS, at.column_tile += WARPS, at.more += WARPS * 64 / GROUP * (is_zero_point(lane) ? ZEROS : SCALES);
        if (at.column_tile >= p.column_tiles) at.row_tile += at.by, enter_rows(at, p, warp, lane);
    }
    copies_end();
}

// fill all places but one
template <int first, int last> DEVICE void fill(u8 *ring, const Params &p, Cursor &at, int warp, int lane) {
    warp_sync();  // what lay there has been read by all lanes
#pragma unroll 1
    for (int i = 0; i < places<first, last>() - 1; i++)
        copy_next<first, last>(ring + i * tile_bytes<first, last>(), p, at, warp, lane);
}

template <int first> DEVICE void fill_to(int deepest, u8 *ring, const Params &p, Cursor &at, int warp, int lane) {
    at_depth<first>(deepest, [&](auto last) { fill<first, last.number>(ring, p, at, warp, lane); });
}

// a lane's words of all pieces of a tile
template <int first, int last, int piece = first> DEVICE void take_words(u32 *words, const u8 *from, int lane) {
    if constexpr (piece < last) {
        u32 *to = words + (words_before(piece) - words_before(first));
        const u8 *own = from + codes_bytes<first, piece>() + lane * (8 * WIDTH[piece]);
        if constexpr (WIDTH[piece] == 2) {
            const Four got = *(const Four *)own;
            to[0] = got.x, to[1] = got.y, to[2] = got.z, to[3] = got.w;
        } else {
            const Two got = *(const Two *)own;
            to[0] = got.x, to[1] = got.y;
        }
        take_words<first, last, piece + 1>(words, from, lane);
    }
}
