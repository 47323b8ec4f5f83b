// The experts, linear layers, the operators of step.h and the step of muon.h with AVX2 and FMA.
#include "expert_kernels.h"
#include "linear_kernels.h"
#include "muon_kernels.h"
#include "step_kernels.h"

#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include "vector_avx2.h"

namespace {
constexpr int tile_rows = 6, tile_vectors = 2;  // 12 sums, 2 of the right factor and 1 of the left in 16 registers
constexpr int dot_rows = 2;  // times dot_columns sums, and as many of the matrix
}
#include "expert_math.h"
#include "linear_math.h"
#include "muon_math.h"
#include "step_math.h"

const ExpertKernels* moesaic_float_kernels_avx2() { return &expert_kernels<float>; }
const ExpertKernels* moesaic_bfloat16_kernels_avx2() { return &expert_kernels<BFloat16>; }
const LinearKernels* moesaic_linear_kernels_avx2() { return &linear_kernels; }
const MuonKernels* moesaic_muon_kernels_avx2() { return &muon_kernels; }
const StepKernels* moesaic_step_kernels_avx2() { return &step_kernels; }
#else
const ExpertKernels* moesaic_float_kernels_avx2() { return nullptr; }
const ExpertKernels* moesaic_bfloat16_kernels_avx2() { return nullptr; }
const LinearKernels* moesaic_linear_kernels_avx2() { return nullptr; }
const MuonKernels* moesaic_muon_kernels_avx2() { return nullptr; }
const StepKernels* moesaic_step_kernels_avx2() { return nullptr; }
#endif
