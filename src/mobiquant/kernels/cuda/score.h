// Routers in a launch of `few.cu`: some blocks score all tokens over some columns each, for one router. Where that decides for this
// launch (ROUTED is ITSELF), every block adds up and decides; for a later launch, one block does, once its rows are done.
//
// So a decision is one trip through memory away from the last score: a block that decided for all others would cost a second. Scores
// travel with the number of their launch beside them, in one word of eight bytes: who reads the number has the score, and no flag
// or fence is waited for.

#pragma once

// what ROUTED says: no routers, the first decides for this launch, or all decide for later ones
constexpr int NOBODY = 0, ITSELF = 1, OTHERS = 2;

// sum of the squares of eight columns, from their bytes: of 256 high + low
DEVICE float energy_of_eight(const Params &p, const Shared &s, int eight, int token) {
    const u8 *at = s.x + (u64)(2 * token) * x_stride(p) + place_of_eight(eight);
    const Two high = *(const Two *)at, low = *(const Two *)(at + x_stride(p));
    const float scale = s.groups[eight * 8 / GROUP * TOKENS + token].x;
    const int highs = dot_bytes(high.y, high.y, dot_bytes(high.x, high.x, 0)), both = dot_bytes(high.y, low.y, dot_bytes(high.x, low.x, 0));
    const int lows = dot_bytes(low.y, low.y, dot_bytes(low.x, low.x, 0));
    return scale * scale * fmaf(65536.0f, (float)highs, fmaf(512.0f, (float)both, (float)lows));
}

// products of 32 hidden units with all tokens over this part of the columns, and the energy of x there, into `partial`
DEVICE void score_part(const Params &p, const Shared &s, const Router &r, int part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 number = s.wanted[1].number;
    const int hidden = p.routers.hidden;
    Two *partial = r.partial + part * (hidden + 1) * TOKENS;
#pragma unroll 1
    for (int hidden_tile = 0; hidden_tile * HIDDEN_TILE < hidden; hidden_tile++) {
        Rows y = {};
        float energy[NT] = {};
#pragma unroll 1
        for (int tile = part * WARPS + warp; tile < p.column_tiles; tile += WARPS * p.parts) {
            const u8 *from = r.weight + ((u64)hidden_tile * p.column_tiles + tile) * 2048 + lane * 16;
            Inputs in;
            load_inputs(in, p, s, tile, lane);
            constexpr int groups = GROUP < 64 ? 64 / GROUP : 1;
#pragma unroll
            for (int g = 0; g < groups; g++) {
                Sums sums = {};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (i % groups != g || (i >= 2 && hidden - hidden_tile * HIDDEN_TILE <= 16)) continue;
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
                const int token = c * 4 + lane / 8;
                if (hidden_tile == 0 && token < p.tokens) energy[c] += energy_of_eight(p, s, tile * 8 + lane % 8, token);
            }
        }
        put(s.sums, y, warp, lane);
#pragma unroll
        for (int c = 0; c < NT; c++) {
#pragma unroll
            for (int by = 1; by < 8; by *= 2) energy[c] += shuffle_xor(energy[c], by);
            if (lane % 8 == 0) s.sums[place_of(warp, c * 4 + lane / 8, 32)] = energy[c];  // beside the 32 sums
        }
        __syncthreads();
        for (int i = threadIdx.x; i < HIDDEN_TILE * TOKENS; i += THREADS) {
            const int token = i / HIDDEN_TILE, unit = hidden_tile * HIDDEN_TILE + i % HIDDEN_TILE;
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += s.sums[place_of(w, token, i % HIDDEN_TILE)];
            if (unit < hidden) store_whole(partial + unit * TOKENS + token, {__float_as_uint(total), number});
        }
        for (int token = threadIdx.x; hidden_tile == 0 && token < TOKENS; token += THREADS) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) total += s.sums[place_of(w, token, 32)];
            store_whole(partial + hidden * TOKENS + token, {__float_as_uint(total), number});
        }
        __syncthreads();
    }
}

DEVICE float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// what a token reads in all layers of the launch
DEVICE void count(const Params &p, int token, int depth) {
    // whole numbers: any order of additions gives the same sum
    atomicAdd(p.read + entry_of(p, token) * p.depths + depth - 1, p.weights);
}

// Parts of the columns, of the first router, then of the next: a block takes one, or several where they are more than blocks. The
// first blocks do: they are the first to be there, so that blocks that wait for them always can, whatever else runs on the device.
// Rows are shared out from the other end, so these have no more than others. Those that decide for other launches follow them.
DEVICE int shares_of(const Params &p) { return p.parts * p.routers.count; }

// of the routers that this block decides for, the first; others are as many further as there are blocks
DEVICE int first_to_decide(const Params &p) {
    const int first = (int)blockIdx.x - p.deciders;
    return first < 0 ? first + (int)gridDim.x : first;
}

// Whether this block scores or decides: only those know the number of the launch.
DEVICE bool is_busy(const Params &p) { return ROUTED == ITSELF || (int)blockIdx.x < p.busy; }

// all of a router but its first matrix to shared memory
DEVICE void take_router(const Params &p, const Shared &s, const Router &r) {
    const int hidden = p.routers.hidden, scores = p.routers.scores;
#pragma unroll 1
    for (int i = threadIdx.x; i < hidden; i += THREADS)
        s.rms[i] = r.rms[i], s.bias[i] = r.bias[i], s.weight_scale[i] = from_fp16(r.weight_scale[i]);
#pragma unroll 1
    for (int i = threadIdx.x; i < hidden * scores; i += THREADS) s.out[i] = r.out[i];
    if (threadIdx.x < scores) s.out_bias[threadIdx.x] = r.out_bias[threadIdx.x];
}

// ask for what this block will score, and take what it will decide by; neither depends on a launch before
DEVICE void prepare_scores(const Params &p, const Shared &s) {
    const int decides = ROUTED == ITSELF ? 0 : first_to_decide(p);
    if (decides < p.routers.count) take_router(p, s, p.routers.each[decides]);
#pragma unroll 1
    for (int share = blockIdx.x; share < shares_of(p); share += gridDim.x) {
        const Router &r = p.routers.each[share / p.parts];
#pragma unroll 1
        for (int own = share % p.parts * WARPS; own < p.column_tiles; own += WARPS * p.parts) {
            const int left = p.column_tiles - own, tiles = left < WARPS ? left : WARPS;
            const int hidden_tile = threadIdx.x;  // MOST_HIDDEN says that there are threads enough
            if (hidden_tile * HIDDEN_TILE < p.routers.hidden)
                prefetch((const u8 *)r.weight + ((u64)hidden_tile * p.column_tiles + own) * 2048, tiles * 2048);
        }
    }
}

// floats of a token where its sums are gathered: of all parts, and beside them its scores
constexpr int MOST_SCORES = 8;
DEVICE int gathered_of(const Params &p) { return p.parts * (p.routers.hidden + 1) + MOST_SCORES; }

// Sums of all parts to shared memory once they are there, [tokens][parts][hidden + 1]: a warp waits for one part of one token at a
// time, so it is one trip through memory where there are as many warps.
DEVICE void gather_parts(const Params &p, const Router &r, float *gathered, u32 number) {
    const int hidden = p.routers.hidden, sums = hidden + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = warp; i < p.tokens * p.parts; i += WARPS) {
        const int token = i / p.parts, part = i % p.parts;
        const Two *from = r.partial + part * sums * TOKENS + token, *energy = from + hidden * TOKENS;
        float *to = gathered + token * gathered_of(p) + part * sums;
#pragma unroll 1
        for (int unit = lane; unit < hidden; unit += 32) {
            Two found, with;
            // both at once: the energy is one more than the lanes
            while (true) {
                found = load_whole(from + unit * TOKENS), with = load_whole(energy);
                if (found.y == number && with.y == number) break;
                pause();
            }
            to[unit] = __uint_as_float(found.x);
            if (unit == 0) to[hidden] = __uint_as_float(with.x);
        }
    }
    __syncthreads();
}

// Depth of a token by all lanes of a warp: scores as in `router.scores`, depth as in `router.depths`. Written to be short, not
// unrolled: it runs once in a launch, and what is not in the instruction cache costs more than the work.
DEVICE int decide_token(const Params &p, const Shared &s, float *own, int token, int lane) {
    const int hidden = p.routers.hidden, sums = hidden + 1, scores = p.routers.scores;
    float energy = 0;
#pragma unroll 1
    for (int b = 0; b < p.parts; b++) energy += own[b * sums + hidden];
    float rms = sqrtf(energy / p.columns);
    rms = rms < 1e-6f ? 1e-6f : rms;  // NaN stays NaN
    const float log_rms = logf(rms);
#pragma unroll 1
    for (int unit = lane; unit < hidden; unit += 32) {
        float sum = 0;
#pragma unroll 1
        for (int b = 0; b < p.parts; b++) sum += own[b * sums + unit];
        const float z = sum / rms * s.weight_scale[unit] + log_rms * s.rms[unit] + s.bias[unit];
        own[unit] = z / (1 + expf(-z));  // in the place of its first part
    }
    warp_sync();
    // four scores at a time, by eight lanes each
    float *found = own + p.parts * sums;
#pragma unroll 1
    for (int first = 0; first < scores; first += 4) {
        const int score = first + lane / 8;
        float sum = 0;
        if (score < scores)
#pragma unroll 1
            for (int unit = lane % 8; unit < hidden; unit += 8) sum += s.out[score * hidden + unit] * own[unit];
#pragma unroll
        for (int by = 1; by < 8; by *= 2) sum += shuffle_xor(sum, by);
        if (lane % 8 == 0 && score < scores) {
            sum += s.out_bias[score];
            found[score] = score ? softplus(sum) : sum;
        }
    }
    warp_sync();
    const int entry = entry_of(p, token), cap = s.wanted[1].cap[entry];
    const float tau = s.wanted[1].tau[entry];
    float fall = 0;
    int depth = 1;
#pragma unroll 1
    for (int score = 0; score < scores; score++) {
        if (score) fall += found[score];
        depth += found[0] - fall > tau;
    }
    return depth < cap ? depth : cap;
}

// What a router says of all tokens, once its scores are there: to all blocks, or by one block to launches to come.
DEVICE void decide(const Params &p, const Shared &s, const Router &r, bool here) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    gather_parts(p, r, s.sums, s.wanted[1].number);
#pragma unroll 1
    for (int token = warp; token < p.tokens; token += WARPS) {
        const int depth = decide_token(p, s, s.sums + token * gathered_of(p), token, lane);
        if (lane) continue;
        if (here) s.depth[token] = depth;
        if (here && blockIdx.x == 0) count(p, token, depth);
        if (!here || blockIdx.x == 0) r.depth[p.before + token] = depth;
    }
    __syncthreads();
}

// What launches to come read. The blocks that decide have no more rows than others.
DEVICE void decide_for_others(const Params &p, const Shared &s) {
#pragma unroll 1
    for (int i = first_to_decide(p); i < p.routers.count; i += gridDim.x) {
        if (ROUTED == ITSELF && i == 0) continue;
        __syncthreads();  // sums of the last rows have been read
        // the first is there (`prepare_scores`)
        if (ROUTED == ITSELF || i >= (int)gridDim.x) take_router(p, s, p.routers.each[i]);
        decide(p, s, p.routers.each[i], false);
    }
}

// this block's shares of the scores
DEVICE void score(const Params &p, const Shared &s) {
#pragma unroll 1
    for (int share = blockIdx.x; share < shares_of(p); share += gridDim.x)
        score_part(p, s, p.routers.each[share / p.parts], share % p.parts);
}

// How launches are numbered: the last block to know the number sets the next one, which nobody reads before this launch has ended.
// The answer to who came before is not waited for until the scores are done.
DEVICE void know_number_and_score(const Params &p, const Shared &s) {
    const u32 before = count_up(p.routers.state + 1, threadIdx.x == 0);
    score(p, s);
    if (threadIdx.x == 0) s.wanted[1].before = before;
}
DEVICE void number_next(const Params &p, const Shared &s) {
    const u32 last = (ROUTED == ITSELF ? gridDim.x : p.busy) - 1;
    if (threadIdx.x == 0 && s.wanted[1].before == last) p.routers.state[0] = s.wanted[1].number + 1, p.routers.state[1] = 0;
}
