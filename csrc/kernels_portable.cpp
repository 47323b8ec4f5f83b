#include "expert_kernels.h"
#include "vector_portable.h"

namespace {
constexpr int tile_rows = 4, tile_vectors = 2;  // what fits the 16 registers of SSE2
constexpr int dot_rows = 2;
}
#include "expert_math.h"

const ExpertKernels* moesaic_kernels_portable(int32_t element) { return kernels_named("portable", element); }
