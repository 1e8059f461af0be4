// Everything for AVX2 with FMA and F16C. Nothing of the standard library that is inlined may end up here: what is compiled
// with these instructions could be taken by the linker for all.
#include "lanes_avx2.h"
//
#include "decoder.h"
#include "descent.h"
#include "read.h"

namespace mobiquant {

const Table AVX2 = {"avx2", product<Avx2>, read<Avx2>, decode<Avx2>, descend<Avx2>};

}  // namespace mobiquant
