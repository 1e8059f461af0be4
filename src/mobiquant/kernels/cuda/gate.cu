// silu(gate) * up of each token, rounded where transformers rounds.
//
// Set by the compiler's command line: BF16.

#include "device.h"

constexpr int THREADS = 256;

struct Params {
    const u16 *gate, *up;
    u16 *out;
    int count;
};

extern "C" __global__ void __launch_bounds__(THREADS) gate(const __grid_constant__ Params p) {
    wait_for_last();
    let_next_begin();  // as in sum_norm.cu
    const int at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= p.count) return;
    const float v = wide(p.gate[at]);
    p.out[at] = narrow(wide(narrow(v * reciprocal(1 + expf(-v)))) * wide(p.up[at]));
}
