// What each instruction set implements of linear layers. Internal to csrc/.
#pragma once

#include "linear.h"
#include "sizes.h"

// Tokens first .. first + count - 1.
struct TokenRange {
  int64_t first, count;
};

struct LinearKernels {
  // Floats of scratch for so many tokens, outputs and inputs.
  int64_t (*scratch_size)(int64_t tokens, int64_t outputs, int64_t inputs);

  // These outputs of these tokens. `few` reads the weight once, where it stands, for at most few_rows tokens.
  void (*few)(const moesaic_linear_layer& layer, const void* x, TokenRange tokens, ColumnRange outputs, void* y,
              float* scratch);
  void (*many)(const moesaic_linear_layer& layer, const void* x, TokenRange tokens, ColumnRange outputs, void* y,
               float* scratch);
};

// NULL where the compiler could not build them.
const LinearKernels* moesaic_linear_kernels_avx512();
const LinearKernels* moesaic_linear_kernels_avx2();
const LinearKernels* moesaic_linear_kernels_portable();
