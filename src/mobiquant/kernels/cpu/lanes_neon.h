// 32 bytes of a plane at a time, in two registers: eight sums of 32 columns, by the dot products of Armv8.2.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct Neon {
    static constexpr int BYTES = 32, LANES = 8, ROWS = 2;
    // products are signed on both sides, so the eighth bit of a code is a part of its own
    static constexpr int PART = 7;
    using Bytes = uint8x16x2_t;
    using Floats = float32x4x2_t;

    template <class To, class A, class F>
    static To each(A a, F f) { return {{f(a.val[0]), f(a.val[1])}}; }
    template <class To, class A, class B, class F>
    static To each(A a, B b, F f) { return {{f(a.val[0], b.val[0]), f(a.val[1], b.val[1])}}; }
    template <class F>
    static Floats each(Floats a, Floats b, Floats c, F f) {
        return {{f(a.val[0], b.val[0], c.val[0]), f(a.val[1], b.val[1], c.val[1])}};
    }

    static Bytes zero() { return {{vdupq_n_u8(0), vdupq_n_u8(0)}}; }
    // what lies past `there` bytes is not touched and reads as zero
    static Bytes load(const uint8_t* from, int64_t there) {
        if (there >= BYTES) return whole(from);
        uint8_t part[BYTES] = {};
        std::memcpy(part, from, there);
        return whole(part);
    }
    static Bytes whole(const uint8_t* from) { return {{vld1q_u8(from), vld1q_u8(from + 16)}}; }
    static void store(uint8_t* to, Bytes a) { vst1q_u8(to, a.val[0]), vst1q_u8(to + 16, a.val[1]); }
    template <int N>
    static Bytes left(Bytes a) { return each<Bytes>(a, [](uint8x16_t v) { return vshlq_n_u8(v, N); }); }
    template <int N>
    static Bytes right(Bytes a) { return each<Bytes>(a, [](uint8x16_t v) { return vshrq_n_u8(v, N); }); }
    static Bytes only(Bytes a, uint8_t mask) { return each<Bytes>(a, [=](uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(mask)); }); }
    static Bytes mix(Bytes a, Bytes b, uint8_t mask) {
        return each<Bytes>(a, b, [=](uint8x16_t v, uint8x16_t w) { return vbslq_u8(vdupq_n_u8(mask), v, w); });
    }

    struct Sum {
        int32x4x2_t total = {{vdupq_n_s32(0), vdupq_n_s32(0)}};
        void add(Bytes code, const int8_t* q) {
            total.val[0] = vdotq_s32(total.val[0], vreinterpretq_s8_u8(code.val[0]), vld1q_s8(q));
            total.val[1] = vdotq_s32(total.val[1], vreinterpretq_s8_u8(code.val[1]), vld1q_s8(q + 16));
        }
        static Floats lanes(Sum a, Sum b) {
            a.total = each<int32x4x2_t>(a.total, b.total, [](int32x4_t v, int32x4_t w) { return vaddq_s32(v, w); });
            return a.lanes();
        }
        Floats lanes() const { return each<Floats>(total, [](int32x4_t v) { return vcvtq_f32_s32(v); }); }
    };

    static Floats none() { return all(0); }
    static Floats all(float a) { return {{vdupq_n_f32(a), vdupq_n_f32(a)}}; }
    static Floats load_floats(const float* from) { return {{vld1q_f32(from), vld1q_f32(from + 4)}}; }
    static void store_floats(float* to, Floats a) { vst1q_f32(to, a.val[0]), vst1q_f32(to + 4, a.val[1]); }
    static Floats multiply(Floats a, Floats b) {
        return each<Floats>(a, b, [](float32x4_t v, float32x4_t w) { return vmulq_f32(v, w); });
    }
    static Floats fused(Floats a, Floats b, Floats c) {
        return each(a, b, c, [](float32x4_t v, float32x4_t w, float32x4_t x) { return vfmaq_f32(x, v, w); });
    }
    static Floats fused_less(Floats a, Floats b, Floats c) {
        return each(a, b, c, [](float32x4_t v, float32x4_t w, float32x4_t x) { return vfmsq_f32(x, v, w); });
    }
    static float sum(Floats a) { return vaddvq_f32(vaddq_f32(a.val[0], a.val[1])); }

    // floats number `index` of eight, by their bytes
    static Floats pick(Floats from, const int32_t* index) {
        const uint8x16x2_t table = each<Bytes>(from, [](float32x4_t v) { return vreinterpretq_u8_f32(v); });
        const uint32x4x2_t at = {{vreinterpretq_u32_s32(vld1q_s32(index)), vreinterpretq_u32_s32(vld1q_s32(index + 4))}};
        return each<Floats>(at, [=](uint32x4_t i) {
            const uint32x4_t four = vmlaq_n_u32(vdupq_n_u32(0x03020100), i, 0x04040404);
            return vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(four)));
        });
    }
    template <bool INSIDE>
    static Floats halves(const uint16_t* from, int64_t there, const int32_t* index) {
        uint16_t part[LANES] = {};
        if (!INSIDE && there < LANES) std::memcpy(part, from, 2 * there), from = part;
        const float16x8_t stored = vreinterpretq_f16_u16(vld1q_u16(from));
        return pick({{vcvt_f32_f16(vget_low_f16(stored)), vcvt_high_f32_f16(stored)}}, index);
    }
    template <bool INSIDE>
    static Floats bytes(const uint8_t* from, int64_t there, const int32_t* index) {
        uint8_t part[LANES] = {};
        if (!INSIDE && there < LANES) std::memcpy(part, from, there), from = part;
        const uint16x8_t wide = vmovl_u8(vld1_u8(from));
        return pick({{vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))}}, index);
    }
    static float half(uint16_t bits) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0); }
};

}  // namespace
