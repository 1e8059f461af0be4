// Words and small structures that the kernels and their emulation share.

#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

struct alignas(16) Four {
    u32 x, y, z, w;
};
struct alignas(8) Two {
    u32 x, y;
};
struct alignas(8) Pair {
    float x, y;
};
struct alignas(16) FourFloats {
    float x, y, z, w;
};
