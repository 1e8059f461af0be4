// What the kernels need of the machine beyond plain C++, each thing once: on a GPU as PTX, in the tests on a CPU as code that
// does the same with 32 lanes in step (`tests/native/simt.h`, where EMULATED is set).

#pragma once

#include "types.h"

#ifdef EMULATED
#include "simt.h"
#else

#define DEVICE __device__ __forceinline__
// shared memory of a size that the launch sets, and one number
#define SHARED_BYTES(name) extern __shared__ __align__(16) u8 name[]
#define SHARED_INT(name) __shared__ int name

// weights pass once: they are kept out of L1; nothing is read where `wanted` is false
DEVICE Four fetch_four(const u8 *from, bool wanted) {
    Four to = {0, 0, 0, 0};
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
        : "l"(from), "r"((int)wanted));
    return to;
}

DEVICE Two fetch_two(const u8 *from, bool wanted) {
    Two to = {0, 0};
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(to.x), "+r"(to.y)
                 : "l"(from), "r"((int)wanted));
    return to;
}

DEVICE u32 fetch_one(const u8 *from, bool wanted) {
    u32 to = 0;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }" : "+r"(to) : "l"(from), "r"((int)wanted));
    return to;
}

// what another block may have written in this launch, or a launch before while this one was waiting for it
template <class T> DEVICE T load_fresh(const T *from) { return __ldcg(from); }
DEVICE Four load_fresh(const Four *from) {
    const uint4 to = __ldcg((const uint4 *)from);
    return {to.x, to.y, to.z, to.w};
}

// Launches of one stream overlap: the next may begin once all blocks of this one have said so, and touches nothing that this one
// reads or writes until it has waited for its end. Before Hopper both are nothing, and launches follow each other.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes from memory to shared memory, while this thread goes on
DEVICE void copy_16(u8 *to, const u8 *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
// what this thread has begun since is one group
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// all groups of this thread have arrived, but for the last `left`
template <int left> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }
// shared memory written by lanes of this warp is seen by its others
DEVICE void warp_sync() { __syncwarp(); }

// ask for bytes (a multiple of 16) to be brought to the second-level cache
DEVICE void prefetch(const u8 *from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// eight bytes that other blocks see as a whole or not at all
DEVICE void store_whole(Two *to, Two value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((u64)value.y << 32 | value.x) : "memory");
}
DEVICE Two load_whole(const Two *from) {
    u64 both;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(from) : "memory");
    return {(u32)both, (u32)(both >> 32)};
}

// add one where `wanted`; what was there before, which nobody waits for until it is used
DEVICE u32 count_up(u32 *at, bool wanted) {
    u32 before = 0;
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p atom.relaxed.gpu.global.add.u32 %0, [%1], 1; }"
                 : "+r"(before)
                 : "l"(at), "r"((int)wanted)
                 : "memory");
    return before;
}

DEVICE void pause() { __nanosleep(20); }

// The number of this thread, as if nothing were known of it: what follows from it is worked out where it is used, before a loop rather
// than once for all the kernel, where it would live too long for a register and be worked out again in each turn.
DEVICE u32 thread_anew() {
    u32 thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
}

// about two microseconds
DEVICE void linger() { __nanosleep(2000); }

// sums += a b: 16 rows of 32 codes by 32 rows of 8 columns of signed bytes
DEVICE void multiply_codes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// the same for signed bytes on both sides
DEVICE void multiply_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum + the products of the four signed bytes of each word
DEVICE int dot_bytes(u32 a, u32 b, int sum) { return __dp4a((int)a, (int)b, sum); }

// to the last bit or two
DEVICE float reciprocal(float value) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
    return out;
}

DEVICE float from_fp16(u16 value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value));
    return out;
}

DEVICE u16 to_fp16(float value) {
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

DEVICE float from_bf16(u16 value) { return __uint_as_float((u32)value << 16); }

// byte `which` of a word and 2^23: the byte put under the exponent
DEVICE float raised_byte(u32 word, int which) { return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + which)); }
// a byte below 128, and 128
DEVICE float raised_seven(u32 word, int which) { return __uint_as_float(__byte_perm(word, 0x43000000u, 0x7044 | which << 8)); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float whole_byte(u32 word, int which) { return raised_byte(word, which) - 8388608.0f; }

DEVICE u8 *aligned_1024(u8 *shared) { return shared + (-__cvta_generic_to_shared(shared) & 1023); }

// two numbers, the first in the lower half
DEVICE u32 two_fp16(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

DEVICE u32 two_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

DEVICE u16 to_bf16(float value) {
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

template <class T> DEVICE T shuffle_xor(T value, int by) { return __shfl_xor_sync(~0u, value, by); }
DEVICE int warp_max(int value) { return __reduce_max_sync(~0u, value); }
DEVICE bool warp_all(bool value) { return __all_sync(~0u, value); }

#endif

// numbers of the dtype that a kernel is compiled for
DEVICE float wide(u16 value) { return BF16 ? from_bf16(value) : from_fp16(value); }
DEVICE void widen(float (&to)[8], const Four &from) {
    const u32 twos[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = wide((u16)(twos[i / 2] >> (16 * (i % 2))));
}
DEVICE u16 narrow(float value) { return BF16 ? to_bf16(value) : to_fp16(value); }
DEVICE u32 narrow_two(float low, float high) { return BF16 ? two_bf16(low, high) : two_fp16(low, high); }
DEVICE Four narrowed(const float (&from)[8]) {
    return {narrow_two(from[0], from[1]), narrow_two(from[2], from[3]), narrow_two(from[4], from[5]), narrow_two(from[6], from[7])};
}
