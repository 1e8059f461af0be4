// One kernel of the GPU as a function on a CPU: KERNEL is its name, the other definitions those that it is compiled with.
#define EMULATED
#define TEXT(name) #name
#define FILE_OF(name) TEXT(../../src/mobiquant/kernels/cuda/name.cu)
#include FILE_OF(KERNEL)

extern "C" void run(const Params *p, unsigned blocks, unsigned threads, unsigned long memory, unsigned seed) {
    simt::launch(blocks, threads, memory, seed, [=] { KERNEL(*p); });
}
