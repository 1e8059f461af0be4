// The pieces of a weight, as the compiler's command line gives them, and how codes are taken out of their words (`tiles.py`).
//
// PIECES is how many there are; for each piece WIDTHS (1 or 2 bits), DEPTHS (of the slice that it is part of) and ENDS (bits up to
// and with it).

#pragma once

constexpr int SCALES = 64, ZEROS = 32;  // bytes of a group of 32 rows
constexpr int WIDTH[] = {WIDTHS}, DEPTH[] = {DEPTHS}, END[] = {ENDS};

constexpr int words_before(int piece) {
    int sum = 0;
    for (int i = 0; i < piece; i++) sum += 2 * WIDTH[i];
    return sum;
}

constexpr int pieces_to(int depth) {
    int count = 0;
    while (count < PIECES && DEPTH[count] <= depth) count++;
    return count;
}

template <int value> struct Constant {
    static constexpr int number = value;
};

// `work` with the end of the pieces of slices up to a depth that is known at run time, where these go beyond piece `first`
template <int first, int depth = 1, class Work> DEVICE void at_depth(int deepest, Work work) {
    constexpr int last = pieces_to(depth);
    if constexpr (last > first) {
        if (deepest == depth) {
            work(Constant<last>{});
            return;
        }
    }
    if constexpr (last < PIECES) at_depth<first, depth + 1>(deepest, work);
}

// four neighbouring codes of `width` bits that end a prefix of `end`, in the bits that are theirs in a code of eight bits, or of so
// many less: field `place` of a byte, from above
template <int width, int end, int place, int less = 0> DEVICE u32 codes(u32 word) {
    constexpr int low = 8 - less - end, left = low - (8 - width * (place + 1));
    constexpr u32 mask = (u32)((1 << width) - 1) * 0x01010101u << low;
    return (left >= 0 ? word << (left >= 0 ? left : 0) : word >> (left < 0 ? -left : 0)) & mask;
}

// register `a` of the fragment of rows m * 16 .. and step f of 32 columns, from pieces `piece` .. `end` - 1 together; `words` begin
// with those of piece `first`
template <int first, int piece, int end, int m, int f, int a> DEVICE u32 fragment(const u32 *words) {
    const u32 *own = words + (words_before(piece) - words_before(first));
    u32 found;
    if constexpr (WIDTH[piece] == 2) found = codes<2, END[piece], a>(own[2 * m + f]);
    else found = codes<1, END[piece], 4 * f + a>(own[m]);
    if constexpr (piece + 1 < end) found |= fragment<first, piece + 1, end, m, f, a>(words);
    return found;
}

// ask for 32 rows of the pieces up to a depth
DEVICE void prefetch_words(const u8 *const *pieces, int row_tile, int column_tiles, int depth, int lane) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const u32 bytes = column_tiles * 256 * WIDTH[i];
        if (lane == i && DEPTH[i] <= depth) prefetch(pieces[i] + (u64)row_tile * bytes, bytes);
    }
}

// the words of pieces `piece` .. `last` - 1 of a lane; nothing is read of a slice deeper than `deepest`
template <int first, int last, int piece = first> DEVICE void fetch_words(u32 *words, const u8 *const *pieces, u64 lane, int deepest) {
    if constexpr (piece < last) {
        u32 *to = words + (words_before(piece) - words_before(first));
        const u8 *from = pieces[piece] + lane * (8 * WIDTH[piece]);
        if constexpr (WIDTH[piece] == 2) {
            const Four got = fetch_four(from, DEPTH[piece] <= deepest);
            to[0] = got.x, to[1] = got.y, to[2] = got.z, to[3] = got.w;
        } else {
            const Two got = fetch_two(from, DEPTH[piece] <= deepest);
            to[0] = got.x, to[1] = got.y;
        }
        fetch_words<first, last, piece + 1>(words, pieces, lane, deepest);
    }
}
