// x of all tokens to two planes of signed bytes in shared memory, and from there to the fragments of tensor cores.

#pragma once

// where the eight bytes of columns 8 n .. 8 n + 7 lie in a column of x: the two steps of a tile side by side for each lane
DEVICE int place_of_eight(int n) { return n / 8 * 64 + n % 4 * 16 + n / 4 % 2 * 8; }

// Eight columns of a token after others: warps take turns over all tokens.
struct Eight {
    int eight, token;
};

DEVICE void settle(Eight &at, const Params &p, int lane) {
    const int all = panels_of(p) * (PANEL / 8);
    while (at.eight - lane >= all && at.token < p.tokens) at.eight -= (all + 31) / 32 * 32, at.token++;
}

DEVICE Four load_eight(Eight &next, const Params &p, int lane) {
    Four four = {0, 0, 0, 0};
    settle(next, p, lane);
    if (next.token < p.tokens && next.eight * 8 < p.columns)
        four = load_fresh((const Four *)(p.x + (u64)next.token * p.columns + next.eight * 8));
    next.eight += THREADS;
    return four;
}

// eight columns to bytes; the lanes of a group agree on its scale
DEVICE void stage_eight(const Params &p, const Shared &s, const Four &four, int eight, int token) {
    constexpr int lanes = GROUP / 8;
    const u32 twos[4] = {four.x, four.y, four.z, four.w};
    float v[8];
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = wide((u16)(twos[i / 2] >> (16 * (i % 2))));
        const u32 size = __float_as_uint(v[i]) & 0x7fffffffu;  // in this order NaN is the largest
        most = most > size ? most : size;
    }
#pragma unroll
    for (int by = 1; by < lanes; by *= 2) {
        const u32 other = shuffle_xor(most, by);
        most = most > other ? most : other;
    }
    // a last bit more or less of the inverse moves no number by more than its rounding does: whole numbers stay below 2^15
    const float largest = __uint_as_float(most), scale = largest < 1e-33f ? 0 : largest * (1.0f / STEPS);
    const float inverse = largest < 1e-33f ? 0 : STEPS * reciprocal(largest);
    u32 bits[8];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        // the nearest whole number in the low bits of a float
        bits[i] = __float_as_uint(fmaf(v[i], inverse, 12582912.0f));
        sum += (int)(bits[i] - 0x4b400000u);
    }
#pragma unroll
    for (int by = 1; by < lanes; by *= 2) sum += shuffle_xor(sum, by);
    if (eight >= panels_of(p) * (PANEL / 8)) return;
    u8 *high = s.x + (u64)(2 * token) * x_stride(p) + place_of_eight(eight), *low = high + x_stride(p);
    Two highs, lows;
    u32 *words[2] = {&highs.x, &highs.y}, *under[2] = {&lows.x, &lows.y};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 above = 0, below = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 whole = bits[half * 4 + i];
            below |= (whole & 255) << (8 * i);
            above |= ((whole + 128) >> 8 & 255) << (8 * i);  // low is signed
        }
        *words[half] = above, *under[half] = below;
    }
    *(Two *)high = highs;
    *(Two *)low = lows;
    if (eight % lanes == 0) s.groups[eight / lanes * TOKENS + token] = {scale, scale * (float)sum};
}

// ---- x of one token that is made here (`input`), rounded where `sum_norm.cu` and `gate.cu` round, which are launches of their own

// eights of x that a thread takes at most for a norm
constexpr int NORM_TURNS = 2;

DEVICE Four load_part(const Params &p, const u16 *from, int eight) {
    return from && eight * 8 < p.columns ? load_fresh((const Four *)(from + eight * 8)) : Four{0, 0, 0, 0};
}

// x becomes x + more, which one block writes down; returns 1 / rms
DEVICE float begin_norm(const Params &p, const Shared &s, Four *x, const Four *more, bool writes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float energy = 0;
#pragma unroll
    for (int t = 0; t < NORM_TURNS; t++) {
        const int eight = threadIdx.x + t * THREADS;
        float own[8], added[8];
        widen(own, x[t]), widen(added, more[t]);
#pragma unroll
        for (int i = 0; i < 8; i++) own[i] += added[i];
        // without `more` nothing but the sign of a zero can change
        x[t] = narrowed(own), widen(own, x[t]);
        if (writes && p.more && eight * 8 < p.columns) *(Four *)(p.sum + eight * 8) = x[t];
#pragma unroll
        for (int i = 0; i < 8; i++) energy = fmaf(own[i], own[i], energy);
    }
#pragma unroll
    for (int by = 1; by < 32; by *= 2) energy += shuffle_xor(energy, by);
    if (lane == 0) s.sums[warp] = energy;
    __syncthreads();
    energy = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) energy += s.sums[w];
    return 1.0f / sqrtf(energy / p.columns + p.epsilon);
}

// eight columns of x / rms times a weight, or of silu(x) times another vector
DEVICE Four made_of(const Params &p, const Four &x, const Four &other, float inverse) {
    float own[8], by[8];
    widen(own, x), widen(by, other);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float factor = p.input == NORM ? inverse : reciprocal(1 + expf(-own[i]));
        own[i] = wide(narrow(own[i] * factor)) * by[i];
    }
    return narrowed(own);
}

// x to two planes of bytes. Some loads are under way at a time; `meanwhile` is done once the first have been sent.
template <class Work> DEVICE void stage(const Params &p, const Shared &s, bool writes, Work meanwhile) {
    constexpr int ahead = 4;
    static_assert(NORM_TURNS <= ahead, "all of x is here before the norm is known");
    const int lane = threadIdx.x % 32, own = threadIdx.x;
    const bool makes = MAKES && p.input != PLAIN;
    Eight next = {own, 0}, at = next;
    Four loaded[ahead], other[ahead] = {};
#pragma unroll
    for (int i = 0; i < ahead; i++) {
        loaded[i] = load_eight(next, p, lane);
        if (makes) other[i] = load_part(p, p.more, own + i * THREADS);
    }
    meanwhile();
    float inverse = 0;
    if (makes && p.input == NORM) {
        Four by[NORM_TURNS];
#pragma unroll
        for (int i = 0; i < NORM_TURNS; i++) by[i] = load_part(p, p.by, own + i * THREADS);
        inverse = begin_norm(p, s, loaded, other, writes);
#pragma unroll
        for (int i = 0; i < NORM_TURNS; i++) other[i] = by[i];
    }
#pragma unroll 1
    for (settle(at, p, lane); at.token < p.tokens; settle(at, p, lane)) {
        if (makes) loaded[0] = made_of(p, loaded[0], other[0], inverse);
        stage_eight(p, s, loaded[0], at.eight, at.token);
        at.eight += THREADS;
#pragma unroll
        for (int i = 0; i + 1 < ahead; i++) loaded[i] = loaded[i + 1], other[i] = other[i + 1];
        loaded[ahead - 1] = load_eight(next, p, lane);
        if (makes) other[ahead - 1] = load_part(p, p.more, at.eight + (ahead - 1) * THREADS);
    }
}

typedef int Sums[2][NT][4];  // of a group: rows 16 m, tokens in fours

typedef float Rows[4][NT];  // row 16 m + 8 u + lane / 4 at 2 m + u, token 4 c + lane % 4

// the two planes of all tokens in one tile: [NT][step][register]
struct Inputs {
    u32 v[NT][2][2];
};

DEVICE void load_inputs(Inputs &in, const Params &p, const Shared &s, int column_tile, int lane) {
#pragma unroll
    for (int c = 0; c < NT; c++) {
        const int plane = c * 8 + lane / 4, last = 2 * p.tokens - 1;  // tokens that are not there see the last one
        const Four four = *(const Four *)(s.x + (u64)(plane < last ? plane : last) * x_stride(p) + column_tile * 64 + lane % 4 * 16);
        in.v[c][0][0] = four.x, in.v[c][0][1] = four.y, in.v[c][1][0] = four.z, in.v[c][1][1] = four.w;
    }
}

// ---- sums of a warp in shared memory

DEVICE int place_of(int warp, int token, int row) { return (warp * TOKENS + token) * STRIDE + row; }

DEVICE void put(float *sums, const Rows &y, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int c = 0; c < NT; c++) sums[place_of(warp, c * 4 + lane % 4, r * 8 + lane / 4)] = y[r][c];
}
