// What each instruction set implements of the experts. Internal to csrc/.
#pragma once

#include "experts.h"
#include "sizes.h"

// Some of the sorted rows of one expert.
struct RowRange {
  int64_t expert, first, count;
};

// Experts with at most this many rows read their weights where they stand instead of packing them first.
constexpr int64_t few_rows = 12;

// Which of the chunks of its expert, in order, one is.
struct Turn {
  bool first, last;
};

// Floats of each buffer for a chunk of this many rows.
struct BufferSizes {
  int64_t scratch;       // what a thread needs to compute any part of a chunk
  int64_t hidden;        // weighted hidden units, as weight_gradients reads them
  int64_t grad_gate_up;  // gradients of the pre-activations, as weight_gradients reads them
};

// The kernels of one instruction set for one type of the numbers in memory, the element. `void` arrays are of that type,
// the rest are float32, but for what stands between backward and weight_gradients.
struct ExpertKernels {
  int element_size;  // bytes
  int column_step;   // column ranges start at multiples of this
  BufferSizes (*buffer_sizes)(int64_t rows, int64_t hidden_size, int64_t intermediate_size);

  // Floats of the sums of an expert's weight gradients in so many columns of gate_up and of down; 0 for float elements.
  int64_t (*sums_size)(int64_t hidden_size, int64_t intermediate_size, int64_t gate_up_columns, int64_t down_columns);

  // Pre-activations of the rows, and into rows_out (N, D) what each row adds to its token.
  void (*forward)(const moesaic_experts& experts, RowRange rows, void* pre_activations, float* rows_out, float* scratch);

  // The same of all rows of an expert with few, in two steps. First pre-activations and weighted hidden units (count, F)
  // in these columns of F, then rows_out in these columns of D.
  void (*few_hidden)(const moesaic_experts& experts, RowRange rows, ColumnRange units, void* pre_activations,
                     float* hidden, float* scratch);
  void (*few_outputs)(const moesaic_experts& experts, RowRange rows, ColumnRange outputs, const float* hidden,
                      float* rows_out);

  // Gradient of each row's weight and, into rows_out (N, D), of its copy of x. Fills `hidden` and `grad_gate_up`, in the
  // form in which these kernels multiply them.
  void (*backward)(const moesaic_experts& experts, RowRange rows, const void* pre_activations, const void* grad_y,
                   float* grad_row_weights, float* rows_out, void* hidden, void* grad_gate_up, float* scratch);

  // What the rows add to the gradients of their expert's weights, in these columns of gate_up (of D) and of down (of F);
  // with the first column of gate_up also to the gradients of the biases. The first chunk overwrites what is there.
  // Elements that are not float are summed up in `sums`, which stay from chunk to chunk, and written with the last.
  void (*weight_gradients)(const moesaic_experts& experts, RowRange rows, const void* grad_y, const void* hidden,
                           const void* grad_gate_up, ColumnRange gate_up_columns, ColumnRange down_columns, Turn turn,
                           const moesaic_expert_gradients& gradients, float* sums, float* scratch);

  // Sums rows (N, D) into tokens first .. last - 1 of out (T, D).
  void (*sum_rows)(const moesaic_experts& experts, const float* rows, int64_t first, int64_t last, void* out);
};

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const ExpertKernels* moesaic_float_kernels_avx512();
const ExpertKernels* moesaic_float_kernels_avx2();
const ExpertKernels* moesaic_float_kernels_portable();
const ExpertKernels* moesaic_bfloat16_kernels_avx512_bf16();
const ExpertKernels* moesaic_bfloat16_kernels_avx512();
const ExpertKernels* moesaic_bfloat16_kernels_avx2();
const ExpertKernels* moesaic_bfloat16_kernels_portable();
// Those of avx512_bf16, with other instructions in the place of its products of pairs.
const ExpertKernels* moesaic_bfloat16_kernels_avx512_pairs();
