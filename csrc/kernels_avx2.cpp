#include "expert_kernels.h"

#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include "vector_avx2.h"

namespace {
constexpr int tile_rows = 6, tile_vectors = 2;  // 12 sums, 2 of the right factor and 1 of the left in 16 registers
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_avx2() {
  static const ExpertKernels kernels = kernels_named("avx2");
  return &kernels;
}
#else
const ExpertKernels* moesaic_kernels_avx2() { return nullptr; }
#endif
