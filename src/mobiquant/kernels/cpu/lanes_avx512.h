// 64 bytes of a plane at a time: sixteen sums of 32 columns, by the dot products of VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Avx512 {
    static constexpr int BYTES = 64, LANES = 16, ROWS = 4;
    static constexpr int PART = 8;
    using Bytes = __m512i;
    using Floats = __m512;

    static Bytes zero() { return _mm512_setzero_si512(); }
    // what lies past `there` bytes is not touched and reads as zero
    static Bytes load(const uint8_t* from, int64_t there) {
        if (there >= BYTES) return whole(from);
        return _mm512_maskz_loadu_epi8((uint64_t{1} << there) - 1, from);
    }
    static Bytes whole(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static void store(uint8_t* to, Bytes a) { _mm512_storeu_si512(to, a); }
    // bits cross bytes here; every use masks them away
    template <int N>
    static Bytes left(Bytes a) { return _mm512_slli_epi16(a, N); }
    template <int N>
    static Bytes right(Bytes a) { return _mm512_srli_epi16(a, N); }
    static Bytes only(Bytes a, uint8_t mask) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask))); }
    static Bytes mix(Bytes a, Bytes b, uint8_t mask) {
        // 0xca: where the first is set the second, else the third
        return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xca);
    }

    struct Sum {
        __m512i total = _mm512_setzero_si512();
        void add(Bytes code, const int8_t* q) {
            total = _mm512_dpbusd_epi32(total, code, whole(reinterpret_cast<const uint8_t*>(q)));
        }
        static Floats lanes(Sum a, Sum b) {
            a.total = _mm512_add_epi32(a.total, b.total);
            return a.lanes();
        }
        Floats lanes() const { return _mm512_cvtepi32_ps(total); }
    };

    static Floats none() { return _mm512_setzero_ps(); }
    static Floats all(float a) { return _mm512_set1_ps(a); }
    static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
    static void store_floats(float* to, Floats a) { _mm512_storeu_ps(to, a); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats fused_less(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
    static float sum(Floats a) { return _mm512_reduce_add_ps(a); }
    static __mmask16 first(int64_t there) { return there >= 16 ? 0xffff : static_cast<__mmask16>((1u << there) - 1); }
    template <bool INSIDE>
    static Floats halves(const uint16_t* from, int64_t there, const int32_t* index) {
        const __m256i stored = _mm256_maskz_loadu_epi16(INSIDE ? 0xffff : first(there), from);
        return _mm512_permutexvar_ps(whole(reinterpret_cast<const uint8_t*>(index)), _mm512_cvtph_ps(stored));
    }
    template <bool INSIDE>
    static Floats bytes(const uint8_t* from, int64_t there, const int32_t* index) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(INSIDE ? 0xffff : first(there), from));
        return _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(whole(reinterpret_cast<const uint8_t*>(index)), wide));
    }
    static float half(uint16_t bits) { return _cvtsh_ss(bits); }
};

}  // namespace
