// One step of the optimizer Muon (K. Jordan et al., kellerjordan.github.io/posts/muon, 2024) on many small matrices: of each,
// one thread reads the gradient, moves the momentum, orthogonalises what both say in its core's cache and moves the matrix.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// `number` matrices (rows, columns), one after another. A matrix without a gradient, all of it exactly zero, only decays.
typedef struct {
  int64_t number, rows, columns;  // the smaller of rows and columns is at most moesaic_muon_largest_side()
  float* parameters;
  const float* gradients;
  float* momenta;
  float keep;       // what stays of a parameter
  float step_size;  // of the orthogonal matrix that is subtracted
  int64_t iterations;
  const float* coefficients;  // (iterations, 3): x becomes a x + b (x x^T) x + c (x x^T)^2 x
} moesaic_matrix_stack;

int64_t moesaic_muon_largest_side(void);

// Returns 0; -1 when this machine or build lacks the instruction set, -2 when there is no memory for the buffers. NULL or ""
// is the best instruction set. `momentum` is what stays of the running mean of gradients.
int moesaic_muon_step(const moesaic_matrix_stack* stacks, int64_t num_stacks, float momentum, int threads,
                      const char* instruction_set);

#ifdef __cplusplus
}
#endif
