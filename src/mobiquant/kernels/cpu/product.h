// The mixed-depth product: `y_t = x_t read(q, bits_t)^T + bias`.
//
// With `s` the scale and `z` the shift of a group, `c` the codes of a row and a token x = a q (int8, a for each 32 columns),
//
//     y = cell * sum over lanes of  s (a sum(c q) - z a sum(q)),     cell = 2^(base - bits),  z = zero 2^(bits - 8) + (1 / cell - 1) / 2
//
// Sums inside a lane are whole numbers and exact; lanes are added in fp32, in an order that depends on nothing but the shape.
#pragma once

#include "activations.h"
#include "fields.h"
#include "pool.h"

namespace {

struct Cell {
    float cell, step, middle;
    // shift and zero point in cells: what is left is one factor of the whole row
    Cell(int base, int bits)
        : cell(std::ldexp(1.0f, base - bits)), step(std::ldexp(1.0f, bits - 8)), middle(std::ldexp(0.5f, bits - base) - 0.5f) {}
};

// Scale and shift of the lanes of one block, whose first group is number `at` of the weight.
template <class V, bool INSIDE>
[[gnu::always_inline]] inline void scales(const Weight& w, const int32_t* index, int64_t at, int64_t there, typename V::Floats step,
                   typename V::Floats middle, typename V::Floats& scale, typename V::Floats& shift) {
    scale = V::template halves<INSIDE>(w.scale + at, there, index);
    shift = V::fused(V::template bytes<INSIDE>(w.zero + at, there, index), step, middle);
}

// One row for one token, codes from planes to sums without leaving the registers: the sum of all lanes, or with `APART` the
// value of each, in cells.
template <class V, int W, bool INSIDE, bool APART>
inline float row_product(const Weight& w, const Shape<V>& shape, int64_t row, const int8_t* __restrict q,
                         const float* __restrict a, const float* __restrict b, const Cell& c, float* __restrict apart) {
    using P = Parts<V, W>;
    const uint8_t* plane[W];
    for (int k = 0; k < W; ++k) plane[k] = w.plane[k];
    const int blocks = shape.blocks;
    const int64_t bytes = row * shape.bytes, groups = row * shape.groups;
    const int64_t bytes_left = static_cast<int64_t>(w.rows) * shape.bytes - bytes;
    const int64_t groups_left = static_cast<int64_t>(w.rows) * shape.groups - groups;
    const int32_t *index = shape.index, *const first = shape.first;
    const typename V::Floats step = V::all(c.step), middle = V::all(c.middle);
    typename V::Floats total = V::none();
    for (int block = 0; block < blocks; ++block) {
        const int64_t along = static_cast<int64_t>(block) * V::BYTES;
        typename V::Bytes code[P::COUNT][8];
        codes<V, W, INSIDE>(plane, bytes + along, bytes_left - along, code);
        // two sums, or each addition would wait for the one before
        typename V::Sum sums[P::COUNT][2];
        for (int part = 0; part < P::COUNT; ++part) {
            for (int i = 0; i < 8; ++i) sums[part][i % 2].add(code[part][i], q + i * V::BYTES);
        }
        typename V::Floats dot = V::Sum::lanes(sums[0][0], sums[0][1]), scale, shift;
        if constexpr (P::COUNT > 1) dot = V::fused(V::Sum::lanes(sums[1][0], sums[1][1]), V::all(1 << V::PART), dot);
        __builtin_prefetch(w.scale + groups + first[block] + AHEAD / 8);
        __builtin_prefetch(w.zero + groups + first[block] + AHEAD / 8);
        scales<V, INSIDE>(w, index, groups + first[block], groups_left - first[block], step, middle, scale, shift);
        dot = V::fused_less(shift, V::load_floats(b), V::multiply(dot, V::load_floats(a)));
        if constexpr (APART) {
            V::store_floats(apart + block * V::LANES, V::multiply(scale, dot));
        } else {
            total = V::fused(scale, dot, total);
        }
        q += 8 * V::BYTES, a += V::LANES, b += V::LANES, index += V::LANES;
    }
    return APART ? 0.0f : V::sum(total);
}

// Rows of which whole vectors can be read, of planes, scales and zero points: all but the last few.
template <class V>
int rows_inside(const Weight& w, const Shape<V>& shape) {
    const int64_t bytes = static_cast<int64_t>(w.rows) * shape.bytes - static_cast<int64_t>(shape.blocks) * V::BYTES;
    const int64_t groups = static_cast<int64_t>(w.rows) * shape.groups - shape.first[shape.blocks - 1] - V::LANES;
    const int64_t by_bytes = bytes < 0 ? 0 : bytes / shape.bytes + 1, by_groups = groups < 0 ? 0 : groups / shape.groups + 1;
    return static_cast<int>(by_bytes < by_groups ? by_bytes : by_groups);
}

template <class V>
float sum_of(const float* lanes, int count) {
    typename V::Floats total = V::none();
    int k = 0;
    for (; k + V::LANES <= count; k += V::LANES) total = V::fused(V::load_floats(lanes + k), V::all(1.0f), total);
    float rest = V::sum(total);
    for (; k < count; ++k) rest += lanes[k];
    return rest;
}

// Rows that do not fill their last vector are taken several at once: a weight [rows, columns] is also one of
// [rows / period, period * columns] for activations that are repeated, if sums are cut at the ends of rows.
constexpr int MOST_REPEATED = 16384;

template <class V>
int period_of(const Weight& w) {
    const int bytes = w.columns / 8;
    if (w.columns % LANE || w.columns % w.group || bytes % V::BYTES == 0 || bytes > 8 * V::BYTES) return 1;
    int period = 2;
    while (period * bytes % V::BYTES) period *= 2;
    return w.rows % period == 0 && period * w.columns <= MOST_REPEATED ? period : 1;
}

inline Weight repeated(Weight w, int period) {
    w.rows /= period;
    w.columns *= period;
    return w;
}

template <class V, int W, bool INSIDE>
void rows_product(const Weight& w, const Shape<V>& shape, int period, int from, int to, const Activations<V>& x, float* y) {
    const Cell c(w.base, W);
    const int8_t* const q = x.codes(0);
    const float *const a = x.scales(0), *const b = x.sums(0);
    if (period == 1) {
        for (int row = from; row < to; ++row) {
            const float found = c.cell * row_product<V, W, INSIDE, false>(w, shape, row, q, a, b, c, nullptr);
            y[row] = found + (w.bias == nullptr ? 0.0f : w.bias[row]);
        }
        return;
    }
    alignas(64) float lanes[MOST_REPEATED / LANE + V::LANES];
    const int each = shape.columns / period / LANE;
    for (int many = from; many < to; ++many) {
        row_product<V, W, INSIDE, true>(w, shape, many, q, a, b, c, lanes);
        for (int k = 0; k < period; ++k) {
            const int row = many * period + k;
            y[row] = c.cell * sum_of<V>(lanes + k * each, each) + (w.bias == nullptr ? 0.0f : w.bias[row]);
        }
    }
}

template <class V, int W>
void rows_at(const Weight& w, const Shape<V>& shape, int period, int from, int to, const Activations<V>& x, float* y) {
    const int inside = rows_inside(w, shape), middle = inside < from ? from : inside > to ? to : inside;
    rows_product<V, W, true>(w, shape, period, from, middle, x, y);
    rows_product<V, W, false>(w, shape, period, middle, to, x, y);
}

// Rows for one token at `bits`; where `period` is more than 1, `w` and `x` are repeated, and rows are counted in periods.
template <class V>
void one_token(int bits, const Weight& w, const Shape<V>& shape, int period, int from, int to, const Activations<V>& x, float* y) {
    switch (bits) {
        case 1: return rows_at<V, 1>(w, shape, period, from, to, x, y);
        case 2: return rows_at<V, 2>(w, shape, period, from, to, x, y);
        case 3: return rows_at<V, 3>(w, shape, period, from, to, x, y);
        case 4: return rows_at<V, 4>(w, shape, period, from, to, x, y);
        case 5: return rows_at<V, 5>(w, shape, period, from, to, x, y);
        case 6: return rows_at<V, 6>(w, shape, period, from, to, x, y);
        case 7: return rows_at<V, 7>(w, shape, period, from, to, x, y);
        default: return rows_at<V, 8>(w, shape, period, from, to, x, y);
    }
}

// A few rows unpacked once and used for all tokens of a depth.
template <class V>
struct Panel {
    static constexpr int ROWS = V::ROWS;
    uint8_t* code;          // [ROWS, blocks, parts, 8, BYTES]
    float *scale, *shift;   // [ROWS, blocks * LANES]: scale times cell, scale times shift

    static size_t size(int blocks) {
        return static_cast<size_t>(ROWS) * blocks * (2 * 8 * V::BYTES + 2 * sizeof(float) * V::LANES);
    }
    Panel(void* memory, int blocks) {
        scale = static_cast<float*>(memory);
        shift = scale + ROWS * blocks * V::LANES;
        code = reinterpret_cast<uint8_t*>(shift + ROWS * blocks * V::LANES);
    }

    template <int W>
    void fill(const Weight& w, const Shape<V>& shape, int64_t row, int count) {
        using P = Parts<V, W>;
        const Cell c(w.base, W);
        for (int r = 0; r < ROWS; ++r) {
            // past the last row the one before is repeated, and what comes of it is not stored
            const int64_t from = row + (r < count ? r : count - 1);
            for (int block = 0; block < shape.blocks; ++block) {
                const int64_t at = from * shape.bytes + static_cast<int64_t>(block) * V::BYTES;
                typename V::Bytes made[P::COUNT][8];
                codes<V, W, false>(w.plane, at, static_cast<int64_t>(w.rows) * shape.bytes - at, made);
                uint8_t* const to = code + (static_cast<size_t>(r) * shape.blocks + block) * P::COUNT * 8 * V::BYTES;
                for (int i = 0; i < 8 * P::COUNT; ++i) V::store(to + i * V::BYTES, made[i / 8][i % 8]);
                typename V::Floats s, z;
                const int64_t group = from * shape.groups + shape.first[block];
                scales<V, false>(w, shape.index + block * V::LANES, group, static_cast<int64_t>(w.rows) * shape.groups - group,
                                 V::all(c.step), V::all(c.middle), s, z);
                s = V::multiply(s, V::all(c.cell));
                const size_t lane = (static_cast<size_t>(r) * shape.blocks + block) * V::LANES;
                V::store_floats(scale + lane, s);
                V::store_floats(shift + lane, V::multiply(s, z));
            }
        }
    }

    // `R` rows for `T` tokens.
    template <int W, int R, int T>
    void multiply(const Activations<V>& x, const int32_t* token, int blocks, float (*out)[R]) const {
        using P = Parts<V, W>;
        typename V::Floats total[T][R];
        for (auto& one : total) {
            for (auto& value : one) value = V::none();
        }
        for (int block = 0; block < blocks; ++block) {
            typename V::Floats dot[T][R];
            for (int part = P::COUNT - 1; part >= 0; --part) {
                typename V::Sum sums[T][R];
                for (int i = 0; i < 8; ++i) {
                    for (int r = 0; r < R; ++r) {
                        const size_t at = ((static_cast<size_t>(r) * blocks + block) * P::COUNT + part) * 8 + i;
                        const typename V::Bytes c = V::whole(code + at * V::BYTES);
                        for (int t = 0; t < T; ++t) sums[t][r].add(c, x.codes(token[t]) + (block * 8 + i) * V::BYTES);
                    }
                }
                for (int t = 0; t < T; ++t) {
                    for (int r = 0; r < R; ++r) {
                        const typename V::Floats found = sums[t][r].lanes();
                        dot[t][r] = part + 1 == P::COUNT ? found : V::fused(dot[t][r], V::all(1 << V::PART), found);
                    }
                }
            }
            for (int t = 0; t < T; ++t) {
                const typename V::Floats a = V::load_floats(x.scales(token[t]) + block * V::LANES);
                const typename V::Floats b = V::load_floats(x.sums(token[t]) + block * V::LANES);
                for (int r = 0; r < R; ++r) {
                    const size_t lane = (static_cast<size_t>(r) * blocks + block) * V::LANES;
                    total[t][r] = V::fused(V::multiply(dot[t][r], a), V::load_floats(scale + lane), total[t][r]);
                    total[t][r] = V::fused_less(b, V::load_floats(shift + lane), total[t][r]);
                }
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int r = 0; r < R; ++r) out[t][r] = V::sum(total[t][r]);
        }
    }

    // Rows `from` to `to` for the tokens listed, all at `W` bits.
    template <int W>
    void run(const Weight& w, const Shape<V>& shape, int from, int to, const Activations<V>& x, const int32_t* token, int count,
             float* y) {
        for (int row = from; row < to; row += ROWS) {
            const int rows = to - row < ROWS ? to - row : ROWS;
            fill<W>(w, shape, row, rows);
            for (int t = 0; t < count; t += 2) {
                float out[2][ROWS];
                if (t + 1 < count) {
                    multiply<W, ROWS, 2>(x, token + t, shape.blocks, out);
                } else {
                    multiply<W, ROWS, 1>(x, token + t, shape.blocks, out);
                }
                for (int k = 0; k < 2 && t + k < count; ++k) {
                    float* const at = y + static_cast<size_t>(token[t + k]) * w.rows + row;
                    for (int r = 0; r < rows; ++r) at[r] = out[k][r] + (w.bias == nullptr ? 0.0f : w.bias[row + r]);
                }
            }
        }
    }

    void run(int bits, const Weight& w, const Shape<V>& shape, int from, int to, const Activations<V>& x, const int32_t* token,
             int count, float* y) {
        switch (bits) {
            case 1: return run<1>(w, shape, from, to, x, token, count, y);
            case 2: return run<2>(w, shape, from, to, x, token, count, y);
            case 3: return run<3>(w, shape, from, to, x, token, count, y);
            case 4: return run<4>(w, shape, from, to, x, token, count, y);
            case 5: return run<5>(w, shape, from, to, x, token, count, y);
            case 6: return run<6>(w, shape, from, to, x, token, count, y);
            case 7: return run<7>(w, shape, from, to, x, token, count, y);
            default: return run<8>(w, shape, from, to, x, token, count, y);
        }
    }
};

// Chunks of rows: several for each thread, so that one that is put aside does not hold the others up.
inline int rows_of_chunk(int rows, int tokens) {
    const int wanted = rows / (4 * threads()) / 8 * 8, least = tokens > 1 ? 8 : 64;
    return wanted < least ? least : wanted > 512 ? 512 : wanted;
}

// A linear layer of one token, as a part of a job.
struct Part {
    const Weight* weight;
    float* y;
    int bits, start;  // chunk at which it starts
};

// Memory for one quantised token of a thread, or null.
template <class V>
void* token_memory(int blocks) {
    static thread_local Scratch held;
    return held.get(Activations<V>::size(1, blocks) + 64);
}

// Layers that read the same token `x`, as one job; `after(part, from, to)` is called for rows that are done. 0 where memory
// is out.
template <class V, class F>
int together(Part* parts, int count, const float* x, const F& after) {
    const Weight& first = *parts[0].weight;
    int rows = 0, period = period_of<V>(first), chunks = 0;
    for (int p = 0; p < count; ++p) {
        rows += parts[p].weight->rows;
        if (period_of<V>(*parts[p].weight) != period) period = 1;
    }
    const Weight wide = repeated(first, period);
    const Shape<V>* const found = Shape<V>::of(wide);
    void* const memory = found == nullptr ? nullptr : token_memory<V>(found->blocks);
    if (memory == nullptr) return 0;
    const Shape<V>& shape = *found;
    Activations<V> quant(memory, 1, shape.blocks);
    quant.set(0, x, wide.columns, first.columns);
    const int step = rows_of_chunk(rows, 1) / period;
    for (int p = 0; p < count; ++p) {
        parts[p].start = chunks;
        chunks += (parts[p].weight->rows / period + step - 1) / step;
    }
    parallel(chunks, [&](int chunk) {
        int p = count - 1;
        while (chunk < parts[p].start) --p;
        const Weight w = repeated(*parts[p].weight, period);
        const int from = (chunk - parts[p].start) * step, to = from + step < w.rows ? from + step : w.rows;
        one_token<V>(parts[p].bits, w, shape, period, from, to, quant, parts[p].y);
        after(p, from * period, to * period);
    });
    return 1;
}

template <class V>
int product(const Weight& w, const float* x, int tokens, const int8_t* bits, float* y) {
    if (tokens == 1) {
        Part alone[1] = {{&w, y, bits[0], 0}};
        return together<V>(alone, 1, x, [](int, int, int) {});
    }
    static thread_local Scratch quantised, orders;
    const Shape<V>* const found = Shape<V>::of(w);
    if (found == nullptr) return 0;
    const Shape<V>& shape = *found;
    void* const held = quantised.get(Activations<V>::size(tokens, shape.blocks) + 64);
    int32_t* const order = static_cast<int32_t*>(orders.get(sizeof(int32_t) * (static_cast<size_t>(tokens) + MAX_BITS + 2)));
    if (held == nullptr || order == nullptr) return 0;
    Activations<V> quant(held, tokens, shape.blocks);
    parallel((tokens + 15) / 16, [&](int chunk) {
        for (int t = 16 * chunk; t < tokens && t < 16 * chunk + 16; ++t) {
            quant.set(t, x + static_cast<size_t>(t) * w.columns, w.columns, w.columns);
        }
    });
    const int step = rows_of_chunk(w.rows, tokens), chunks = (w.rows + step - 1) / step;
    const auto end = [&](int chunk) { return (chunk + 1) * step < w.rows ? (chunk + 1) * step : w.rows; };
    // tokens in the order of their widths; `start` says where each width begins
    int32_t *const start = order + tokens, place = 0;
    for (int width = 1; width <= MAX_BITS; ++width) {
        start[width] = place;
        for (int t = 0; t < tokens; ++t) {
            if (bits[t] == width) order[place++] = t;
        }
    }
    start[MAX_BITS + 1] = place;
    int failed = 0;
    parallel(chunks, [&](int chunk) {
        static thread_local Scratch panels;
        void* const memory = panels.get(Panel<V>::size(shape.blocks) + 64);
        if (memory == nullptr) {
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
            return;
        }
        Panel<V> panel(memory, shape.blocks);
        for (int width = 1; width <= MAX_BITS; ++width) {
            const int count = start[width + 1] - start[width];
            if (count) panel.run(width, w, shape, chunk * step, end(chunk), quant, order + start[width], count, y);
        }
    });
    return !failed;
}

}  // namespace
