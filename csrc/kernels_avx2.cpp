#include "expert_kernels.h"

#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include "vector_avx2.h"

namespace {
constexpr int tile_rows = 6, tile_vectors = 2;  // 12 sums, 2 of the right factor and 1 of the left in 16 registers
constexpr int dot_rows = 2;  // times dot_columns sums, and as many of the matrix
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_avx2(int32_t element) { return kernels_named("avx2", element); }
#else
const ExpertKernels* moesaic_kernels_avx2(int32_t) { return nullptr; }
#endif
