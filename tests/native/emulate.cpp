// One kernel of the GPU as a function on a CPU: KERNEL is its name, the other definitions those that it is compiled with.
#define EMULATED
#define TEXT(name) #name
#define FILE_OF(name) TEXT(../../src/mobiquant/kernels/cuda/name.cu)
#include FILE_OF(KERNEL)

// bytes that change while the next launch has begun, before it has waited for the one before
extern "C" void change_late(void *to, const void *from, unsigned long bytes) {
    simt::late = [=, before = simt::late] {
        if (before) before();
        std::memcpy(to, from, bytes);
    };
}

extern "C" void run(const Params *p, unsigned blocks, unsigned threads, unsigned long memory, unsigned cluster, unsigned seed) {
    simt::launch(blocks, threads, memory, cluster, seed, [=] { KERNEL(*p); });
}
