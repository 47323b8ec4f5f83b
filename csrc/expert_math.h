// The experts' forward and backward pass on chunks of rows, in terms of matrix_product.h, few_rows.h and
// gated_activation.h. Internal linkage, like these. The including file hands out expert_kernels of its elements.
//
// What is in memory is of type Element, float or BFloat16. With floats as factors it is widened as it is gathered or packed,
// all products and sums are float32, and each result is rounded once. With pairs as factors hidden units and gradients of
// pre-activations are rounded as well, where a product takes them up.
//
// m rows of one expert, D hidden size, F expert intermediate size.
#pragma once

#include "expert_kernels.h"
#include "expert_rows.h"
#include "few_rows.h"
#include "gated_activation.h"
#include "matrix_product.h"

namespace {

constexpr int64_t panel_size = int64_t(block_width) * panel_width;

// Float32 beside the results; floats need none.
template <class Element>
constexpr int64_t if_rounded(int64_t floats) {
  return std::is_same_v<Element, float> ? 0 : floats;
}

template <class Element, class Factor>
BufferSizes buffer_sizes(int64_t m, int64_t D, int64_t F) {
  const int64_t few = smaller<int64_t>(m, few_rows) * (D + 2 * F);
  const int64_t forward =
      blocked_size(m, 1) + blocked_size<Factor>(m, F) + panel_size + F + if_rounded<Element>(m * 2 * F);
  const int64_t backward = blocked_size(m, 1) + m * F + panel_size + 3 * F;
  const int64_t gradients = blocked_size(m, 1) + panels_size(m, D);
  return {larger(larger(few, forward), larger(backward, gradients)), panels_size(m, F), blocked_size<Factor>(m, 2 * F)};
}

template <class Element>
int64_t sums_size(int64_t D, int64_t F, int64_t gate_up_columns, int64_t down_columns) {
  return if_rounded<Element>(2 * F * gate_up_columns + D * down_columns + 2 * F + D);
}

// Weighted hidden units of a row from `count` gates and ups.
template <class Activation>
void activate_row(const Activation& activation, float weight, const float* gate, const float* up, int64_t count,
                  float* hidden) {
  const Vector scale = Vector::fill(weight);
  for_each_vector(count, [&](int64_t j, int some) {
    store(activation(load(gate + j, some), load(up + j, some)).value * scale, hidden + j, some);
  });
}

// Weighted hidden units of m rows of pre-activations (m, 2F), as a blocked matrix. `row` has room for F floats.
template <class Activation, class Factor>
void activate(const moesaic_experts& experts, RowRange rows, const float* pre_activations, Factor* hidden, float* row) {
  const Activation activation(experts);
  const int64_t F = experts.intermediate_size;
  for (int64_t i = 0; i < rows.count; ++i) {
    const float* const gate = pre_activations + i * 2 * F;
    activate_row(activation, weight_of(experts, rows.first + i), gate, gate + F, F, row);
    store_blocked_row(row, F, rows.count, hidden + i * block_stride);
  }
}

template <class Element>
void add_down_bias(const moesaic_experts& experts, RowRange rows, ColumnRange columns, float* out) {
  if (!experts.down_bias) return;
  const Element* const bias = as<Element>(experts.down_bias) + rows.expert * experts.hidden_size + columns.first;
  for (int64_t i = 0; i < rows.count; ++i) {
    add_scaled(bias, weight_of(experts, rows.first + i), columns.count, out + i * experts.hidden_size);
  }
}

template <class Element, class Factor>
void forward_rows(const moesaic_experts& experts, RowRange rows, void* all_pre_activations, float* rows_out,
                  float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  Factor* const panel = as<Factor>(scratch);
  Factor* const block = panel + panel_size;
  Factor* const hidden = block + blocked_size(m, 1);
  float* const row = as<float>(hidden + blocked_size<Factor>(m, F));
  Element* const kept = as<Element>(all_pre_activations) + rows.first * 2 * F;
  float* pre_activations = row + F;
  if constexpr (std::is_same_v<Element, float>) pre_activations = kept;
  float* const out = rows_out + rows.first * D;
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  const Right<Element, Factor> gate_up{as<Element>(experts.gate_up) + rows.expert * 2 * F * D, D, true};
  if (experts.gate_up_bias) {
    fill_rows(as<Element>(experts.gate_up_bias) + rows.expert * 2 * F, m, 2 * F, pre_activations);
  }
  for (int64_t start = 0; start < D; start += block_numbers<Factor>) {
    const int64_t width = width_of_block<Factor>(D, start);
    gather_block(as<Element>(experts.x), D, tokens, m, start, width, block);
    multiply(block, m, width, gate_up.from(start, 0), 2 * F,
             Into<float>{pre_activations, 2 * F, experts.gate_up_bias || start > 0}, panel);
  }
  if constexpr (!std::is_same_v<Element, float>) copy_floats(pre_activations, m * 2 * F, kept);

  const bool swiglu = experts.activation == MOESAIC_SWIGLU;
  const auto run = swiglu ? activate<Swiglu, Factor> : activate<ClampedSwiglu, Factor>;
  run(experts, rows, pre_activations, hidden, row);

  const Right<Element, Factor> down{as<Element>(experts.down) + rows.expert * D * F, F, true};
  for (int64_t start = 0; start < F; start += block_numbers<Factor>) {
    multiply(hidden + block_at<Factor>(start, m), m, width_of_block<Factor>(F, start), down.from(start, 0), D,
             Into<float>{out, D, start > 0}, panel);
  }
  add_down_bias<Element>(experts, rows, {0, D}, out);
}

template <class Activation>
void activate_few(const moesaic_experts& experts, RowRange rows, ColumnRange units, const float* gate, const float* up,
                  float* hidden) {
  const Activation activation(experts);
  for (int64_t i = 0; i < rows.count; ++i) {
    activate_row(activation, weight_of(experts, rows.first + i), gate + i * units.count, up + i * units.count,
                 units.count, hidden + i * experts.intermediate_size + units.first);
  }
}

template <class Element>
void few_hidden(const moesaic_experts& experts, RowRange rows, ColumnRange units, void* all_pre_activations,
                float* hidden, float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  float* const x = scratch;
  float* const gate = x + m * D;
  float* const up = gate + m * units.count;
  for (int64_t i = 0; i < m; ++i) {
    copy_floats(as<Element>(experts.x) + experts.plan.tokens[rows.first + i] * D, D, x + i * D);
  }
  for (int64_t first = units.first; first < 2 * F; first += F) {
    float* const half = first < F ? gate : up;
    multiply_few(x, D, m, as<Element>(experts.gate_up) + (rows.expert * 2 * F + first) * D, units.count, D, half,
                 units.count);
    Element* const kept = as<Element>(all_pre_activations) + rows.first * 2 * F + first;
    for (int64_t i = 0; i < m; ++i) {
      float* const row = half + i * units.count;
      if (experts.gate_up_bias) {
        add_scaled(as<Element>(experts.gate_up_bias) + rows.expert * 2 * F + first, 1.0f, units.count, row);
      }
      copy_floats(row, units.count, kept + i * 2 * F);
    }
  }
  const auto run = experts.activation == MOESAIC_SWIGLU ? activate_few<Swiglu> : activate_few<ClampedSwiglu>;
  run(experts, rows, units, gate, up, hidden);
}

template <class Element>
void few_outputs(const moesaic_experts& experts, RowRange rows, ColumnRange outputs, const float* hidden,
                 float* rows_out) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size;
  float* const out = rows_out + rows.first * D + outputs.first;
  multiply_few(hidden, F, rows.count, as<Element>(experts.down) + (rows.expert * D + outputs.first) * F, outputs.count, F,
               out, D);
  add_down_bias<Element>(experts, rows, outputs, out);
}

// From pre-activations (m, 2F) and the gradients (m, F) of the hidden units of a row of weight 1: weighted hidden units
// as a right factor, gradients of the pre-activations as a blocked matrix, gradients of the rows' weights. `row` has room
// for 3F floats.
template <class Activation, class Element, class Factor>
void activate_back(const moesaic_experts& experts, RowRange rows, const Element* pre_activations,
                   const float* grad_hidden, float* grad_row_weights, Factor* hidden, Factor* grad_gate_up, float* row) {
  const Activation activation(experts);
  const int64_t F = experts.intermediate_size;
  const auto back = [&](int64_t i, auto* hidden_row) {
    const Vector weight = Vector::fill(weight_of(experts, rows.first + i));
    const Element* const gate = pre_activations + i * 2 * F;
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
  };
  const SumParts<Factor> sums(rows.count);
  auto* const hidden_row = numbers_of(as<Factor>(row + 2 * F));
  auto* const second_row = hidden_row + F;
  for_each_step<Factor>(rows.count, [&](int64_t s, int64_t p, int64_t i, int64_t second) {
    back(i, hidden_row);
    if (second >= 0) back(second, second_row);
    store_panels_row(hidden_row, second < 0 ? nullptr : second_row, F, sums.steps(s),
                     hidden + sums.first_step(s) * round_up(F, panel_width) + p * panel_width);
  });
}

template <class Element, class Factor>
void backward_rows(const moesaic_experts& experts, RowRange rows, const void* all_pre_activations,
                   const void* all_grad_y, float* grad_row_weights, float* rows_out, void* hidden, void* grad_gate_up_,
                   float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  Factor* const grad_gate_up = as<Factor>(grad_gate_up_);
  Factor* const panel = as<Factor>(scratch);
  Factor* const block = panel + panel_size;
  float* const grad_hidden = as<float>(block + blocked_size(m, 1));
  float* const row = grad_hidden + m * F;
  float* const out = rows_out + rows.first * D;
  const Element* const pre_activations = as<Element>(all_pre_activations) + rows.first * 2 * F;
  const Element* const grad_y = as<Element>(all_grad_y);
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  const Right<Element, Factor> down{as<Element>(experts.down) + rows.expert * D * F, F, false};
  for (int64_t start = 0; start < D; start += block_numbers<Factor>) {
    const int64_t width = width_of_block<Factor>(D, start);
    gather_block(grad_y, D, tokens, m, start, width, block);
    multiply(block, m, width, down.from(start, 0), F, Into<float>{grad_hidden, F, start > 0}, panel);
  }

  const bool swiglu = experts.activation == MOESAIC_SWIGLU;
  const auto back = swiglu ? activate_back<Swiglu, Element, Factor> : activate_back<ClampedSwiglu, Element, Factor>;
  back(experts, rows, pre_activations, grad_hidden, grad_row_weights, as<Factor>(hidden), grad_gate_up, row);
  if (experts.down_bias) {
    const Element* const bias = as<Element>(experts.down_bias) + rows.expert * D;
    for (int64_t i = 0; i < m; ++i) {
      grad_row_weights[experts.plan.assignments[rows.first + i]] += dot(grad_y + tokens[i] * D, bias, D);
    }
  }

  const Right<Element, Factor> gate_up{as<Element>(experts.gate_up) + rows.expert * 2 * F * D, D, false};
  for (int64_t start = 0; start < 2 * F; start += block_numbers<Factor>) {
    multiply(grad_gate_up + block_at<Factor>(start, m), m, width_of_block<Factor>(2 * F, start), gate_up.from(start, 0),
             D, Into<float>{out, D, start > 0}, panel);
  }
}

// Calls add(sums) on the sums of `count` numbers, which are the result itself or, where it is rounded, `sums`.
template <class Element, class Add>
void add_up(Element* result, float* sums, int64_t count, Turn turn, Add add) {
  if constexpr (std::is_same_v<Element, float>) sums = result;
  if (turn.first) memset(sums, 0, size_t(count) * sizeof(float));
  add(sums);
  if constexpr (!std::is_same_v<Element, float>) {
    if (turn.last) copy_floats(sums, count, result);
  }
}

// `sums` has 2F + D floats where the results are rounded.
template <class Element, class Factor>
void bias_gradients(const moesaic_experts& experts, RowRange rows, const Element* grad_y, const Factor* grad_gate_up,
                    Turn turn, const moesaic_expert_gradients& gradients, float* sums) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  if (gradients.gate_up_bias) {
    add_up(as<Element>(gradients.gate_up_bias) + rows.expert * 2 * F, sums, 2 * F, turn, [&](float* to) {
      for (int64_t start = 0; start < 2 * F; start += block_numbers<Factor>) {
        const Factor* const block = grad_gate_up + block_at<Factor>(start, m);
        for (int64_t i = 0; i < m; ++i) {
          add_scaled(numbers_of(block + i * block_stride), 1.0f, width_of_block<Factor>(2 * F, start), to + start);
        }
      }
    });
  }
  if (gradients.down_bias) {
    add_up(as<Element>(gradients.down_bias) + rows.expert * D, sums + 2 * F, D, turn, [&](float* to) {
      for (int64_t i = 0; i < m; ++i) {
        add_scaled(grad_y + experts.plan.tokens[rows.first + i] * D, weight_of(experts, rows.first + i), D, to);
      }
    });
  }
}

// Where `rows` rows of a gradient go, from row `first_row` of an expert's (rows, columns) on. Sums that one chunk completes
// need not be kept, so that all rows may share the first.
template <class Element>
Into<Element> into_gradient(Element* gradient, int64_t stride, float* sums, int64_t columns, int64_t first_row,
                            Turn turn) {
  if constexpr (std::is_same_v<Element, float>) {
    return {gradient + first_row * stride, stride, !turn.first};
  } else {
    const bool at_once = turn.first && turn.last;
    return {sums + (at_once ? 0 : first_row * columns), columns, !turn.first,
            turn.last ? gradient + first_row * stride : nullptr, stride};
  }
}

// Columns start .. start + width - 1 of a blocked matrix (m, any), to be multiplied as columns: where they stand, or for
// pairs in `block`.
template <class Factor>
const Factor* transposable(const Factor* matrix, int64_t m, int64_t start, int64_t width, Factor* block) {
  if constexpr (std::is_same_v<Factor, float>) {
    return matrix + block_at(start, m);
  } else {
    const auto* const from = numbers_of(matrix + block_at<Factor>(start, m)) + start % block_numbers<Factor>;
    constexpr int64_t stride = block_stride * numbers_per<Factor>;
    gather_transposable(m, width, [&](int64_t row) { return from + row * stride; }, block);
    return block;
  }
}

template <class Element, class Factor>
void weight_gradients(const moesaic_experts& experts, RowRange rows, const void* all_grad_y, const void* hidden,
                      const void* grad_gate_up_, ColumnRange gate_up_columns, ColumnRange down_columns, Turn turn,
                      const moesaic_expert_gradients& gradients, float* sums, float* scratch) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size, m = rows.count;
  const Factor* const grad_gate_up = as<Factor>(grad_gate_up_);
  Factor* const block = as<Factor>(scratch);
  Factor* const panels = block + blocked_size(m, 1);
  float* const gate_up_sums = sums + if_rounded<Element>(2 * F + D);
  float* const down_sums = gate_up_sums + if_rounded<Element>(2 * F * gate_up_columns.count);
  const Element* const grad_y = as<Element>(all_grad_y);
  const int32_t* const tokens = experts.plan.tokens + rows.first;

  if (gate_up_columns.count) {
    Element* const to = as<Element>(gradients.gate_up) + rows.expert * 2 * F * D + gate_up_columns.first;
    gather_panels(as<Element>(experts.x), D, tokens, m, gate_up_columns, panels);
    for (int64_t start = 0; start < 2 * F; start += block_width) {
      const int64_t width = width_of_block(2 * F, start);
      multiply_transposed(transposable(grad_gate_up, m, start, width, block), m, width, panels, gate_up_columns.count,
                          {0, gate_up_columns.count},
                          into_gradient(to, D, gate_up_sums, gate_up_columns.count, start, turn));
    }
    if (gate_up_columns.first == 0) bias_gradients(experts, rows, grad_y, grad_gate_up, turn, gradients, sums);
  }
  if (down_columns.count) {
    Element* const to = as<Element>(gradients.down) + rows.expert * D * F + down_columns.first;
    for (int64_t start = 0; start < D; start += block_width) {
      const int64_t width = width_of_block(D, start);
      gather_transposable(m, width, [&](int64_t row) { return grad_y + tokens[row] * D + start; }, block);
      multiply_transposed(block, m, width, as<Factor>(hidden), F, down_columns,
                          into_gradient(to, F, down_sums, down_columns.count, start, turn));
    }
  }
}

template <class Element>
void sum_rows(const moesaic_experts& experts, const float* rows, int64_t first, int64_t last, void* out) {
  const int64_t D = experts.hidden_size;
  const int32_t* const offsets = experts.plan.token_offsets;
  const int32_t* const token_rows = experts.plan.token_rows;
  for (int64_t t = first; t < last; ++t) {
    if (t + 1 < last) {
      for (int32_t k = offsets[t + 1]; k < offsets[t + 2]; ++k) {
        for (int64_t j = 0; j < D; j += 16) MOESAIC_PREFETCH(rows + token_rows[k] * D + j);
      }
    }
    Element* const to = as<Element>(out) + t * D;
    if (offsets[t] == offsets[t + 1]) memset(to, 0, size_t(D) * sizeof(Element));
    for_each_vector(D, [&](int64_t j, int some) {
      if (offsets[t] == offsets[t + 1]) return;
      Vector sum = load(rows + token_rows[offsets[t]] * D + j, some);
      for (int32_t k = offsets[t] + 1; k < offsets[t + 1]; ++k) sum = sum + load(rows + token_rows[k] * D + j, some);
      store(sum, to + j, some);
    });
  }
}

template <class Element, class Factor = float>
constexpr ExpertKernels expert_kernels{int(sizeof(Element)),
                                       panel_width,
                                       buffer_sizes<Element, Factor>,
                                       sums_size<Element>,
                                       forward_rows<Element, Factor>,
                                       few_hidden<Element>,
                                       few_outputs<Element>,
                                       backward_rows<Element, Factor>,
                                       weight_gradients<Element, Factor>,
                                       sum_rows<Element>};

}  // namespace
