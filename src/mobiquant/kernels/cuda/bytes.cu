// x of more than a few tokens to two planes of bytes, once for all blocks of the launch of `few.cu` that follows.
//
// There each block takes all of x: what one token costs little is most of the time of sixteen. The layout is that of shared memory.
//
// Set by the compiler's command line: as for `few.cu`.

#include "device.h"
#include "pieces.h"
#include "launch.h"
#include "stage.h"

// a thread takes eight columns of a token; the warps of a block take turns over all tokens, as in a block of `few.cu`
extern "C" __global__ void __launch_bounds__(THREADS) bytes(const __grid_constant__ Params p) {
    let_next_begin();
    wait_for_last();
    Shared s;
    s.x = p.staged, s.groups = (Pair *)(p.staged + 2 * p.tokens * x_stride(p));
    const int lane = threadIdx.x % 32;
    Eight at = {(int)(blockIdx.x * THREADS + threadIdx.x), 0}, next = at;
    settle(at, p, lane);
    const Four four = load_eight(next, p, lane);
    if (at.token < p.tokens) stage_eight(p, s, four, at.eight, at.token);
}
