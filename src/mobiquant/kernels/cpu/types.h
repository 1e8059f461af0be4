// What Python hands over: plain structures of pointers, mirrored field by field in `library.py`.
#pragma once

#include <cstdint>

namespace mobiquant {

constexpr int MAX_BITS = 8;
// columns of one 32-bit sum: four bytes of a plane. Activations are quantised in blocks of as many.
constexpr int LANE = 32;

// A weight [rows, columns] as stored (`pack.py`, `slices.py`). `plane[p]` is bit p of the master code, highest first: [rows,
// ceil(columns / 8)] bytes, the first column of eight in the highest bit. `scale` is fp16, `zero` uint8, both [rows, groups].
struct Weight {
    const uint8_t* plane[MAX_BITS];
    const uint16_t* scale;
    const uint8_t* zero;
    const float* bias;  // [rows], or null
    int32_t rows, columns, group, base;
};

// A router as stored (`router.py`), for `hidden` features and `outputs` residual slices.
struct Router {
    const int8_t* weight;    // [hidden, columns]
    const uint16_t* scale;   // [hidden] fp16
    const float* rms;        // [hidden]
    const float* bias;       // [hidden]
    const float* out;        // [outputs, hidden]
    const float* out_bias;   // [outputs]
    int32_t hidden, outputs, columns;
};

// How deep tokens read: bits of each prefix, the deepest one that is allowed (counted from 1), and the threshold.
struct Reading {
    int32_t widths[MAX_BITS];
    int32_t cap, routed;
    float tau;
};

enum Linear { QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, LINEARS };

// A block of a decoder: norm, attention with rotary positions, norm, gated feed-forward. Linears with the same router (or
// none) that follow one another read the same input. `query_norm` and `key_norm` are null where the model has none.
struct Block {
    Weight linear[LINEARS];
    Router router[LINEARS];  // a null `weight` stands for the router of the linear before
    const float *first_norm, *second_norm, *query_norm, *key_norm;
    Router next;    // decides for the first linears of the next block, or null
    int32_t ahead;  // whether all routers read the input of the first linears; these may have none, and be decided for
};

struct Decoder {
    const Block* blocks;
    Weight head;
    const void* embedding;  // [vocabulary, width], of `embedding_type`: 0 fp32, 1 bf16, 2 fp16
    const float* final_norm;
    const float *cosine, *sine;  // [positions, head_size / 2]
    float *keys, *values;        // [blocks, key_heads, positions, head_size]
    int32_t count, width, heads, key_heads, head_size, inner, vocabulary, positions, embedding_type;
    // the head is read at so many bits first, and at all of them for so many of the best rows
    int32_t first_bits, best;
    float epsilon, attention_scale;
};

// columns of a block of a descent at most
constexpr int DESCENT_COLUMNS = 64;

// A block of columns, `start` to `stop`, of a descent over the codes of a weight [rows, columns]; whatever has rows is transposed.
struct Descent {
    const float *gradient, *hessian;  // [depths, stop - start, rows], [depths, columns, columns]
    const float* scale;               // [columns, rows]
    const float *diagonal, *weights;  // [columns, depths]
    const float* tails;               // [columns, depths of more than `search_bits`, depths]
    uint8_t* chosen;                  // [columns, rows]
    float* moved;                     // [depths, stop - start, rows]
    int32_t widths[MAX_BITS];
    int32_t depths, columns, rows, base, search_bits, start, stop;
};

// What an instruction set brings; one table for each in its own file.
struct Table {
    const char* name;
    // y [tokens, rows] = x [tokens, columns] W^T + bias, token t reading `bits[t]` bits; 0 where memory is out
    int (*product)(const Weight& weight, const float* x, int tokens, const int8_t* bits, float* y);
    // the weight at `bits`: out [rows, columns] of fp32, or of bf16 where `narrow` is not 0
    void (*read)(const Weight& weight, int bits, int narrow, void* out);
    // logits of the token after `token`, which stands at `position`; adds the weights read at each depth to `counts`
    int (*decode)(const Decoder& model, const Reading& reading, int token, int position, float* logits, double* counts);
    // choose the codes of the block anew, in place; says in `moved` by how much that moved the weights
    void (*descend)(const Descent& work);
};

extern const Table PLAIN;
#if defined(__x86_64__)
extern const Table AVX2, AVX512;
#elif defined(__aarch64__)
extern const Table NEON;
#endif

}  // namespace mobiquant
