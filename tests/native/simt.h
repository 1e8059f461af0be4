// CUDA on a CPU, for tests: every thread of every block is a fiber, and the lanes of a warp meet where they exchange values.
//
// Fibers run one at a time, in an order that is drawn anew on every turn, so a barrier that is missing shows as a wrong result.
// This stands in for the machine in `device.h`; the products of the tensor cores follow the layout of fragments that the PTX manual gives.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "types.h"

#define DEVICE static inline
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SHARED_BYTES(name) u8 *name = simt::shared()
#define SHARED_INT(name) int &name = simt::now->block->said

namespace simt {

struct Index {
    unsigned x;
};

struct Warp {
    alignas(64) u32 held[2][32][8];
    int arrived = 0, turn = 0;
};

struct Copy {
    u8 *to;
    const u8 *from;
    size_t bytes;
};

struct Block {
    std::vector<u8> memory;
    std::vector<Warp> warps;
    std::vector<std::pair<void *, std::function<void()>>> tiles;
    std::vector<Block *> cluster;
    int said = 0, arrived = 0, turn = 0, threads = 0, ended = 0, rank = 0;
    unsigned begins = 0;            // turns before it does
    int together = 0, meeting = 0;  // of the first block of a cluster: threads that have come, and how often all did
    // as far beyond a multiple of 1024 in all blocks, as their shared memory is in a cluster
    u8 *shared() { return (u8 *)(((uintptr_t)memory.data() + 1023) & ~(uintptr_t)1023) + 64; }
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    Block *block;
    unsigned thread, number;
    jmp_buf place;
    bool begun = false, ended = false;
    int meeting = 0;
    std::vector<Copy> copies;
    std::vector<size_t> groups;
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline Thread *now;
inline jmp_buf home;
inline std::function<void()> body;
inline unsigned blocks;
inline std::function<void()> late;
inline u32 state;
constexpr size_t STACK = 96 << 10;

inline u8 *shared() { return now->block->shared(); }

// what lies at this place of shared memory in another block of the cluster, none of whose threads may have left
template <class T> inline T *in_block(T *at, int rank) {
    Block *other = now->block->cluster[rank];
    if (other->ended) std::fprintf(stderr, "a block that has ended is reached for\n"), std::abort();
    return (T *)(other->shared() + ((u8 *)at - shared()));
}

// swapcontext asks the system for signal masks each time; jumps do not
inline void yield() {
    if (!_setjmp(now->place)) _longjmp(home, 1);
}

__attribute__((noinline)) inline void resume(Thread *thread) {
    now = thread;
    if (_setjmp(home)) return;
    if (thread->begun) _longjmp(thread->place, 1);
    thread->begun = true;
    setcontext(&thread->context);
}

inline void entry() {
    body();
    now->ended = true;
    yield();
}

// run `work` in every thread of a launch of blocks in clusters
inline void launch(unsigned grid, unsigned per_block, size_t memory, unsigned cluster, unsigned seed, std::function<void()> work) {
    std::vector<std::unique_ptr<Block>> made;
    threads.clear(), body = work, blocks = grid;
    for (unsigned b = 0; b < grid; b++) {
        made.push_back(std::make_unique<Block>());
        made[b]->memory.resize(memory + 1088, 0xff), made[b]->warps.resize(per_block / 32), made[b]->threads = per_block;
        for (unsigned t = 0; t < per_block; t++) {
            auto one = std::make_unique<Thread>();
            one->stack.reset(new u8[STACK]), one->block = made[b].get(), one->thread = t, one->number = b;
            getcontext(&one->context);
            one->context.uc_stack.ss_sp = one->stack.get(), one->context.uc_stack.ss_size = STACK, one->context.uc_link = nullptr;
            makecontext(&one->context, entry, 0);
            threads.push_back(std::move(one));
        }
    }
    if (grid % cluster) std::fprintf(stderr, "%u blocks in clusters of %u\n", grid, cluster), std::abort();
    for (unsigned b = 0; b < grid; b++) {
        made[b]->rank = b % cluster;
        for (unsigned i = 0; i < cluster; i++) made[b]->cluster.push_back(made[b - b % cluster + i].get());
    }
    u64 state = seed * 2654435761ull + 1;
    const auto draw = [&] { return state = state * 6364136223846793005ull + 1442695040888963407ull; };
    for (auto &block : made) block->begins = (draw() >> 33) % 8;
    unsigned turns = 0;
    for (size_t left = threads.size(), idle = 0; left; turns++) {
        draw();
        const size_t start = (state >> 33) % threads.size(), before = left;
        for (size_t i = 0; i < threads.size(); i++) {
            Thread *one = threads[(start + i) % threads.size()].get();
            if (one->ended || turns < one->block->begins) continue;
            resume(one);
            left -= one->ended, one->block->ended += one->ended;
        }
        idle = left == before ? idle + 1 : 0;
        if (idle > 2000000) std::fprintf(stderr, "threads wait for each other\n"), std::abort();
    }
}

// the values of all lanes of this warp, in the order of lanes, once all have come
inline u32 (*meet(const u32 *own, int count))[8] {
    Warp &warp = now->block->warps[now->thread / 32];
    const int turn = warp.turn;
    std::memcpy(warp.held[turn % 2][now->thread % 32], own, count * sizeof(u32));
    if (++warp.arrived == 32) warp.arrived = 0, warp.turn++;
    while (warp.turn == turn) yield();
    return warp.held[turn % 2];
}

template <bool a_signed> inline void multiply(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto all = meet(own, 6);
    const int lane = now->thread % 32;
    const auto byte = [](u32 word, int i, bool with_sign) {
        const u8 value = word >> (8 * i);
        return with_sign ? (int)(signed char)value : (int)value;
    };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; k++) {
            const int at = row % 8 * 4 + k % 16 / 4, from = column * 4 + k % 16 / 4;
            c[i] += byte(all[at][row / 8 + k / 16 * 2], k % 4, a_signed) * byte(all[from][4 + k / 16], k % 4, true);
        }
    }
}

}  // namespace simt

#define threadIdx (simt::Index{simt::now->thread})
#define blockIdx (simt::Index{simt::now->number})
#define gridDim (simt::Index{simt::blocks})

inline void __syncthreads() {
    simt::Block &block = *simt::now->block;
    const int turn = block.turn;
    if (++block.arrived == block.threads) block.arrived = 0, block.turn++;
    while (block.turn == turn) simt::yield();
}
inline void __threadfence() { simt::yield(); }
inline void pause() { simt::yield(); }
inline void linger() {}
inline u32 thread_anew() { return threadIdx.x; }
inline u32 count_up(u32 *at, bool wanted) { return wanted ? (*at)++ : 0; }
template <class T, class V> inline T atomicAdd(T *to, V by) {
    const T before = *to;
    *to += by;
    return before;
}

inline u32 __float_as_uint(float v) { u32 out; std::memcpy(&out, &v, 4); return out; }
inline float __uint_as_float(u32 v) { float out; std::memcpy(&out, &v, 4); return out; }

inline Four fetch_four(const u8 *from, bool wanted) { Four to = {0, 0, 0, 0}; if (wanted) std::memcpy(&to, from, 16); return to; }
inline Two fetch_two(const u8 *from, bool wanted) { Two to = {0, 0}; if (wanted) std::memcpy(&to, from, 8); return to; }
inline u32 fetch_one(const u8 *from, bool wanted) { u32 to = 0; if (wanted) std::memcpy(&to, from, 4); return to; }
template <class T> inline T load_fresh(const T *from) { return *from; }
inline void let_next_begin() {}
// what the launch before writes at its very end
inline void wait_for_last() {
    if (simt::late) std::exchange(simt::late, nullptr)();
}
inline void prefetch(const u8 *, u32) {}
// copies arrive at once or when they are waited for
inline void copy_16(u8 *to, const u8 *from) {
    if ((simt::state += 0x9e3779b9u) >> 31) std::memcpy(to, from, 16);
    simt::now->copies.push_back({to, from, 16});
}
inline void copies_end() { simt::now->groups.push_back(simt::now->copies.size()); }
template <int left> inline void wait_for_copies() {
    auto &groups = simt::now->groups;
    auto &copies = simt::now->copies;
    const size_t keep = groups.size() > left ? groups.size() - left : 0, done = keep ? groups[keep - 1] : 0;
    for (size_t i = 0; i < done; i++) std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
    copies.erase(copies.begin(), copies.begin() + done), groups.erase(groups.begin(), groups.begin() + keep);
    for (size_t &end : groups) end -= done;
}
inline void warp_sync() { const u32 none = 0; simt::meet(&none, 1); }
inline void store_whole(Two *to, Two value) { *to = value; }
inline Two load_whole(const Two *from) { return *from; }

inline void multiply_codes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { simt::multiply<false>(c, a, b0, b1); }
inline void multiply_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { simt::multiply<true>(c, a, b0, b1); }

inline int dot_bytes(u32 a, u32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int)(signed char)(a >> i) * (int)(signed char)(b >> i);
    return sum;
}
inline float reciprocal(float value) { return 1 / value; }
inline float from_fp16(u16 v) { _Float16 h; std::memcpy(&h, &v, 2); return (float)h; }
inline u16 to_fp16(float v) { const _Float16 h = (_Float16)v; u16 out; std::memcpy(&out, &h, 2); return out; }
inline float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
inline u16 to_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float raised_byte(u32 word, int which) { return __uint_as_float(0x4b000000u | (word >> (8 * which) & 255)); }
inline float raised_seven(u32 word, int which) { return __uint_as_float(0x43000000u | (word >> (8 * which) & 255) << 16); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float whole_byte(u32 word, int which) { return (float)(word >> (8 * which) & 255); }
inline u8 *aligned_1024(u8 *shared) { return (u8 *)(((uintptr_t)shared + 1023) & ~(uintptr_t)1023); }

// tiles arrive when their barrier is waited for
struct Barrier {
    u8 count, left;
    u16 phase;
    int bytes;
};
inline void set_up(Barrier *at, int count) { *at = {(u8)count, (u8)count, 0, 0}; }
inline void show_barriers() {}
inline void settle_barrier(Barrier *at) {
    if (at->left || at->bytes) return;
    at->phase++, at->left = at->count;
}
// shared memory is full of ones at first
inline void check_barrier(const Barrier *at) {
    if (at->count == 255) std::fprintf(stderr, "a barrier that was not set up is reported to\n"), std::abort();
}
inline void come(Barrier *at) { check_barrier(at), at->left--, settle_barrier(at); }
inline void announce(Barrier *at, u32 bytes) { at->bytes += bytes, come(at); }
inline void send_tile(simt::Block *block, u8 *to, const u8 *from, u32 bytes, Barrier *at) {
    if (((uintptr_t)to | (uintptr_t)from | bytes) % 16) std::fprintf(stderr, "a copy that is not aligned\n"), std::abort();
    check_barrier(at);
    block->tiles.push_back({at, [=] { std::memcpy(to, from, bytes), at->bytes -= bytes, settle_barrier(at); }});
}
inline void copy_tile(u8 *to, const u8 *from, u32 bytes, Barrier *at) { send_tile(simt::now->block, to, from, bytes, at); }

inline void come_to_cluster() {
    simt::Block &first = *simt::now->block->cluster[0];
    simt::now->meeting = first.meeting;
    if (++first.together == first.threads * (int)simt::now->block->cluster.size()) first.together = 0, first.meeting++;
}
inline void come_with_reads() { come_to_cluster(); }
inline void wait_for_cluster() {
    while (simt::now->block->cluster[0]->meeting == simt::now->meeting) simt::yield();
}
inline FourFloats load_from(const float *at, int rank) { return *(const FourFloats *)simt::in_block(at, rank); }
inline void wait_for_phase(Barrier *at, int number) {
    while (((int)at->phase & 1) == (number & 1)) {
        auto &tiles = simt::now->block->tiles;
        for (size_t i = 0; i < tiles.size(); i++) {
            if (tiles[i].first != at) continue;
            const auto arrive = tiles[i].second;
            tiles.erase(tiles.begin() + i), arrive();
            break;
        }
        if (((int)at->phase & 1) == (number & 1)) simt::yield();
    }
}
template <int count> inline void take_registers() {}
template <int count> inline void leave_registers() {}
// products with a matrix in shared memory are done at once
inline void products_begin() {}
inline void products_end() {}
template <int left> inline void wait_for_products() {}
struct View {
    const u8 *tile;
    int step;
};
inline View view_of(const u8 *tile) { return {tile, 0}; }
inline View view_beyond(View tile, int bytes, int step) { return {tile.tile + bytes, step}; }
inline float wide_bits(u16 value) { return BF16 ? from_bf16(value) : from_fp16(value); }
template <int count> inline void multiply_tokens(float (&d)[count], const u32 (&a)[4], View b) {
    const auto all = simt::meet(a, 4);
    const int lane = simt::now->thread % 32;
    for (int i = 0; i < count; i++) {
        const int row = lane / 4, upper = i / 2 % 2, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const u32 weights = all[row * 4 + k % 8 / 2][upper + k / 8 * 2];
            const int sixteen = (b.step * 2 + k / 8) ^ (token & 7);
            u16 x;
            std::memcpy(&x, b.tile + token * 128 + sixteen * 16 + k % 8 * 2, 2);
            d[i] += wide_bits((u16)(weights >> (16 * (k % 2)))) * wide_bits(x);
        }
    }
}
inline void store_turned(u8 *to, u32 a, u32 b, u32 c, u32 d) {
    const int lane = simt::now->thread % 32;
    const u64 own = (u64)to;
    const u32 words[6] = {a, b, c, d, (u32)own, (u32)(own >> 32)};
    const auto all = simt::meet(words, 6);
    for (int square = 0; square < 4; square++)
        for (int e = 0; e < 2; e++) {
            const int row = lane % 4 * 2 + e, column = lane / 4;
            const u32 *at = all[square * 8 + row] + 4;
            const u16 value = words[square] >> (16 * e);
            std::memcpy((u8 *)((u64)at[1] << 32 | at[0]) + column * 2, &value, 2);
        }
}
inline u32 two_fp16(float low, float high) { return to_fp16(low) | (u32)to_fp16(high) << 16; }
inline u32 two_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }

template <class T> inline T shuffle_xor(T value, int by) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    const u32 got = simt::meet(&bits, 1)[(simt::now->thread % 32) ^ by][0];
    T out;
    std::memcpy(&out, &got, 4);
    return out;
}
inline int warp_max(int value) {
    const u32 bits = (u32)value;
    const auto all = simt::meet(&bits, 1);
    int most = (int)all[0][0];
    for (int i = 1; i < 32; i++) most = (int)all[i][0] > most ? (int)all[i][0] : most;
    return most;
}
inline bool warp_all(bool value) {
    const u32 bits = value;
    const auto all = simt::meet(&bits, 1);
    for (int i = 0; i < 32; i++)
        if (!all[i][0]) return false;
    return true;
}
