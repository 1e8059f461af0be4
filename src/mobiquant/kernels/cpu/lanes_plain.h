// Vectors that any compiler with GNU's vector extensions makes of what the machine has (SSE2, NEON, or none).
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Plain {
    static constexpr int BYTES = 32, LANES = BYTES / 4, ROWS = 2;
    // bits of a code that one dot product takes
    static constexpr int PART = 4;
    typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
    typedef float Floats __attribute__((vector_size(4 * LANES)));
    typedef int16_t Shorts __attribute__((vector_size(2 * BYTES)));
    typedef int8_t Signed __attribute__((vector_size(BYTES)));

    static Bytes zero() { return Bytes{}; }
    static Bytes load(const uint8_t* from, int64_t there) {
        Bytes made{};
        std::memcpy(&made, from, there < BYTES ? there : BYTES);
        return made;
    }
    static Bytes whole(const uint8_t* from) {
        Bytes made;
        std::memcpy(&made, from, BYTES);
        return made;
    }
    static void store(uint8_t* to, Bytes a) { std::memcpy(to, &a, BYTES); }
    template <int N>
    static Bytes left(Bytes a) { return a << N; }
    template <int N>
    static Bytes right(Bytes a) { return a >> N; }
    static Bytes only(Bytes a, uint8_t mask) { return a & mask; }
    // bits of `a` where the mask is one, of `b` elsewhere
    static Bytes mix(Bytes a, Bytes b, uint8_t mask) { return (a & mask) | (b & static_cast<uint8_t>(~mask)); }

    // sums of products of codes below 16 and signed bytes, up to eight of them
    struct Sum {
        Shorts total{};
        void add(Bytes code, const int8_t* q) {
            Signed s;
            std::memcpy(&s, q, BYTES);
            total += __builtin_convertvector(code, Shorts) * __builtin_convertvector(s, Shorts);
        }
        static Floats lanes(Sum a, Sum b) {
            a.total += b.total;
            return a.lanes();
        }
        Floats lanes() const {
            Floats made;
            for (int l = 0; l < LANES; ++l) {
                made[l] = static_cast<float>(total[4 * l] + total[4 * l + 1] + total[4 * l + 2] + total[4 * l + 3]);
            }
            return made;
        }
    };

    static Floats none() { return Floats{}; }
    static Floats all(float a) { return Floats{} + a; }
    static Floats load_floats(const float* from) {
        Floats made;
        std::memcpy(&made, from, sizeof made);
        return made;
    }
    static void store_floats(float* to, Floats a) { std::memcpy(to, &a, sizeof a); }
    static Floats multiply(Floats a, Floats b) { return a * b; }
    static Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
    static Floats fused_less(Floats a, Floats b, Floats c) { return c - a * b; }
    static float sum(Floats a) {
        float made = 0;
        for (int l = 0; l < LANES; ++l) made += a[l];
        return made;
    }
    // fp16 values, one for each lane, from `there` stored ones; `index` says which
    template <bool INSIDE>
    static Floats halves(const uint16_t* from, int64_t there, const int32_t* index) {
        Floats made;
        for (int l = 0; l < LANES; ++l) made[l] = half(INSIDE || index[l] < there ? from[index[l]] : uint16_t{0});
        return made;
    }
    template <bool INSIDE>
    static Floats bytes(const uint8_t* from, int64_t there, const int32_t* index) {
        Floats made;
        for (int l = 0; l < LANES; ++l) made[l] = INSIDE || index[l] < there ? from[index[l]] : 0;
        return made;
    }
    static float half(uint16_t bits) {
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
        // exponents are 112 apart; numbers below the normal ones come right by the product
        uint32_t widened = magnitude << 13;
        float value;
        std::memcpy(&value, &widened, 4);
        value *= 0x1p112f;
        std::memcpy(&widened, &value, 4);
        if (magnitude >= 0x7c00) widened |= 0x7f800000;
        widened |= sign;
        std::memcpy(&value, &widened, 4);
        return value;
    }
};

}  // namespace
