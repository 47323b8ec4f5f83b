#include "expert_kernels.h"
#include "vector_portable.h"

namespace {
constexpr int tile_rows = 4, tile_vectors = 2;  // what fits the 16 registers of SSE2
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_portable() {
  static const ExpertKernels kernels = kernels_named("portable");
  return &kernels;
}
