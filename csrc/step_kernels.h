// What each instruction set implements of the operators in step.h: one task each. Internal to csrc/.
#pragma once

#include "step.h"

struct StepKernels {
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y);

  // Root mean squares over all heads of tokens first .. last - 1, into rms (B L, 2): the query's, then the key's.
  void (*rms_of_rows)(const moesaic_attention_step& step, int64_t first, int64_t last, float* rms);

  // One key-value head of one sequence. `rms` is read for MOESAIC_QK_NORM_WIDTH alone. `scratch` has room for
  // scratch_of_attend().
  void (*attend)(const moesaic_attention_step& step, int64_t sequence, int64_t head, const float* rms, float* scratch,
                 float* y);

  // Tokens first .. last - 1. `scratch` has room for scratch_of_top_k().
  void (*route)(const moesaic_router_step& step, int64_t first, int64_t last, float* scratch, float* logits,
                int64_t* expert_ids, float* weights);

  // Rows first .. last - 1. `scratch` has room for scratch_of_top_k().
  void (*top_k)(const float* values, int64_t first, int64_t last, int64_t size, int64_t k, float* scratch, int64_t* ids);
};

namespace {
// Floats: a query and its scores.
constexpr int64_t scratch_of_attend(const moesaic_attention_step& step) { return step.head_dim + step.num_keys; }
// Floats: a row of values in whole vectors, which have at most 16.
constexpr int64_t scratch_of_top_k(int64_t size) { return size + 16; }
}  // namespace

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const StepKernels* moesaic_step_kernels_avx512();
const StepKernels* moesaic_step_kernels_avx2();
const StepKernels* moesaic_step_kernels_portable();
