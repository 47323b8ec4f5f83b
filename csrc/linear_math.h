// Linear layers in bfloat16, in terms of matrix_product.h and few_rows.h. Internal linkage, like these.
#pragma once

#include "expert_rows.h"
#include "few_rows.h"
#include "linear_kernels.h"

namespace {

inline int64_t linear_scratch_size(int64_t tokens, int64_t outputs, int64_t inputs) {
  const int64_t few = smaller(tokens, few_rows) * inputs, many = blocked_size(tokens, 1) + int64_t(block_width) * panel_width;
  return tokens * outputs + larger(few, many);
}

// The sums (m, outputs.count), plus the bias, rounded into y.
inline void write_outputs(const moesaic_linear_layer& layer, const float* sums, TokenRange tokens, ColumnRange outputs,
                          void* y) {
  const BFloat16* const bias = layer.bias ? as<BFloat16>(layer.bias) + outputs.first : nullptr;
  for (int64_t i = 0; i < tokens.count; ++i) {
    const float* const from = sums + i * outputs.count;
    BFloat16* const to = as<BFloat16>(y) + (tokens.first + i) * layer.rows + outputs.first;
    for_each_vector(outputs.count, [&](int64_t j, int some) {
      const Vector sum = load(from + j, some);
      store(bias ? sum + load(bias + j, some) : sum, to + j, some);
    });
  }
}

inline void few_outputs_of(const moesaic_linear_layer& layer, const void* x, TokenRange tokens, ColumnRange outputs,
                           void* y, float* scratch) {
  const int64_t K = layer.columns;
  float* const wide_x = scratch;
  float* const sums = wide_x + tokens.count * K;
  copy_floats(as<BFloat16>(x) + tokens.first * K, tokens.count * K, wide_x);
  multiply_few(wide_x, K, tokens.count, as<BFloat16>(layer.weight) + outputs.first * K, outputs.count, K, sums,
               outputs.count);
  write_outputs(layer, sums, tokens, outputs, y);
}

inline void many_outputs_of(const moesaic_linear_layer& layer, const void* x, TokenRange tokens, ColumnRange outputs,
                            void* y, float* scratch) {
  const int64_t K = layer.columns, m = tokens.count;
  float* const panel = scratch;
  float* const block = panel + int64_t(block_width) * panel_width;
  float* const sums = block + blocked_size(m, 1);
  const BFloat16* const rows = as<BFloat16>(x) + tokens.first * K;
  const Right<BFloat16> weight{as<BFloat16>(layer.weight) + outputs.first * K, K, true};
  for (int64_t start = 0; start < K; start += block_width) {
    const int64_t width = width_of_block(K, start);
    for (int64_t i = 0; i < m; ++i) copy_floats(rows + i * K + start, width, block + i * block_stride);
    multiply(block, m, width, weight.from(start, 0), outputs.count, Into<float>{sums, outputs.count, start > 0}, panel);
  }
  write_outputs(layer, sums, tokens, outputs, y);
}

constexpr LinearKernels linear_kernels{linear_scratch_size, few_outputs_of, many_outputs_of};

}  // namespace
