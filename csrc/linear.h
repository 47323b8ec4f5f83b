// A linear layer in plain bfloat16, for CPUs that have no products of it: C-level interface, as experts.h has it.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t rows, columns;  // N outputs, K inputs
  const void* weight;     // (N, K)
  const void* bias;       // (N) or NULL
} moesaic_linear_layer;

// y (T, N) = x (T, K) times the transposed weight, plus the bias. Arrays are bfloat16, products and sums float32, and y is
// rounded once. It does not depend on the number of threads.
//
// instruction_set is a name of moesaic_expert_kernels(MOESAIC_FLOAT32), or NULL or "" for the best. Returns 0, -1 when this
// machine or build lacks the instruction set, -2 when memory runs out.
int moesaic_linear(const moesaic_linear_layer* layer, const void* x, int64_t num_tokens, int threads,
                   const char* instruction_set, void* y);

#ifdef __cplusplus
}
#endif
