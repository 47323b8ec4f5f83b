// The experts in bfloat16 with AVX-512's products of pairs.
#include "expert_kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "pairs_avx512.h"
#include "pairs.h"

namespace {
constexpr int tile_rows = 14, tile_vectors = 2;  // 28 sums, 2 of the right factor and 1 of the left in 32 registers
constexpr int dot_rows = 4;  // times dot_columns sums, and as many of the matrix
}
#include "expert_math.h"

const ExpertKernels* moesaic_bfloat16_kernels_avx512_bf16() { return &expert_kernels<BFloat16, Pair>; }
#else
const ExpertKernels* moesaic_bfloat16_kernels_avx512_bf16() { return nullptr; }
#endif
