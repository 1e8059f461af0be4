// Tokens as the products read them: int8 with a scale for each 32 columns, in the order of `fields.h`.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "types.h"

namespace {

using namespace mobiquant;

// Memory of a thread that grows and is used again.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    // At least `bytes`, aligned for any vector, or null; what was there is lost.
    void* get(size_t bytes) {
        if (bytes > size) {
            std::free(memory);
            const size_t rounded = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, rounded);
            size = memory == nullptr ? 0 : rounded;
        }
        return memory;
    }
};

// Where the columns of a weight fall: vectors ("blocks") of a row, and for each 32 columns their group.
template <class V>
struct Shape {
    int columns = 0, group = 0, blocks = 0, bytes = 0, groups = 0;
    // [blocks * LANES] group of a lane less that of the first lane of its block; [blocks] that one
    int32_t *index = nullptr, *first = nullptr;
    Scratch memory;

    bool place(const Weight& w) {
        columns = w.columns, group = w.group, bytes = (w.columns + 7) / 8, groups = (w.columns + w.group - 1) / w.group;
        blocks = (w.columns + 8 * V::BYTES - 1) / (8 * V::BYTES);
        index = static_cast<int32_t*>(memory.get(sizeof(int32_t) * blocks * (V::LANES + 1)));
        if (index == nullptr) {
            columns = 0;
            return false;
        }
        first = index + blocks * V::LANES;
        for (int block = 0; block < blocks; ++block) {
            first[block] = block * V::LANES * LANE / group;
            for (int l = 0; l < V::LANES; ++l) {
                const int column = (block * V::LANES + l) * LANE;
                // lanes past the end have activations of zero: any group will do
                index[block * V::LANES + l] = column < columns ? column / group - first[block] : 0;
            }
        }
        return true;
    }

    // The shape of a weight, of which a thread keeps the last few: a model has no more. Null where memory is out.
    static const Shape* of(const Weight& w) {
        constexpr int KEPT = 8;
        static thread_local Shape kept[KEPT];
        static thread_local int next = 0;
        for (const Shape& one : kept) {
            if (one.columns == w.columns && one.group == w.group) return &one;
        }
        next = (next + 1) % KEPT;
        return kept[next].place(w) ? &kept[next] : nullptr;
    }
};

// `tokens` quantised tokens.
template <class V>
struct Activations {
    int blocks;
    int8_t* q;           // [tokens, blocks, 8, BYTES]
    float *scale, *sum;  // [tokens, blocks * LANES]: x = scale * q, and scale times the sum of q

    static size_t size(int tokens, int blocks) { return static_cast<size_t>(tokens) * blocks * (8 * V::BYTES + 8 * V::LANES); }
    Activations(void* memory, int tokens, int count) : blocks(count) {
        scale = static_cast<float*>(memory);
        sum = scale + static_cast<size_t>(tokens) * blocks * V::LANES;
        q = reinterpret_cast<int8_t*>(sum + static_cast<size_t>(tokens) * blocks * V::LANES);
    }
    const int8_t* codes(int token) const { return q + static_cast<size_t>(token) * blocks * 8 * V::BYTES; }
    const float* scales(int token) const { return scale + static_cast<size_t>(token) * blocks * V::LANES; }
    const float* sums(int token) const { return sum + static_cast<size_t>(token) * blocks * V::LANES; }

    // Quantise one token of `own` columns, repeated up to `columns`. A lane that holds a number that is not finite makes every
    // product of the token NaN.
    void set(int token, const float* x, int columns, int own) {
        int8_t* const to = q + static_cast<size_t>(token) * blocks * 8 * V::BYTES;
        float *const scale_of = scale + static_cast<size_t>(token) * blocks * V::LANES;
        float *const sum_of = sum + static_cast<size_t>(token) * blocks * V::LANES;
        const auto at = [&](int l) { return to + static_cast<size_t>(l / V::LANES) * 8 * V::BYTES + l % V::LANES * 4; };
        const int count = columns == own ? blocks * V::LANES : own / LANE;
        for (int l = 0; l < count; ++l) one(x, own, l, at(l), scale_of + l, sum_of + l);
        for (int l = count, from = 0; l < blocks * V::LANES; ++l, from = from + 1 == count ? 0 : from + 1) {
            const int8_t* const old = at(from);
            int8_t* const made = at(l);
            for (int i = 0; i < 8; ++i) std::memcpy(made + i * V::BYTES, old + i * V::BYTES, 4);
            scale_of[l] = scale_of[from];
            sum_of[l] = sum_of[from];
        }
    }

   private:
    // One lane: 32 columns.
    static void one(const float* x, int columns, int l, int8_t* to, float* scale, float* sum) {
        alignas(64) float part[LANE] = {};
        const int start = l * LANE, count = columns - start < LANE ? columns - start : LANE;
        if (count > 0) std::memcpy(part, x + start, sizeof(float) * count);
        float most = 0;
        int broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
        for (int c = 0; c < LANE; ++c) {
            const float size = std::fabs(part[c]);
            most = size > most ? size : most;
            broken |= !(size <= FLT_MAX);
        }
        // smaller ones would make an infinite inverse
        const float inverse = most > 1e-30f && !broken ? 127 / most : 0.0f;
        alignas(64) int32_t whole[LANE];
        int32_t total = 0;
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < LANE; ++c) {
            // adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the lowest bits
            const float moved = (broken ? 0.0f : part[c] * inverse) + 12582912.0f;
            int32_t bits;
            std::memcpy(&bits, &moved, 4);
            whole[c] = bits - 0x4b400000;
            total += whole[c];
        }
        const float step = broken ? NAN : inverse > 0 ? most / 127 : 0.0f;
        *scale = step;
        *sum = step * static_cast<float>(total);
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 4; ++j) to[i * V::BYTES + j] = static_cast<int8_t>(whole[8 * j + 7 - i]);
        }
    }
};

}  // namespace
