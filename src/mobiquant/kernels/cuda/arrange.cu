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

// word i of lane n of four becomes word n of lane i
DEVICE void turn_four(u32 (&w)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 got = shuffle_xor(odd ? w[i] : w[i + 1], 1);
        w[odd ? i : i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 got = shuffle_xor(upper ? w[i] : w[i + 2], 2);
        w[upper ? i : i + 2] = got;
    }
}

// a thread takes eight columns of a token, eight threads a step: what they read lies side by side, and so does what they write
extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    const int at = blockIdx.x * THREADS + threadIdx.x, eight = at % 8, step = at / 8 % p.steps, row = at / 8 / p.steps;
    const int tile = row / TOKENS, token = row % TOKENS, column = step * 64 + eight * 8;
    // lanes of a warp may be of two tiles, and all come to exchange words
    const Run run = tile < p.runs.tiles ? run_of(p.runs, tile) : Run{0, 0, 0};
    Four from = {0, 0, 0, 0};
    if (run.depth && token < run.count && column < p.columns)
        from = load_fresh((const Four *)(p.x + (u64)token_of(p.runs, run.first + token) * p.columns + column));
    u32 words[4] = {from.x, from.y, from.z, from.w};
    turn_four(words, threadIdx.x % 32);
    u8 *to = p.out + ((u64)tile * p.steps + step) * (TOKENS * 128);
    if (run.depth) *(Four *)(to + place_of_sixteen(token, eight)) = {words[0], words[1], words[2], words[3]};
}
