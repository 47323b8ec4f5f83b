#include "vector_portable.h"

#include "step_math.h"

const StepKernels* moesaic_step_kernels_portable() {
  static const StepKernels kernels = step_kernels_named("portable");
  return &kernels;
}
