#include "expert_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vector_avx512.h"

namespace {
constexpr int tile_rows = 14, tile_vectors = 2;  // 28 sums, 2 of the right factor and 1 of the left in 32 registers
constexpr int dot_rows = 4;  // times dot_columns sums, and as many of the matrix
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_avx512(int32_t element) { return kernels_named("avx512f", element); }
#else
const ExpertKernels* moesaic_kernels_avx512(int32_t) { return nullptr; }
#endif
