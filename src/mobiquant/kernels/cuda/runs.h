// Many tokens in runs of one depth, cut into tiles: what `arrange.cu` and `many.cu` share. Set by the compiler's command line: TOKENS.

#pragma once

constexpr int MOST_DEPTHS = 8;

// tokens in the order of their depths, on the device
struct Runs {
    const int *order;   // [tokens], by depth, or null where it is that of x
    const int *counts;  // [depths]: tokens of each, or null where all have `depth`
    int tokens, depth, depths, tiles;
};

// what a tile holds: tokens `first` .. of the order; depth 0 where it is not needed
struct Run {
    int first, count, depth;
};

DEVICE Run run_of(const Runs &r, int tile) {
    int before = 0;
    auto cut = [&](int left, int depth) { return Run{before + tile * TOKENS, left < TOKENS ? left : TOKENS, depth}; };
    if (!r.counts) return cut(r.tokens - tile * TOKENS, r.depth);
    // all are asked for at once
    int counts[MOST_DEPTHS];
#pragma unroll
    for (int d = 0; d < MOST_DEPTHS; d++) counts[d] = d < r.depths ? load_fresh(r.counts + d) : 0;
    Run run = {0, 0, 0};
#pragma unroll
    for (int d = 0; d < MOST_DEPTHS; d++) {
        const int tiles = (counts[d] + TOKENS - 1) / TOKENS;
        if (tile >= 0 && tile < tiles) run = cut(counts[d] - tile * TOKENS, d + 1);
        tile -= tiles, before += counts[d];
    }
    return run;
}

DEVICE int token_of(const Runs &r, int place) { return r.order ? r.order[place] : place; }
