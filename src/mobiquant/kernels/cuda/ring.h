// Tiles on their way from memory to the warp that works on them: a ring of places in shared memory for each warp, filled by
// asynchronous copies of its own lanes. A warp meets no other, so there is no barrier but that of its lanes.
//
// Copies need no registers while they are under way, so a loop holds one tile at a time and is short: code that does not fit the
// instruction cache costs more than the work. Set by the compiler's command line as said in `few.cu`.

#pragma once

// bytes of the pieces first .. last - 1 of a tile
template <int first, int last> constexpr int codes_bytes() { return (words_before(last) - words_before(first)) * 128; }

// What the ring holds in each of its places: two neighbouring tiles where two such places fit, so that a group of 128 is one sum,
// else one. The pieces come one after another, each with all its tiles, then scales and zero points of each group.
template <int first, int last, int tiles> struct Place {
    static constexpr int TILES = tiles, GROUPS = tiles * 64 > GROUP ? tiles * 64 / GROUP : 1;
    static constexpr int SCALES_AT = tiles * codes_bytes<first, last>(), BYTES = SCALES_AT + GROUPS * (SCALES + ZEROS);
};
template <int first, int last> constexpr int tiles_of_place() { return 2 * Place<first, last, 2>::BYTES <= RING ? 2 : 1; }
template <int first, int last> using PlaceOf = Place<first, last, tiles_of_place<first, last>()>;
template <int first, int last> constexpr int places() { return RING / PlaceOf<first, last>::BYTES; }

// The tiles of a warp in their order: places warp, warp + WARPS, .. of rows row_tile, row_tile + blocks, .. below to.
struct Cursor {
    int row_tile, to;
    int column_tile = 0;
    int member = 0;           // of the rows
    u32 tile = 0;             // counted from the first of the member
    const u8 *more = nullptr; // 16 bytes of scales or zero points that are this lane's part of the place, if any
};

// lanes that fetch scales and zero points of a place: eight for each group, of which four and two do
DEVICE bool is_zero_point(int lane) { return lane % 8 >= 4; }

// work out where the tiles of the cursor's rows lie
template <int tiles> DEVICE void enter_rows(Cursor &at, const Params &p, int warp, int lane) {
    at.column_tile = warp * tiles;
    if (at.row_tile >= at.to || at.column_tile >= p.column_tiles) {
        at.row_tile = at.to;
        return;
    }
    int row_tile = at.row_tile;
    at.member = &member_of(p, row_tile) - p.members;
    at.tile = row_tile * p.column_tiles + at.column_tile;
    const Member &m = p.members[at.member];
    const u64 group = (u64)row_tile * p.groups + at.column_tile * 64 / GROUP + lane / 8;
    at.more = is_zero_point(lane) ? m.zero + group * ZEROS + lane % 4 * 16 : m.scale + group * SCALES + lane % 4 * 16;
}

// `count` tiles of each piece, of which there are so many
template <int first, int last, int tiles, int piece = first> DEVICE void copy_pieces(u8 *to, const Member &m, u32 tile, int count, int lane) {
    if constexpr (piece < last) {
        const u8 *from = m.pieces[piece] + ((u64)tile * (256 * WIDTH[piece]) + lane * 16);
#pragma unroll
        for (int i = 0; i < tiles * 16 * WIDTH[piece]; i += 32)
            if (i + lane < count * 16 * WIDTH[piece]) copy_16(to + tiles * codes_bytes<first, piece>() + (i + lane) * 16, from + i * 16);
        copy_pieces<first, last, tiles, piece + 1>(to, m, tile, count, lane);
    }
}

// start the copies of the cursor's place, if there is one, and move on, to other rows by `enter`; counts as a group of copies in any case
template <int first, int last, class Enter> DEVICE void copy_place(u8 *to, const Params &p, Cursor &at, int lane, Enter enter) {
    using Own = PlaceOf<first, last>;
    constexpr int step = WARPS * Own::TILES;
    static_assert(step * 64 % GROUP == 0, "a warp moves on by whole groups");
    if (at.row_tile < at.to) {
        const int left = p.column_tiles - at.column_tile;
        copy_pieces<first, last, Own::TILES>(to, p.members[at.member], at.tile, left < Own::TILES ? left : Own::TILES, lane);
        if (lane < Own::GROUPS * 8 && lane % 8 < (first == 0 ? 6 : 4))
            copy_16(to + Own::SCALES_AT + lane / 8 * (SCALES + ZEROS) + lane % 8 * 16, at.more);
        at.tile += step, at.column_tile += step, at.more += step * 64 / GROUP * (is_zero_point(lane) ? ZEROS : SCALES);
        if (at.column_tile >= p.column_tiles) at.row_tile += gridDim.x, enter();
    }
    copies_end();
}

template <int first, int last> DEVICE void copy_next(u8 *to, const Params &p, Cursor &at, int warp, int lane) {
    copy_place<first, last>(to, p, at, lane, [&] { enter_rows<PlaceOf<first, last>::TILES>(at, p, warp, lane); });
}

// fill all places but one from the start of the cursor's rows
template <int first, int last> DEVICE void fill(u8 *ring, const Params &p, Cursor &at, int warp, int lane) {
    using Own = PlaceOf<first, last>;
    warp_sync();  // what lay there has been read by all lanes
    bool enters = true;
#pragma unroll 1
    for (int i = 0; i < places<first, last>(); i++) {
        if (enters) enter_rows<Own::TILES>(at, p, warp, lane);
        enters = false;
        if (i + 1 < places<first, last>()) copy_place<first, last>(ring + i * Own::BYTES, p, at, lane, [&] { enters = true; });
    }
}

template <int first> DEVICE void fill_to(int deepest, u8 *ring, const Params &p, Cursor &at, int warp, int lane) {
    at_depth<first>(deepest, [&](auto last) { fill<first, last.number>(ring, p, at, warp, lane); });
}

// a lane's words of one piece of one of a place's tiles
template <int first, int piece, int tiles> DEVICE void take_piece(u32 *to, const u8 *place, int tile, int lane) {
    const u8 *own = place + tiles * codes_bytes<first, piece>() + (tile * 32 + lane) * (8 * WIDTH[piece]);
    if constexpr (WIDTH[piece] == 2) {
        const Four got = *(const Four *)own;
        to[0] = got.x, to[1] = got.y, to[2] = got.z, to[3] = got.w;
    } else {
        const Two got = *(const Two *)own;
        to[0] = got.x, to[1] = got.y;
    }
}

// of all pieces
template <int first, int last, int tiles, int piece = first> DEVICE void take_words(u32 *words, const u8 *place, int tile, int lane) {
    if constexpr (piece < last) {
        take_piece<first, piece, tiles>(words + (words_before(piece) - words_before(first)), place, tile, lane);
        take_words<first, last, tiles, piece + 1>(words, place, tile, lane);
    }
}
