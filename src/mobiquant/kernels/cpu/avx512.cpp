// Everything for AVX-512 with VNNI. Nothing of the standard library that is inlined may end up here: what is compiled
// with these instructions could be taken by the linker for all.
#include "lanes_avx512.h"
//
#include "decoder.h"
#include "descent.h"
#include "read.h"

namespace mobiquant {

const Table AVX512 = {"avx512", product<Avx512>, read<Avx512>, decode<Avx512>, descend<Avx512>};

}  // namespace mobiquant
