// Additions to words of shared memory that several threads share, right and wrong; and what compares floats.
#include "instructions.h"

using namespace qk;

// Counts of values below `bins`, by every thread of the block.
QK_KERNEL(128, 1) count_values(const uint32_t* values, uint32_t* counts, int n, int bins) {
  for (int i = threadIdx.x; i < bins; i += 128) st_shared<uint32_t>(shared_base() + i * 4, 0);
  block_sync();
  for (int i = threadIdx.x; i < n; i += 128) red_add_shared(shared_base() + ld_global(values + i) * 4, 1 + (i == 0));
  block_sync();
  for (int i = threadIdx.x; i < bins; i += 128) st_global(counts + i, ld_shared<uint32_t>(shared_base() + i * 4));
}
QK_EXPORT(count_values)

QK_KERNEL(64, 1) read_too_early(uint32_t* out) {
  red_add_shared(shared_base(), 1);
  st_global(out + threadIdx.x, ld_shared<uint32_t>(shared_base()));
}
QK_EXPORT(read_too_early)
QK_KERNEL(64, 1) not_published(uint32_t*) {
  if (threadIdx.x == 0) st_shared<uint32_t>(shared_base(), 0);
  red_add_shared(shared_base(), 1);
}
QK_EXPORT(not_published)
QK_KERNEL(64, 1) added_while_read(uint32_t* out) {
  if (threadIdx.x == 1) st_global(out, ld_shared<uint32_t>(shared_base()));
  if (threadIdx.x == 40) red_add_shared(shared_base(), 1);
}
QK_EXPORT(added_while_read)

QK_KERNEL(32, 1) compare(const float* a, const float* b, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    const float x = ld_global(a + i), y = ld_global(b + i);
    st_global(out + i, lesser(x, y));
    st_global(out + n + i, greater(x, y));
    st_global(out + 2 * n + i, static_cast<float>(magnitude(static_cast<double>(x))));
  }
}
QK_EXPORT(compare)
