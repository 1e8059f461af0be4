// The plain C interface that Python loads, and the choice of an instruction set.
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "pool.h"
#include "types.h"

namespace mobiquant {
namespace {

const Table* tables[3];
int count = 0;
const Table* chosen = nullptr;

#if defined(__aarch64__)
// Whether the processor has the dot products of bytes that came with Armv8.2.
bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
#else
    return false;
#endif
}
#endif

// The tables that this machine can run, best last.
void find() {
    if (count) return;
    tables[count++] = &PLAIN;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        tables[count++] = &AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni")) {
            tables[count++] = &AVX512;
        }
    }
#elif defined(__aarch64__)
    if (has_dot_products()) tables[count++] = &NEON;
#endif
    chosen = tables[count - 1];
}

}  // namespace
}  // namespace mobiquant

using namespace mobiquant;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Counted up whenever a structure or a function here changes; Python refuses a library of another number.
EXPORTED int mobiquant_version() { return 2; }

// Sizes of Weight, Router, Reading, Block, Decoder and Descent, for Python to compare with its own.
EXPORTED void mobiquant_sizes(int* sizes) {
    const int own[6] = {sizeof(Weight), sizeof(Router), sizeof(Reading), sizeof(Block), sizeof(Decoder), sizeof(Descent)};
    std::memcpy(sizes, own, sizeof own);
}

// Name of the `number`-th instruction set that works here, or null.
EXPORTED const char* mobiquant_instructions(int number) {
    find();
    return number < 0 || number >= count ? nullptr : tables[number]->name;
}

// Use the instruction set of that name; 0 where it does not work here.
EXPORTED int mobiquant_use(const char* name) {
    find();
    for (int k = 0; k < count; ++k) {
        if (std::strcmp(tables[k]->name, name) == 0) {
            chosen = tables[k];
            return 1;
        }
    }
    return 0;
}

EXPORTED int mobiquant_product(const Weight* weight, const float* x, int tokens, const signed char* bits, float* y,
                               int thread_count) {
    find();
    set_threads(thread_count);
    return tokens == 0 || chosen->product(*weight, x, tokens, reinterpret_cast<const int8_t*>(bits), y);
}

EXPORTED void mobiquant_read(const Weight* weight, int bits, int narrow, void* out, int thread_count) {
    find();
    set_threads(thread_count);
    chosen->read(*weight, bits, narrow, out);
}

EXPORTED int mobiquant_decode(const Decoder* model, const Reading* reading, int token, int position, float* logits,
                              double* counts, int thread_count) {
    find();
    set_threads(thread_count);
    return chosen->decode(*model, *reading, token, position, logits, counts);
}

EXPORTED void mobiquant_descend(const Descent* work, int thread_count) {
    find();
    set_threads(thread_count);
    chosen->descend(*work);
}

}  // extern "C"
