// The experts, linear layers, the operators of step.h and the step of muon.h with AVX-512.
#include "expert_kernels.h"
#include "linear_kernels.h"
#include "muon_kernels.h"
#include "step_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "pairs_avx512.h"
#include "pairs.h"

namespace {
constexpr int tile_rows = 14, tile_vectors = 2;  // 28 sums, 2 of the right factor and 1 of the left in 32 registers
constexpr int dot_rows = 4;  // times dot_columns sums, and as many of the matrix
}
#include "expert_math.h"
#include "linear_math.h"
#include "muon_math.h"
#include "step_math.h"

const ExpertKernels* moesaic_float_kernels_avx512() { return &expert_kernels<float>; }
const ExpertKernels* moesaic_bfloat16_kernels_avx512() { return &expert_kernels<BFloat16>; }
const ExpertKernels* moesaic_bfloat16_kernels_avx512_pairs() { return &expert_kernels<BFloat16, Pair>; }
const LinearKernels* moesaic_linear_kernels_avx512() { return &linear_kernels; }
const MuonKernels* moesaic_muon_kernels_avx512() { return &muon_kernels; }
const StepKernels* moesaic_step_kernels_avx512() { return &step_kernels; }
#else
const ExpertKernels* moesaic_float_kernels_avx512() { return nullptr; }
const ExpertKernels* moesaic_bfloat16_kernels_avx512() { return nullptr; }
const ExpertKernels* moesaic_bfloat16_kernels_avx512_pairs() { return nullptr; }
const LinearKernels* moesaic_linear_kernels_avx512() { return nullptr; }
const MuonKernels* moesaic_muon_kernels_avx512() { return nullptr; }
const StepKernels* moesaic_step_kernels_avx512() { return nullptr; }
#endif
