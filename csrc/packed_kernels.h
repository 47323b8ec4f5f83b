// What each instruction set implements of the products with packed weights. Internal to csrc/.
//
// Rounded rows stand in "records": for each group of inputs its codes, one byte each, then a GroupScale.
#pragma once

#include "expert_kernels.h"
#include "pack.h"
#include "packed.h"

namespace {

constexpr int panel_outputs = 16;
constexpr int64_t scale_bytes = 2 * panel_outputs;  // of a block's scales
// Rows that one call of a kernel takes, at most.
constexpr int64_t most_packed_rows = 192;

struct GroupScale {
  int32_t start;        // what the sum of products starts at; each instruction set has its own
  float scale, offset;  // a group's part of a result is (start + sum) * scale + offset, start + sum read as a float's bits
  int32_t unused;
};

constexpr int64_t block_bytes(int64_t group_size, int64_t bits) {
  return scale_bytes + panel_outputs * group_size * bits / 8;
}
constexpr int64_t record_bytes(int64_t columns, int64_t group_size) {
  return divide_up(columns, group_size) * (group_size + int64_t(sizeof(GroupScale)));
}
// Of one panel.
constexpr int64_t panel_bytes(const moesaic_packed& w) {
  return divide_up(w.columns, w.group_size) * block_bytes(w.group_size, w.bits);
}
constexpr int64_t matrix_bytes(const moesaic_packed& w) { return divide_up(w.rows, panel_outputs) * panel_bytes(w); }

}  // namespace

struct PackedKernels {
  int64_t scratch_size;  // floats that a call of the other functions needs

  // The record of one row of `columns` inputs.
  void (*round_row)(const float* x, int64_t columns, int64_t group_size, uint8_t* record);

  // Records of the hidden units of these rows of one expert, at most most_packed_rows, from the records of x (T); only
  // these columns, which start and, but for the last, end at multiples of down's group_size.
  void (*hidden)(const moesaic_packed_experts& experts, RowRange rows, ColumnRange columns, const uint8_t* x_records,
                 uint8_t* hidden_records, float* scratch);

  // Adds what these rows give to these columns of y (T, D), which start at multiples of panel_outputs. Without row_weights
  // each weighs 1.
  void (*add_outputs)(const moesaic_packed_experts& experts, RowRange rows, ColumnRange columns,
                      const uint8_t* hidden_records, float* y, float* scratch);

  // Adds these columns of all rows (N, D), times their weights, to those of y (T, D), in the plan's order.
  void (*add_rows)(const moesaic_plan& plan, int64_t num_rows, int64_t hidden_size, ColumnRange columns,
                   const float* rows, const float* row_weights, float* y);

  // These columns, likewise, of the tokens' rows of y (T, weight.rows). `tokens.expert` means nothing here.
  void (*linear)(const moesaic_packed& weight, const float* bias, RowRange tokens, ColumnRange columns,
                 const uint8_t* x_records, float* y, float* scratch);

  // One panel of a matrix, of all its groups; false when a number is not finite.
  bool (*pack_panel)(const moesaic_packing& packing, int64_t panel, uint8_t* data);
};

// NULL where the compiler could not build them; whether the CPU can run them is another question.
const PackedKernels* moesaic_packed_kernels_avx512_vnni();
const PackedKernels* moesaic_packed_kernels_avx2();
const PackedKernels* moesaic_packed_kernels_portable();
