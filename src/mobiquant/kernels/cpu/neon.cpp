// Everything for Armv8.2 with dot products. Nothing of the standard library that is inlined may end up here: what is compiled
// with these instructions could be taken by the linker for all.
#include "lanes_neon.h"
//
#include "decoder.h"
#include "descent.h"
#include "read.h"

namespace mobiquant {

const Table NEON = {"neon", product<Neon>, read<Neon>, decode<Neon>, descend<Neon>};

}  // namespace mobiquant
