// The router of a launch of `few.cu`: some blocks score all tokens over some columns each, then every block adds up and decides.
//
// So a decision is one trip through memory away from the last score: a block that decided for all others would cost a second.

#pragma once

// products of 32 hidden units with all tokens over this block's columns, and the energy of x there, into `partial`
DEVICE void score_part(const Params &p, const Shared &s, int block) {
    const Router &r = p.router;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *partial = r.partial + block * (r.hidden + 1) * TOKENS;
    for (int hidden_tile = 0; hidden_tile * HIDDEN_TILE < r.hidden; hidden_tile++) {
        Rows y = {};
        float energy[NT] = {};
        for (int tile = block * WARPS + warp; tile < p.column_tiles; tile += WARPS * p.parts) {
            const u8 *from = r.weight + ((u64)hidden_tile * p.column_tiles + tile) * 2048 + lane * 16;
            Inputs in;
            load_inputs(in, p, s, tile, lane);
            constexpr int groups = GROUP < 64 ? 64 / GROUP : 1;
#pragma unroll
            for (int g = 0; g < groups; g++) {
                Sums sums = {};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (i % groups != g) continue;
                    const Four four = fetch_four(from + i * 512, true);
                    const u32 a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int c = 0; c < NT; c++) multiply_bytes(sums[i / 2][c], a, in.v[c][i % 2][0], in.v[c][i % 2][1]);
                }
#pragma unroll
                for (int c = 0; c < NT; c++) {
                    const Pair x = s.groups[(tile * 64 / GROUP + g) * TOKENS + c * 4 + lane % 4];
#pragma unroll
                    for (int row = 0; row < 4; row++) {
                        const int *sum = sums[row / 2][c] + row % 2 * 2;
                        y[row][c] = fmaf((float)(sum[0] * 256 + sum[1]), x.x, y[row][c]);
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < NT; c++) {
                const int token = c * 4 + lane / 8, column = tile * 64 + lane % 8 * 8;
                if (hidden_tile == 0 && token < p.tokens && column < p.columns) {
                    const Four four = load_fresh((const Four *)(p.x + (u64)token * p.columns + column));
                    const u32 twos[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        const float v = wide((u16)(twos[i / 2] >> (16 * (i % 2))));
                        energy[c] = fmaf(v, v, energy[c]);
                    }
                }
            }
        }
        float *energies = s.sums + SUMS;
        put(s.sums, y, warp, lane);
#pragma unroll
        for (int c = 0; c < NT; c++) {
#pragma unroll
            for (int by = 1; by < 8; by *= 2) energy[c] += shuffle_xor(energy[c], by);
            if (lane % 8 == 0) energies[warp * TOKENS + c * 4 + lane / 8] = energy[c];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < HIDDEN_TILE * TOKENS; i += THREADS) {
            const int token = i / HIDDEN_TILE, unit = hidden_tile * HIDDEN_TILE + i % HIDDEN_TILE;
            float total = 0;
            for (int w = 0; w < WARPS; w++) total += s.sums[place_of(w, token, i % HIDDEN_TILE)];
            if (unit < r.hidden) partial[unit * TOKENS + token] = total;
        }
        for (int token = threadIdx.x; hidden_tile == 0 && token < TOKENS; token += THREADS) {
            float total = 0;
            for (int w = 0; w < WARPS; w++) total += energies[w * TOKENS + token];
            partial[r.hidden * TOKENS + token] = total;
        }
        __syncthreads();
    }
}

DEVICE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// what a token reads in all layers of the launch
DEVICE void count(const Params &p, int token, int depth) {
    double weights = 0;
    for (int i = 0; i < MEMBERS; i++) weights += (double)p.members[i].rows * p.columns;
    // whole numbers: any order of additions gives the same sum
    atomicAdd(p.read + entry_of(p, token) * p.depths + depth - 1, weights);
}

// ask for what this block will score, and take the rest of the router to shared memory; neither depends on a launch before
DEVICE void prepare_scores(const Params &p, const Shared &s) {
    const Router &r = p.router;
    const int own = blockIdx.x * WARPS, left = p.column_tiles - own, tiles = left < WARPS ? left : WARPS;
    for (int hidden_tile = threadIdx.x; blockIdx.x < p.parts && hidden_tile * HIDDEN_TILE < r.hidden; hidden_tile += THREADS)
        prefetch((const u8 *)r.weight + ((u64)hidden_tile * p.column_tiles + own) * 2048, tiles * 2048);
    for (int i = threadIdx.x; i < r.hidden; i += THREADS)
        s.rms[i] = r.rms[i], s.bias[i] = r.bias[i], s.weight_scale[i] = from_fp16(r.weight_scale[i]);
    for (int i = threadIdx.x; i < r.hidden * r.scores; i += THREADS) s.out[i] = r.out[i];
    for (int i = threadIdx.x; i < r.scores; i += THREADS) s.out_bias[i] = r.out_bias[i];
}

// scores as in `router.scores`, depths as in `router.depths`
DEVICE void decide(const Params &p, const Shared &s) {
    const Router &r = p.router;
    const int stride = (r.hidden + 1) * TOKENS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *active = s.sums, *scores = s.sums + MOST_HIDDEN * TOKENS;
    for (int i = threadIdx.x; i < r.hidden * TOKENS; i += THREADS) {
        const int unit = i / TOKENS, token = i % TOKENS;
        if (token >= p.tokens) continue;
        float sum = 0, energy = 0;
#pragma unroll 4
        for (int b = 0; b < p.parts; b++) {
            sum += load_fresh(r.partial + b * stride + unit * TOKENS + token);
            energy += load_fresh(r.partial + b * stride + r.hidden * TOKENS + token);
        }
        float rms = sqrtf(energy / p.columns);
        rms = rms < 1e-6f ? 1e-6f : rms;  // NaN stays NaN
        const float z = sum / rms * s.weight_scale[unit] + logf(rms) * s.rms[unit] + s.bias[unit];
        active[unit * TOKENS + token] = z / (1 + expf(-z));
    }
    __syncthreads();
    for (int i = warp; i < r.scores * TOKENS; i += WARPS) {
        const int score = i / TOKENS, token = i % TOKENS;
        if (token >= p.tokens) continue;
        float sum = 0;
        for (int unit = lane; unit < r.hidden; unit += 32) sum += s.out[score * r.hidden + unit] * active[unit * TOKENS + token];
#pragma unroll
        for (int by = 1; by < 32; by *= 2) sum += shuffle_xor(sum, by);
        if (lane == 0) scores[score * TOKENS + token] = sum + s.out_bias[score];
    }
    __syncthreads();
    if (threadIdx.x < p.tokens) {
        const int token = threadIdx.x, entry = entry_of(p, token), cap = (int)load_fresh(p.cap + entry);
        const float tau = load_fresh(p.tau + entry);
        int depth = 1 + (scores[token] > tau);
        float fall = 0;
        for (int i = 1; i < r.scores; i++) {
            fall += softplus(scores[i * TOKENS + token]);
            depth += scores[token] - fall > tau;
        }
        s.depth[token] = depth = depth < cap ? depth : cap;
        if (blockIdx.x == 0) r.depth[p.before + token] = depth, count(p, token, depth);
    }
    __syncthreads();
}

// this block's part of the scores, where it has one
DEVICE void score(const Params &p, const Shared &s) {
    if (blockIdx.x >= p.parts) return;
    score_part(p, s, blockIdx.x);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(p.router.state, 1u);
}

// once all parts are there
DEVICE void await_scores(const Params &p) {
    if (threadIdx.x == 0)
        while (load_acquire(p.router.state) != (u32)p.parts) pause();
    __syncthreads();
}

// the last block to have seen all parts makes ready for the next launch
DEVICE void leave(const Params &p) {
    u32 *state = p.router.state;
    if (threadIdx.x == 0 && atomicAdd(state + 1, 1u) == gridDim.x - 1) state[0] = state[1] = 0;
}
