// D[i] = the epilogue of float sums x[i] in one row: for tests of epilogue.h alone.
#include "epilogue.h"

using namespace qk;

QK_KERNEL(128, 1) epilogue_values(const float* x, void* d, EPILOGUE_PARAMETERS) {
  const epilogue::Output output = EPILOGUE_OUTPUT;
  for (int i = threadIdx.x; i < n_size; i += 128)
    epilogue::store_element(output, d, ld_global(x + i), epilogue::row_factors(output, 0),
                            epilogue::column_factors(output, i), 0, i);
}
QK_EXPORT(epilogue_values)
