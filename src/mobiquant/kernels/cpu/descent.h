// One block of columns of coordinate descent over nested codes (`compensate.py`).
//
// Rows are independent of each other. As many of them as a vector has lanes go through the columns of the block, and what their
// weights moved at every depth stays in the first cache: the gradient of a column is what it was before the block, plus what
// the columns chosen since add to it.
#pragma once

#include <cmath>
#include <cstring>

#include "pool.h"
#include "types.h"

namespace {

// Vectors with the operators of the language, by lanes: their size may not depend on a template.
template <int LANES>
struct Lanes;
template <>
struct Lanes<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
};
template <>
struct Lanes<16> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
};

template <class V>
struct Rows {
    static constexpr int COUNT = V::LANES;
    using Floats = typename Lanes<COUNT>::Floats;
    using Ints = typename Lanes<COUNT>::Ints;

    const Descent& d;
    const int first, there, coarse, total;  // `there` of the rows from `first` on exist
    float size[MAX_BITS];                   // of a cell of each depth, in base steps
    alignas(64) float moved[MAX_BITS][DESCENT_COLUMNS][COUNT];

    Rows(const Descent& work, int row, int known)
        : d(work), first(row), there(work.rows - row < COUNT ? work.rows - row : COUNT), coarse(known),
          total(work.widths[work.depths - 1]) {
        for (int depth = 0; depth < d.depths; ++depth) size[depth] = std::ldexp(1.0f, d.base - d.widths[depth]);
    }

    // What the rows have at `from`; lanes past the last row get `other`.
    Floats load(const float* from, float other) const {
        Floats made = Floats{} + other;
        std::memcpy(&made, from + first, sizeof(float) * there);
        return made;
    }

    // Where column `i` of the block begins in `gradient` and `moved`.
    int64_t place(int depth, int i) const { return (static_cast<int64_t>(depth) * (d.stop - d.start) + i) * d.rows; }

    Floats centre(Ints code, int depth) const {
        return (__builtin_convertvector(code >> (total - d.widths[depth]), Floats) + 0.5f) * size[depth];
    }

    // The gradient of column `i` of the block, with what the columns before it moved; four sums, or each addition would wait
    // for the one before.
    Floats slope(int depth, int i) const {
        const int64_t column = d.start + i;
        const float* const row = d.hessian + (static_cast<int64_t>(depth) * d.columns + column) * d.columns + d.start;
        Floats sums[4] = {load(d.gradient + place(depth, i), 0)};
        for (int s = 1; s < 4; ++s) sums[s] = Floats{};
        int k = 0;
        for (; k + 4 <= i; k += 4) {
            for (int s = 0; s < 4; ++s) sums[s] += row[k + s] * whole(moved[depth][k + s]);
        }
        for (; k < i; ++k) sums[0] += row[k] * whole(moved[depth][k]);
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    static Floats whole(const float* from) {
        Floats made;
        std::memcpy(&made, from, sizeof made);
        return made;
    }

    // `Chooser` of `compensate.py` for one column.
    Ints choose(const Floats* target, int64_t column) {
        const float *const weights = d.weights + column * d.depths, *tail = d.tails + column * (d.depths - coarse) * d.depths;
        const bool more = coarse < d.depths;
        const float step = size[coarse - 1];
        const float edge = more ? 0.5f * size[coarse] / step : 0.5f;
        float fine = 0;
        for (int depth = coarse; depth < d.depths; ++depth) fine += weights[depth];
        const Floats mean = more ? weighed(tail, target) : Floats{};
        Floats best = Floats{} + __builtin_inff();
        Ints code{};
        for (int c = 0; c < 1 << d.search_bits; ++c) {
            Floats cost{};
            for (int depth = 0; depth < coarse; ++depth) {
                const int cell = c >> (d.search_bits - d.widths[depth]);
                const Floats gap = (static_cast<float>(cell) + 0.5f) * size[depth] - target[depth];
                cost += weights[depth] * gap * gap;
            }
            if (more) {
                // the centres of the next depth in this cell reach from `low` to `high`
                const float low = (static_cast<float>(c) + edge) * step, high = (static_cast<float>(c + 1) - edge) * step;
                const Floats outside = within(mean, low, high) - mean;
                cost += fine * outside * outside;
            }
            const Ints better = cost < best;
            best = better ? cost : best;
            code = better ? Ints{} + c : code;
        }
        for (int depth = coarse; depth < d.depths; ++depth, tail += d.depths) {
            const int finer = d.widths[depth] - d.widths[depth - 1];
            const Ints low = code << finer, high = low + ((1 << finer) - 1);
            // bounded before it is made whole, which no other number can be
            const Floats cells = within(weighed(tail, target) / size[depth], 0, 255);
            const Ints near = __builtin_convertvector(cells, Ints);
            code = near < low ? low : near > high ? high : near;
        }
        return code;
    }

    Floats weighed(const float* tail, const Floats* target) const {
        Floats sum{};
        for (int depth = coarse; depth < d.depths; ++depth) sum += tail[depth] * target[depth];
        return sum;
    }

    static Floats within(Floats a, float low, float high) {
        const Floats least = Floats{} + low, most = Floats{} + high, raised = a > least ? a : least;
        return raised < most ? raised : most;
    }

    void column(int i) {
        const int64_t column = d.start + i;
        uint8_t* const chosen = d.chosen + column * d.rows + first;
        Ints old{};
        for (int r = 0; r < there; ++r) old[r] = chosen[r];
        const Floats scale = load(d.scale + column * d.rows, 1);
        Floats target[MAX_BITS];
        for (int depth = 0; depth < d.depths; ++depth) {
            target[depth] = centre(old, depth) - slope(depth, i) / (d.diagonal[column * d.depths + depth] * scale);
        }
        const Ints code = choose(target, column);
        for (int r = 0; r < there; ++r) chosen[r] = static_cast<uint8_t>(code[r]);
        for (int depth = 0; depth < d.depths; ++depth) {
            const Floats by = (centre(code, depth) - centre(old, depth)) * scale;
            std::memcpy(moved[depth][i], &by, sizeof by);
            std::memcpy(d.moved + place(depth, i) + first, &by, sizeof(float) * there);
        }
    }
};

template <class V>
void descend(const Descent& d) {
    constexpr int COUNT = Rows<V>::COUNT;
    int coarse = 1;
    while (d.widths[coarse - 1] != d.search_bits) ++coarse;
    parallel((d.rows + COUNT - 1) / COUNT, [&](int chunk) {
        Rows<V> rows(d, chunk * COUNT, coarse);
        for (int i = 0; i < d.stop - d.start; ++i) rows.column(i);
    });
}

}  // namespace
