// Operations on two 16-bit floats at once.
#include "instructions.h"

using namespace qk;

QK_KERNEL(32, 1) fma_pairs(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d, int count) {
  for (int i = threadIdx.x; i < count; i += 32)
    st_global(d + i, fma_pair<TYPE>(ld_global(a + i), ld_global(b + i), ld_global(c + i)));
}
QK_EXPORT(fma_pairs)
