// What each instruction set implements of the operators in step.h: one task each. Internal to csrc/.
#pragma once

#include "step.h"

// Queries of one key-value head of one sequence: rows first_row .. last_row - 1 of its new tokens' heads that share it,
// token by token.
struct AttentionTile {
  int64_t sequence, head, first_row, last_row;
};

constexpr int64_t rows_of_tile = 8;

struct StepKernels {
  void (*rms_norm)(const float* x, const float* weight, int64_t size, float eps, float* y);

  // Tokens first .. last - 1, normalised and rotated: keys and values go into their blocks, queries into `queries` (T, H d).
  void (*place)(const moesaic_attention_step& step, int64_t first, int64_t last, float* queries);

  // Some queries of one key-value head of one sequence, placed. `scratch` has room for scratch_of_attend().
  void (*attend)(const moesaic_attention_step& step, const AttentionTile& tile, const float* queries, float* scratch,
                 float* y);

  // logits (T, E) of tokens first .. last - 1 and experts first_expert .. last_expert - 1.
  void (*router_logits)(const moesaic_router_step& step, int64_t first, int64_t last, int64_t first_expert,
                        int64_t last_expert, float* logits);

  // What these logits choose, for tokens first .. last - 1. `scratch` has room for scratch_of_top_k().
  void (*choose)(const moesaic_router_step& step, int64_t first, int64_t last, const float* logits, float* scratch,
                 int64_t* expert_ids, float* weights);

  // Rows first .. last - 1. `scratch` has room for scratch_of_top_k().
  void (*top_k)(const float* values, int64_t first, int64_t last, int64_t size, int64_t k, float* scratch, int64_t* ids);
};

namespace {
// Floats: the scores of a tile's rows, in whole blocks.
constexpr int64_t scratch_of_attend(int64_t most_keys) { return rows_of_tile * (most_keys + MOESAIC_BLOCK_TOKENS); }
// Floats: a row of values in whole vectors, which have at most 16.
constexpr int64_t scratch_of_top_k(int64_t size) { return size + 16; }
}  // namespace

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const StepKernels* moesaic_step_kernels_avx512();
const StepKernels* moesaic_step_kernels_avx2();
const StepKernels* moesaic_step_kernels_portable();
