#include "step_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "vector_avx512.h"

#include "step_math.h"

const StepKernels* moesaic_step_kernels_avx512() {
  static const StepKernels kernels = step_kernels_named("avx512f");
  return &kernels;
}
#else
const StepKernels* moesaic_step_kernels_avx512() { return nullptr; }
#endif
