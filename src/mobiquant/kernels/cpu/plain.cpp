// Everything for any machine. Nothing of the standard library that is inlined may end up here: what is compiled
// with these instructions could be taken by the linker for all.
#include "lanes_plain.h"
//
#include "decoder.h"
#include "descent.h"
#include "read.h"

namespace mobiquant {

const Table PLAIN = {"plain", product<Plain>, read<Plain>, decode<Plain>, descend<Plain>};

}  // namespace mobiquant
