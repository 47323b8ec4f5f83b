// What each instruction set implements of the experts, and how the work is cut. Internal to csrc/.
#pragma once

#include "experts.h"

namespace {

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// `count` things in as few parts as `most` allows, as equal as they can be.
struct Parts {
  int64_t count, number;
  Parts(int64_t count_, int64_t most) : count(count_), number(divide_up(count_, most)) {}
  int64_t start(int64_t part) const { return count * part / number; }
  int64_t size(int64_t part) const { return start(part + 1) - start(part); }
};

}  // namespace

// Some of the sorted rows of one expert.
struct RowRange {
  int64_t expert, first, count;
};

// Columns first .. first + count - 1.
struct ColumnRange {
  int64_t first, count;
};

// Floats of each buffer for a chunk of this many rows.
struct BufferSizes {
  int64_t scratch;       // what a thread needs to compute any part of a chunk
  int64_t hidden;        // weighted hidden units, as weight_gradients reads them
  int64_t grad_gate_up;  // gradients of the pre-activations, as weight_gradients reads them
};

struct ExpertKernels {
  const char* name;
  int column_step;  // column ranges start at multiples of this
  BufferSizes (*buffer_sizes)(int64_t rows, int64_t hidden_size, int64_t intermediate_size);

  // Pre-activations of the rows, and into rows_out (N, D) what each row adds to its token.
  void (*forward)(const moesaic_experts& experts, RowRange rows, float* pre_activations, float* rows_out, float* scratch);

  // Gradient of each row's weight and, into rows_out (N, D), of its copy of x. Fills `hidden` and `grad_gate_up`.
  void (*backward)(const moesaic_experts& experts, RowRange rows, const float* pre_activations, const float* grad_y,
                   float* grad_row_weights, float* rows_out, float* hidden, float* grad_gate_up, float* scratch);

  // What the rows add to the gradients of their expert's weights, in these columns of gate_up (of D) and of down (of F);
  // with the first column of gate_up also to the gradients of the biases. Without `accumulate` it overwrites them.
  void (*weight_gradients)(const moesaic_experts& experts, RowRange rows, const float* grad_y, const float* hidden,
                           const float* grad_gate_up, ColumnRange gate_up_columns, ColumnRange down_columns,
                           bool accumulate, const moesaic_expert_gradients& gradients, float* scratch);

  // Sums rows (N, D) into tokens first .. last - 1 of out (T, D).
  void (*sum_rows)(const moesaic_experts& experts, const float* rows, int64_t first, int64_t last, float* out);
};

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const ExpertKernels* moesaic_kernels_avx512();
const ExpertKernels* moesaic_kernels_avx2();
const ExpertKernels* moesaic_kernels_portable();
