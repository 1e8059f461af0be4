// What only Hopper has, each thing once: copies of whole tiles that report to a barrier, clusters of blocks that reach each other's
// shared memory, products of four warps with a matrix in shared memory, and how results are laid down. Emulated in the tests like
// `device.h`.
//
// A tile of x in shared memory is a row of 64 numbers (128 bytes) for each token, 8 tokens in 1024 bytes; the 16 bytes n of token t
// lie at place n ^ (t % 8) of its row (the 128-byte swizzle of the PTX manual).

#pragma once

#include "device.h"

DEVICE int place_of_sixteen(int token, int n) { return token * 128 + (n ^ (token & 7)) * 16; }

#ifndef EMULATED

// A barrier in shared memory: a phase ends once `count` have come and all bytes that were announced have arrived.
typedef u64 Barrier;
DEVICE u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void set_up(Barrier *at, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory"); }
// barriers that were set up are seen by copies
DEVICE void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void come(Barrier *at) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(at)) : "memory"); }
// come, and announce bytes
DEVICE void announce(Barrier *at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes) : "memory");
}
// until phase `number` (0, 1, ..) has ended, of which at most one has since
DEVICE void wait_for_phase(Barrier *at, int number) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @done bra.uni ended; bra.uni again; ended: }" ::"r"(
            shared_address(at)),
        "r"(number & 1)
        : "memory");
}
// bytes (a multiple of 16) to shared memory, announced at a barrier
DEVICE void copy_tile(u8 *to, const u8 *from, u32 bytes, Barrier *at) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes), "r"(shared_address(at))
                 : "memory");
}

// Blocks of a cluster, which the launch makes, run at the same time and have their shared memory at the same places. All threads of
// all blocks meet, in two parts: what they did before `come_to_cluster` is done after `wait_for_cluster`.
DEVICE void come_to_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// the same with nothing done but reads, whose values are known here: waits for no writes
DEVICE void come_with_reads() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// where another block has what lies at this place here
DEVICE u32 address_in(const void *at, int rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
    return there;
}
DEVICE FourFloats load_from(const float *at, int rank) {
    FourFloats to;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w)
                 : "r"(address_in(at, rank))
                 : "memory");
    return to;
}

// registers of each thread of a group of four warps from here on: some that others have left, or fewer
template <int count> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEVICE void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }

// registers are as they should be for the products to come
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// all groups of products are done, but for the last `left`
template <int left> DEVICE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory"); }

// 16 columns of a tile of x, from number 16 * step; the tile is so many bytes beyond another
typedef u64 View;
DEVICE View view_of(const u8 *tile) {
    return (__cvta_generic_to_shared(tile) & 0x3ffff) >> 4 | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
DEVICE View view_beyond(View tile, int bytes, int step) { return (tile & ~(u64)~0u) | (u32)((u32)tile + (bytes + step * 32) / 16); }

#define FOUR(n) "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9, "
#define HELD(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#if BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif

// d += a b: 64 rows of 16 weights, those of a warp in its lanes, by 16 columns of 64, 128 or 256 tokens
DEVICE void multiply_tokens(float (&d)[32], const u32 (&a)[4], View b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." KIND
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " FOUR(1) FOUR(2) "%30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : HELD(0), HELD(8), HELD(16), HELD(24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void multiply_tokens(float (&d)[64], const u32 (&a)[4], View b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." KIND
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " FOUR(1) FOUR(2) FOUR(3) FOUR(4) FOUR(5)
                 "%60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : HELD(0), HELD(8), HELD(16), HELD(24), HELD(32), HELD(40), HELD(48), HELD(56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

DEVICE void multiply_tokens(float (&d)[128], const u32 (&a)[4], View b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16." KIND
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " FOUR(1) FOUR(2) FOUR(3) FOUR(4) FOUR(5) FOUR(6) FOUR(7) FOUR(8) FOUR(9) FOUR(10)
                 FOUR(11) "%120, %121, %122, %123, %124, %125, %126, %127}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
                 : HELD(0), HELD(8), HELD(16), HELD(24), HELD(32), HELD(40), HELD(48), HELD(56), HELD(64), HELD(72), HELD(80), HELD(88),
                   HELD(96), HELD(104), HELD(112), HELD(120)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// four squares of 8 x 8 to shared memory, turned; lane 8 i + n says where row n of square i goes
DEVICE void store_turned(u8 *to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"((u32)__cvta_generic_to_shared(to)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

#endif
