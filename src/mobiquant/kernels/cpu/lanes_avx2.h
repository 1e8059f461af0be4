// 32 bytes of a plane at a time: eight sums of 32 columns.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Avx2 {
    static constexpr int BYTES = 32, LANES = 8, ROWS = 2;
    static constexpr int PART = 4;
    using Bytes = __m256i;
    using Floats = __m256;

    static Bytes zero() { return _mm256_setzero_si256(); }
    // what lies past `there` bytes is not touched and reads as zero
    static Bytes load(const uint8_t* from, int64_t there) {
        if (there >= BYTES) return whole(from);
        alignas(32) uint8_t part[BYTES] = {};
        std::memcpy(part, from, there);
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(part));
    }
    static Bytes whole(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static void store(uint8_t* to, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }
    // bits cross bytes here; every use masks them away
    template <int N>
    static Bytes left(Bytes a) { return _mm256_slli_epi16(a, N); }
    template <int N>
    static Bytes right(Bytes a) { return _mm256_srli_epi16(a, N); }
    static Bytes only(Bytes a, uint8_t mask) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask))); }
    static Bytes mix(Bytes a, Bytes b, uint8_t mask) {
        const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
        return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
    }

    // 16-bit sums: eight products of pairs are at most 8 * 2 * 15 * 127, which fits
    struct Sum {
        __m256i total = _mm256_setzero_si256();
        void add(Bytes code, const int8_t* q) {
            total = _mm256_add_epi16(total, _mm256_maddubs_epi16(code, whole(reinterpret_cast<const uint8_t*>(q))));
        }
        static Floats lanes(Sum a, Sum b) {
            a.total = _mm256_add_epi16(a.total, b.total);
            return a.lanes();
        }
        Floats lanes() const { return _mm256_cvtepi32_ps(_mm256_madd_epi16(total, _mm256_set1_epi16(1))); }
    };

    static Floats none() { return _mm256_setzero_ps(); }
    static Floats all(float a) { return _mm256_set1_ps(a); }
    static Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
    static void store_floats(float* to, Floats a) { _mm256_storeu_ps(to, a); }
    static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats fused_less(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
    static float sum(Floats a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    template <bool INSIDE>
    static Floats halves(const uint16_t* from, int64_t there, const int32_t* index) {
        __m128i stored;
        if (INSIDE || there >= 8) {
            stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        } else {
            alignas(16) uint16_t part[8] = {};
            std::memcpy(part, from, 2 * there);
            stored = _mm_load_si128(reinterpret_cast<const __m128i*>(part));
        }
        return _mm256_permutevar8x32_ps(_mm256_cvtph_ps(stored), whole(reinterpret_cast<const uint8_t*>(index)));
    }
    template <bool INSIDE>
    static Floats bytes(const uint8_t* from, int64_t there, const int32_t* index) {
        uint64_t stored = 0;
        std::memcpy(&stored, from, INSIDE || there >= 8 ? 8 : there);
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(stored)));
        return _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(wide, whole(reinterpret_cast<const uint8_t*>(index))));
    }
    static float half(uint16_t bits) { return _cvtsh_ss(bits); }
};

}  // namespace
