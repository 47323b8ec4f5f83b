#include "step_kernels.h"

#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include "vector_avx2.h"

#include "step_math.h"

const StepKernels* moesaic_step_kernels_avx2() {
  static const StepKernels kernels = step_kernels_named("avx2");
  return &kernels;
}
#else
const StepKernels* moesaic_step_kernels_avx2() { return nullptr; }
#endif
