// From bit planes to codes, in registers.
//
// Byte j of a plane holds one bit of eight columns. The planes of a code are merged in steps: two planes to fields of two
// bits, two of those to fields of four, and those to bytes. Each step keeps a field where its lowest bit was, so that
// afterwards vector i holds, in byte j, the code of column 8 j + 7 - i: activations are stored in that order, once a token.
#pragma once

namespace {

// Fields of `N` bits of two vectors as fields of `2 N`, those of `high` above: those that begin at even places, and at odd ones.
template <class V, int N>
inline void merge(typename V::Bytes high, typename V::Bytes low, typename V::Bytes& even, typename V::Bytes& odd) {
    constexpr uint8_t UPPER = N == 1 ? 0xaa : N == 2 ? 0xcc : 0xf0;
    even = V::mix(V::template left<N>(high), low, UPPER);
    odd = V::mix(high, V::template right<N>(low), UPPER);
}

// Codes of `W` bits from planes `s`, lowest bit first, into eight vectors.
template <class V, int W>
[[gnu::always_inline]] inline void fields(const typename V::Bytes* s, typename V::Bytes* out) {
    using Bytes = typename V::Bytes;
    if constexpr (W == 1) {
        const Bytes a = s[0];
        out[0] = V::only(a, 1);
        out[1] = V::only(V::template right<1>(a), 1);
        out[2] = V::only(V::template right<2>(a), 1);
        out[3] = V::only(V::template right<3>(a), 1);
        out[4] = V::only(V::template right<4>(a), 1);
        out[5] = V::only(V::template right<5>(a), 1);
        out[6] = V::only(V::template right<6>(a), 1);
        out[7] = V::only(V::template right<7>(a), 1);
    } else if constexpr (W == 2) {
        Bytes even, odd;
        merge<V, 1>(s[1], s[0], even, odd);
        out[0] = V::only(even, 3);
        out[1] = V::only(odd, 3);
        out[2] = V::only(V::template right<2>(even), 3);
        out[3] = V::only(V::template right<2>(odd), 3);
        out[4] = V::only(V::template right<4>(even), 3);
        out[5] = V::only(V::template right<4>(odd), 3);
        out[6] = V::only(V::template right<6>(even), 3);
        out[7] = V::only(V::template right<6>(odd), 3);
    } else {
        Bytes nibbles[2][4];
        for (int half = 0; half < (W > 4 ? 2 : 1); ++half) {
            Bytes p[4];
            for (int k = 0; k < 4; ++k) p[k] = 4 * half + k < W ? s[4 * half + k] : V::zero();
            Bytes low[2], high[2];
            merge<V, 1>(p[1], p[0], low[0], low[1]);
            merge<V, 1>(p[3], p[2], high[0], high[1]);
            // nibbles of bit i in the lower half of a byte, of bit i + 4 in the upper one
            for (int i = 0; i < 2; ++i) merge<V, 2>(high[i], low[i], nibbles[half][i], nibbles[half][i + 2]);
        }
        for (int i = 0; i < 4; ++i) {
            if constexpr (W <= 4) {
                out[i] = V::only(nibbles[0][i], 15);
                out[i + 4] = V::only(V::template right<4>(nibbles[0][i]), 15);
            } else {
                merge<V, 4>(nibbles[1][i], nibbles[0][i], out[i], out[i + 4]);
            }
        }
    }
}

// How a code of `W` bits is cut into parts that one dot product takes, the lowest bits first.
template <class V, int W>
struct Parts {
    static constexpr int COUNT = (W + V::PART - 1) / V::PART;
    static constexpr int width(int part) { return part + 1 < COUNT ? V::PART : W - V::PART * part; }
};

constexpr int AHEAD = 2048;

// The codes of one block of a row: `Parts::COUNT` times eight vectors. Unless `INSIDE` promises that whole vectors may be read,
// `there` says how many bytes of each plane may.
template <class V, int W, bool INSIDE>
[[gnu::always_inline]] inline void codes(const uint8_t* const* plane, int64_t at, int64_t there, typename V::Bytes (*out)[8]) {
    typename V::Bytes s[W];
    // rows follow one another in memory; the machine's own prefetching starts anew at every page
    for (int k = 0; k < W; ++k) __builtin_prefetch(plane[k] + at + AHEAD);
    for (int k = 0; k < W; ++k) s[k] = INSIDE ? V::whole(plane[W - 1 - k] + at) : V::load(plane[W - 1 - k] + at, there);
    fields<V, Parts<V, W>::width(0)>(s, out[0]);
    if constexpr (Parts<V, W>::COUNT > 1) fields<V, Parts<V, W>::width(1)>(s + V::PART, out[1]);
}

}  // namespace
