// The experts' forward and backward pass on chunks of rows, in terms of matrix_product.h and gated_activation.h.
// Internal linkage, like these. The including file calls kernels_named() to make its table.
//
// m rows of one expert, D hidden size, F expert intermediate size.
#pragma once

#include "expert_kernels.h"
#include "gated_activation.h"
#include "matrix_product.h"

namespace {

// A "blocked" matrix (m, columns) is a left factor: blocks of block_width columns one after another, each (m,
// block_stride).
inline int64_t blocked_size(int64_t m, int64_t columns) { return divide_up(columns, block_width) * m * block_stride; }
inline int64_t width_of_block(int64_t columns, int64_t start) { return smaller<int64_t>(block_width, columns - start); }

constexpr int64_t panel_size = int64_t(block_width) * panel_width;

BufferSizes buffer_sizes(int64_t m, int64_t D, int64_t F) {
  const int64_t forward = blocked_size(m, 1) + blocked_size(m, F) + panel_size + F;
  const int64_t backward = blocked_size(m, 1) + m * F + panel_size + 3 * F;
  const int64_t gradients = blocked_size(m, 1) + panels_size(m, D);
  const int64_t most = forward > backward ? forward : backward;
  return {most > gradients ? most : gradients, panels_size(m, F), blocked_size(m, 2 * F)};
}

// Calls act(j, some) for each vector of `count` floats: it starts at j and has `some` of them, all but in the last.
template <class Act>
inline void for_each_vector(int64_t count, Act act) {
  for (int64_t j = 0; j < count; j += Vector::width) act(j, int(smaller<int64_t>(Vector::width, count - j)));
}

inline Vector load(const float* from, int some) {
  return some == Vector::width ? Vector::load(from) : Vector::load_some(from, some);
}

inline void store(Vector vector, float* to, int some) {
  if (some == Vector::width) {
    vector.store(to);
  } else {
    vector.store_some(to, some);
  }
}

// The compiler's own copy has too long a start for rows as short as these.
inline void copy_floats(const float* from, int64_t count, float* to) {
  for_each_vector(count, [&](int64_t j, int some) { store(load(from + j, some), to + j, some); });
}

// The tokens' rows of x (T, D), columns start .. start + width - 1, as one block.
void gather_block(const float* x, int64_t D, const int32_t* tokens, int64_t m, int64_t start, int64_t width,
                  float* block) {
  for (int64_t i = 0; i < m; ++i) copy_floats(x + tokens[i] * D + start, width, block + i * block_stride);
}

// One row (columns) of panels of `steps` rows each.
void store_panels_row(const float* from, int64_t columns, int64_t steps, float* to) {
  for (int64_t j = 0; j < columns; j += panel_width) {
    copy_panel_row(from + j, smaller<int64_t>(panel_width, columns - j), to + j * steps);
  }
}

// The tokens' rows of x (T, D), these columns, packed as a right factor.
void gather_panels(const float* x, int64_t D, const int32_t* tokens, int64_t m, ColumnRange columns, float* panels) {
  const Parts sums(m, most_steps);
  for (int64_t s = 0; s < sums.number; ++s) {
    float* const part = panels + sums.start(s) * round_up(columns.count, panel_width);
    for (int64_t p = 0; p < sums.size(s); ++p) {
      const float* const from = x + tokens[sums.start(s) + p] * D + columns.first;
      store_panels_row(from, columns.count, sums.size(s), part + p * panel_width);
    }
  }
}

// Row i of c (m, columns) = bias.
void fill_rows(const float* bias, int64_t m, int64_t columns, float* c) {
  for (int64_t i = 0; i < m; ++i) copy_floats(bias, columns, c + i * columns);
}

// to += factor * from.
void add_scaled(const float* from, float factor, int64_t count, float* to) {
  const Vector scale = Vector::fill(factor);
  for_each_vector(count, [&](int64_t j, int some) {
    store(multiply_add(scale, load(from + j, some), load(to + j, some)), to + j, some);
  });
}

float dot(const float* a, const float* b, int64_t count) {
  Vector sums = Vector::fill(0.0f);
  for_each_vector(count, [&](int64_t j, int some) {
    sums = multiply_add(load(a + j, some), load(b + j, some), sums);
  });
  return sums.sum();
}

float weight_of(const moesaic_experts& experts, int64_t row) {
  return experts.row_weights[experts.plan.assignments[row]];
}

// One row (columns) of a blocked matrix of m rows.
void store_blocked_row(const float* from, int64_t columns, int64_t m, float* to) {
  for (int64_t start = 0; start < columns; start += block_width) {
    copy_floats(from + start, width_of_block(columns, start), to + start / block_width * m * block_stride);
  }
}

// Weighted hidden units of m rows of pre-activations (m, 2F), as a blocked matrix. `row` has room for F floats.
template <class Activation>
void activate(const moesaic_experts& experts, RowRange rows, const float* pre_activations, float* hidden, float* row) {
  const Activation activation(experts);
  const int64_t F = experts.intermediate_size;
  for (int64_t i = 0; i < rows.count; ++i) {
    const Vector weight = Vector::fill(weight_of(experts, rows.first + i));
    const float* const gate = pre_activations + i * 2 * F;
    for_each_vector(F, [&](int64_t j, int some) {
      store(activation(load(gate + j, some), load(gate + F + j, some)).value * weight, row + j, some);
    });
    store_blocked_row(row, F, rows.count, hidden + i * block_stride);
  }
}

void forward_rows(const moesaic_experts& experts, RowRange rows, float* all_pre_activations, float* rows_out,
                  float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  float* const panel = scratch;
  float* const block = panel + panel_size;
  float* const hidden = block + blocked_size(m, 1);
  float* const row = hidden + blocked_size(m, F);
  float* const pre_activations = all_pre_activations + rows.first * 2 * F;
  float* const out = rows_out + rows.first * D;
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  const Right gate_up{experts.gate_up + rows.expert * 2 * F * D, D, true};
  const float* const bias = experts.gate_up_bias ? experts.gate_up_bias + rows.expert * 2 * F : nullptr;
  if (bias) fill_rows(bias, m, 2 * F, pre_activations);
  for (int64_t start = 0; start < D; start += block_width) {
    const int64_t width = width_of_block(D, start);
    gather_block(experts.x, D, tokens, m, start, width, block);
    multiply(block, m, width, gate_up.from(start, 0), 2 * F, pre_activations, 2 * F, bias || start > 0, panel);
  }

  const auto run = experts.activation == MOESAIC_SWIGLU ? activate<Swiglu> : activate<ClampedSwiglu>;
  run(experts, rows, pre_activations, hidden, row);

  const Right down{experts.down + rows.expert * D * F, F, true};
  for (int64_t start = 0; start < F; start += block_width) {
    multiply(hidden + start / block_width * m * block_stride, m, width_of_block(F, start), down.from(start, 0), D, out, D,
             start > 0, panel);
  }
  if (experts.down_bias) {
    for (int64_t i = 0; i < m; ++i) {
      add_scaled(experts.down_bias + rows.expert * D, weight_of(experts, rows.first + i), D, out + i * D);
    }
  }
}

// From pre-activations (m, 2F) and the gradients (m, F) of the hidden units of a row of weight 1: weighted hidden units
// as a right factor, gradients of the pre-activations as a blocked matrix, gradients of the rows' weights. `row` has room
// for 3F floats.
template <class Activation>
void activate_back(const moesaic_experts& experts, RowRange rows, const float* pre_activations, const float* grad_hidden,
                   float* grad_row_weights, float* hidden, float* grad_gate_up, float* row) {
  const Activation activation(experts);
  const int64_t F = experts.intermediate_size;
  float* const hidden_row = row + 2 * F;
  const Parts sums(rows.count, most_steps);
  for (int64_t s = 0; s < sums.number; ++s) {
    float* const panels = hidden + sums.start(s) * round_up(F, panel_width);
    for (int64_t p = 0; p < sums.size(s); ++p) {
      const int64_t i = sums.start(s) + p;
      const Vector weight = Vector::fill(weight_of(experts, rows.first + i));
      const float* const gate = pre_activations + i * 2 * F;
      Vector total = Vector::fill(0.0f);
      for_each_vector(F, [&](int64_t j, int some) {
        const Hidden h = activation(load(gate + j, some), load(gate + F + j, some));
        const Vector grad = load(grad_hidden + i * F + j, some), weighted = grad * weight;
        total = multiply_add(grad, h.value, total);
        store(h.value * weight, hidden_row + j, some);
        store(weighted * h.gate_slope, row + j, some);
        store(weighted * h.up_slope, row + F + j, some);
      });
      grad_row_weights[experts.plan.assignments[rows.first + i]] = total.sum();
      store_blocked_row(row, 2 * F, rows.count, grad_gate_up + i * block_stride);
      store_panels_row(hidden_row, F, sums.size(s), panels + p * panel_width);
    }
  }
}

void backward_rows(const moesaic_experts& experts, RowRange rows, const float* all_pre_activations, const float* grad_y,
                   float* grad_row_weights, float* rows_out, float* hidden, float* grad_gate_up, float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  float* const panel = scratch;
  float* const block = panel + panel_size;
  float* const grad_hidden = block + blocked_size(m, 1);
  float* const row = grad_hidden + m * F;
  float* const out = rows_out + rows.first * D;
  const float* const pre_activations = all_pre_activations + rows.first * 2 * F;
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  const Right down{experts.down + rows.expert * D * F, F, false};
  for (int64_t start = 0; start < D; start += block_width) {
    const int64_t width = width_of_block(D, start);
    gather_block(grad_y, D, tokens, m, start, width, block);
    multiply(block, m, width, down.from(start, 0), F, grad_hidden, F, start > 0, panel);
  }

  const auto back = experts.activation == MOESAIC_SWIGLU ? activate_back<Swiglu> : activate_back<ClampedSwiglu>;
  back(experts, rows, pre_activations, grad_hidden, grad_row_weights, hidden, grad_gate_up, row);
  if (experts.down_bias) {
    for (int64_t i = 0; i < m; ++i) {
      grad_row_weights[experts.plan.assignments[rows.first + i]] +=
          dot(grad_y + tokens[i] * D, experts.down_bias + rows.expert * D, D);
    }
  }

  const Right gate_up{experts.gate_up + rows.expert * 2 * F * D, D, false};
  for (int64_t start = 0; start < 2 * F; start += block_width) {
    multiply(grad_gate_up + start / block_width * m * block_stride, m, width_of_block(2 * F, start),
             gate_up.from(start, 0), D, out, D, start > 0, panel);
  }
}

void bias_gradients(const moesaic_experts& experts, RowRange rows, const float* grad_y, const float* grad_gate_up,
                    bool accumulate, const moesaic_expert_gradients& gradients) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  if (gradients.gate_up_bias) {
    float* const to = gradients.gate_up_bias + rows.expert * 2 * F;
    if (!accumulate) memset(to, 0, 2 * F * sizeof(float));
    for (int64_t start = 0; start < 2 * F; start += block_width) {
      const float* const block = grad_gate_up + start / block_width * m * block_stride;
      for (int64_t i = 0; i < m; ++i) add_scaled(block + i * block_stride, 1.0f, width_of_block(2 * F, start), to + start);
    }
  }
  if (gradients.down_bias) {
    float* const to = gradients.down_bias + rows.expert * D;
    if (!accumulate) memset(to, 0, D * sizeof(float));
    for (int64_t i = 0; i < m; ++i) {
      add_scaled(grad_y + experts.plan.tokens[rows.first + i] * D, weight_of(experts, rows.first + i), D, to);
    }
  }
}

void weight_gradients(const moesaic_experts& experts, RowRange rows, const float* grad_y, const float* hidden,
                      const float* grad_gate_up, ColumnRange gate_up_columns, ColumnRange down_columns, bool accumulate,
                      const moesaic_expert_gradients& gradients, float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  float* const block = scratch;
  float* const panels = block + blocked_size(m, 1);
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  if (gate_up_columns.count) {
    float* const to = gradients.gate_up + rows.expert * 2 * F * D + gate_up_columns.first;
    gather_panels(experts.x, D, tokens, m, gate_up_columns, panels);
    for (int64_t start = 0; start < 2 * F; start += block_width) {
      multiply_transposed(grad_gate_up + start / block_width * m * block_stride, m, width_of_block(2 * F, start), panels,
                          gate_up_columns.count, {0, gate_up_columns.count}, to + start * D, D, accumulate);
    }
    if (gate_up_columns.first == 0) bias_gradients(experts, rows, grad_y, grad_gate_up, accumulate, gradients);
  }
  if (down_columns.count) {
    float* const to = gradients.down + rows.expert * D * F + down_columns.first;
    for (int64_t start = 0; start < D; start += block_width) {
      const int64_t width = width_of_block(D, start);
      gather_block(grad_y, D, tokens, m, start, width, block);
      multiply_transposed(block, m, width, hidden, F, down_columns, to + start * F, F, accumulate);
    }
  }
}

void sum_rows(const moesaic_experts& experts, const float* rows, int64_t first, int64_t last, float* out) {
  const int64_t D = experts.hidden_size;
  const int32_t* const offsets = experts.plan.token_offsets;
  const int32_t* const token_rows = experts.plan.token_rows;
  for (int64_t t = first; t < last; ++t) {
    if (t + 1 < last) {
      for (int32_t k = offsets[t + 1]; k < offsets[t + 2]; ++k) {
        for (int64_t j = 0; j < D; j += 16) MOESAIC_PREFETCH(rows + token_rows[k] * D + j);
      }
    }
    float* const to = out + t * D;
    if (offsets[t] == offsets[t + 1]) memset(to, 0, D * sizeof(float));
    for_each_vector(D, [&](int64_t j, int some) {
      if (offsets[t] == offsets[t + 1]) return;
      Vector sum = load(rows + token_rows[offsets[t]] * D + j, some);
      for (int32_t k = offsets[t] + 1; k < offsets[t + 1]; ++k) sum = sum + load(rows + token_rows[k] * D + j, some);
      store(sum, to + j, some);
    });
  }
}

ExpertKernels kernels_named(const char* name) {
  return {name, panel_width, buffer_sizes, forward_rows, backward_rows, weight_gradients, sum_rows};
}

}  // namespace
