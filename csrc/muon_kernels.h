// What each instruction set implements of muon.h: the step of one matrix. Internal to csrc/.
#pragma once

#include "muon.h"

struct MuonKernels {
  // Floats of scratch for a matrix of these sizes.
  int64_t (*scratch_size)(int64_t rows, int64_t columns);
  void (*step)(const moesaic_matrix_stack& stack, int64_t matrix, float momentum, float* scratch);
};

// The smaller side of a matrix: a block of matrix_product.h, so that one product needs no sum of several.
constexpr int64_t muon_largest_side = 256;

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const MuonKernels* moesaic_muon_kernels_avx512();
const MuonKernels* moesaic_muon_kernels_avx2();
const MuonKernels* moesaic_muon_kernels_portable();
