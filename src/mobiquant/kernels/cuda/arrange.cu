// x of many tokens as `many.cu` wants it in shared memory: tiles of TOKENS by 64 columns, each in one piece.
//
// The columns of a step of the tensor cores may come in any order, if it is the same on both sides: a lane there takes its eight
// neighbours of a row of weights as they lie (`tiles.py`), so two columns of each of four eights come side by side here.
//
// Set by the compiler's command line: BF16, TOKENS.

#include "warpgroup.h"
#include "runs.h"

constexpr int THREADS = 256;

struct Params {
    Runs runs;
    const u16 *x;  // [tokens, columns]
    u8 *out;       // [tiles, steps, TOKENS * 128]
    int columns, steps;
};

// a thread takes 32 columns of a token
extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    const int at = blockIdx.x * THREADS + threadIdx.x, half = at % 2, step = at / 2 % p.steps, row = at / 2 / p.steps;
    const int tile = row / TOKENS, token = row % TOKENS;
    if (tile >= p.runs.tiles) return;
    const Run run = run_of(p.runs, tile);
    if (!run.depth) return;
    const u16 *from = token < run.count ? p.x + (u64)token_of(p.runs, run.first + token) * p.columns : nullptr;
    Four f[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int column = step * 64 + half * 32 + n * 8;
        f[n] = from && column < p.columns ? load_fresh((const Four *)(from + column)) : Four{0, 0, 0, 0};
    }
    u8 *to = p.out + ((u64)tile * p.steps + step) * (TOKENS * 128);
    *(Four *)(to + place_of_sixteen(token, half * 4)) = {f[0].x, f[1].x, f[2].x, f[3].x};
    *(Four *)(to + place_of_sixteen(token, half * 4 + 1)) = {f[0].y, f[1].y, f[2].y, f[3].y};
    *(Four *)(to + place_of_sixteen(token, half * 4 + 2)) = {f[0].z, f[1].z, f[2].z, f[3].z};
    *(Four *)(to + place_of_sixteen(token, half * 4 + 3)) = {f[0].w, f[1].w, f[2].w, f[3].w};
}
