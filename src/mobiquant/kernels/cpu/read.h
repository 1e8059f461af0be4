// A whole weight at a depth as floats, for products with so many tokens that a dense product of torch is the faster one.
#pragma once

#include "pool.h"
#include "product.h"

namespace {

// Eight bits as eight bytes, the highest bit at the lowest address: every factor of the product moves a copy of the byte, and
// the highest bit of byte k of the sum is bit 7 - k of the copy there.
inline uint64_t spread(uint8_t bits) { return (bits * 0x8040201008040201ull & 0x8080808080808080ull) >> 7; }

inline uint16_t rounded_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rows `from` to `to`; `out` is [rows, columns] of fp32, or of bf16 where `narrow` is set. Values are those of
// `slices.dequantize`, with its one rounding.
template <class V>
void read_rows(const Weight& w, int bits, int from, int to, int narrow, void* out) {
    const int bytes = (w.columns + 7) / 8, groups = (w.columns + w.group - 1) / w.group;
    const float cell = std::ldexp(1.0f, w.base - bits), step = std::ldexp(1.0f, w.base - 8), middle = 0.5f - cell / 2;
    constexpr int TILE = 32;  // bytes of a plane at a time
    alignas(64) uint8_t code[8 * TILE];
    alignas(64) float value[8 * TILE];
    for (int64_t row = from; row < to; ++row) {
        for (int start = 0; start < bytes; start += TILE) {
            const int count = bytes - start < TILE ? bytes - start : TILE;
            for (int j = 0; j < count; ++j) {
                uint64_t made = 0;
                for (int p = 0; p < bits; ++p) made = made << 1 | spread(w.plane[p][row * bytes + start + j]);
                std::memcpy(code + 8 * j, &made, 8);
            }
            const int first = 8 * start, last = first + 8 * count < w.columns ? first + 8 * count : w.columns;
            for (int column = first; column < last;) {
                const int group = column / w.group, end = (group + 1) * w.group < last ? (group + 1) * w.group : last;
                const float scale = V::half(w.scale[row * groups + group]);
                const float shift = static_cast<float>(w.zero[row * groups + group]) * step + middle;
#pragma omp simd
                for (int k = column; k < end; ++k) {
                    value[k - first] = (static_cast<float>(code[k - first]) * cell - shift) * scale;
                }
                column = end;
            }
            const int64_t at = row * w.columns + first;
            if (narrow) {
                uint16_t* const to_bf16 = static_cast<uint16_t*>(out) + at;
#pragma omp simd
                for (int k = 0; k < last - first; ++k) to_bf16[k] = rounded_to_bf16(value[k]);
            } else {
                std::memcpy(static_cast<float*>(out) + at, value, sizeof(float) * (last - first));
            }
        }
    }
}

template <class V>
void read(const Weight& w, int bits, int narrow, void* out) {
    constexpr int STEP = 16;
    parallel((w.rows + STEP - 1) / STEP, [&](int chunk) {
        const int from = chunk * STEP, to = from + STEP < w.rows ? from + STEP : w.rows;
        read_rows<V>(w, bits, from, to, narrow, out);
    });
}

}  // namespace
