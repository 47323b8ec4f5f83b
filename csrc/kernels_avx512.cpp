#include "expert_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "vector_avx512.h"

namespace {
constexpr int tile_rows = 14, tile_vectors = 2;  // 28 sums, 2 of the right factor and 1 of the left in 32 registers
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_avx512() {
  static const ExpertKernels kernels = kernels_named("avx512f");
  return &kernels;
}
#else
const ExpertKernels* moesaic_kernels_avx512() { return nullptr; }
#endif
