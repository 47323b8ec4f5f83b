// The experts, linear layers, the operators of step.h and the step of muon.h in plain C++.
#include "expert_kernels.h"
#include "linear_kernels.h"
#include "muon_kernels.h"
#include "step_kernels.h"
#include "vector_portable.h"

namespace {
constexpr int tile_rows = 4, tile_vectors = 2;  // what fits the 16 registers of SSE2
constexpr int dot_rows = 2;
}
#include "expert_math.h"
#include "linear_math.h"
#include "muon_math.h"
#include "step_math.h"

const ExpertKernels* moesaic_float_kernels_portable() { return &expert_kernels<float>; }
const ExpertKernels* moesaic_bfloat16_kernels_portable() { return &expert_kernels<BFloat16>; }
const LinearKernels* moesaic_linear_kernels_portable() { return &linear_kernels; }
const MuonKernels* moesaic_muon_kernels_portable() { return &muon_kernels; }
const StepKernels* moesaic_step_kernels_portable() { return &step_kernels; }
