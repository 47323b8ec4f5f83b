// Linear layers and experts with packed weights for one thread, in terms of packed_product.h and gated_activation.h.
// Internal linkage, like these. The including file hands out packed_kernels.
//
// m rows, D hidden size, F expert intermediate size, G group size.
#pragma once

#include "gated_activation.h"
#include "pack_math.h"
#include "packed_product.h"

namespace {

constexpr int64_t most_group = 64;
// Columns of the buffers of gate and up: a group of hidden units, which need not start where a panel does.
constexpr int64_t hidden_stride = most_group + pair_outputs;

// The scratch of one call.
struct Scratch {
  uint8_t* unpacked;
  const uint8_t** records;  // of the call's rows
  float *gate, *up;         // (m, hidden_stride); `gate` is also (m, pair_outputs) outputs

  static constexpr int64_t size() {
    return (unpacked_bytes + most_packed_rows * int64_t(sizeof(uint8_t*))) / int64_t(sizeof(float)) +
           2 * most_packed_rows * hidden_stride;
  }

  explicit Scratch(float* scratch)
      : unpacked(reinterpret_cast<uint8_t*>(scratch)),
        records(reinterpret_cast<const uint8_t**>(unpacked + unpacked_bytes)),
        gate(reinterpret_cast<float*>(records + most_packed_rows)),
        up(gate + most_packed_rows * hidden_stride) {}
};

// Panels that hold outputs first .. first + count - 1.
struct PanelRange {
  int64_t first, count;
  PanelRange(int64_t first_output, int64_t outputs)
      : first(first_output / panel_outputs), count(divide_up(first_output + outputs, panel_outputs) - first) {}
};

// `count` biases, or zeros, with zeros behind them.
inline void copy_bias(const float* bias, int64_t count, int64_t room, float* to) {
  for (int64_t j = 0; j < room; ++j) to[j] = bias && j < count ? bias[j] : 0.0f;
}

inline int64_t matrix_of(const moesaic_packed_experts& experts, int64_t expert) {
  return experts.slots ? experts.slots[expert] : expert;
}

// Records of a group of `count` hidden units, the first of them number `column`, from gate and up (m, hidden_stride).
template <class Activation, int G>
void activate_group(const moesaic_packed_experts& experts, RowRange rows, int64_t column, int64_t count,
                    const float* gate, const float* up, uint8_t* records) {
  const Activation activation(experts);
  const int64_t F = experts.intermediate_size;
  const float* const bias = experts.gate_up_bias ? experts.gate_up_bias + rows.expert * 2 * F + column : nullptr;
  float gate_bias[G], up_bias[G], hidden[G];
  copy_bias(bias, count, G, gate_bias);
  copy_bias(bias ? bias + F : nullptr, count, G, up_bias);
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t j = 0; j < count; j += Vector::width) {
      const Vector g = Vector::load(gate + i * hidden_stride + j) + Vector::load(gate_bias + j);
      const Vector u = Vector::load(up + i * hidden_stride + j) + Vector::load(up_bias + j);
      activation(g, u).value.store(hidden + j);
    }
    round_to_record<G>(hidden, count, records + i * record_bytes(F, G));
  }
}

void hidden(const moesaic_packed_experts& experts, RowRange rows, ColumnRange columns, const uint8_t* x_records,
            uint8_t* hidden_records, float* scratch_floats) {
  const Scratch scratch(scratch_floats);
  const moesaic_packed& w = experts.gate_up;
  const int64_t F = experts.intermediate_size, G = experts.down.group_size, m = rows.count;
  const int64_t x_bytes = record_bytes(experts.hidden_size, w.group_size), matrix = matrix_of(experts, rows.expert);
  for (int64_t i = 0; i < m; ++i) scratch.records[i] = x_records + experts.plan.tokens[rows.first + i] * x_bytes;
  const bool clamped = experts.activation == MOESAIC_CLAMPED_SWIGLU;
  const auto activate = G == 32 ? (clamped ? activate_group<ClampedSwiglu, 32> : activate_group<Swiglu, 32>)
                                : (clamped ? activate_group<ClampedSwiglu, 64> : activate_group<Swiglu, 64>);
  for (int64_t j = columns.first; j < columns.first + columns.count; j += G) {
    const int64_t count = smaller(G, columns.first + columns.count - j);
    const PanelRange gate(j, count), up(F + j, count);
    multiply(w, matrix, gate.first, gate.count, scratch.records, m, scratch.gate, hidden_stride, scratch.unpacked);
    multiply(w, matrix, up.first, up.count, scratch.records, m, scratch.up, hidden_stride, scratch.unpacked);
    uint8_t* const to = hidden_records + rows.first * record_bytes(F, G) + record_bytes(j, G);
    activate(experts, rows, j, count, scratch.gate, scratch.up + (F + j) % panel_outputs, to);
  }
}

// Calls take(first column, count, outputs (m, pair_outputs), biases) for each two panels of these columns.
template <class Take>
inline void for_each_pair(const moesaic_packed& w, int64_t matrix, const float* bias, int64_t m, ColumnRange columns,
                          const Scratch& scratch, const Take& take) {
  for (int64_t j = columns.first; j < columns.first + columns.count; j += pair_outputs) {
    const int64_t count = smaller<int64_t>(pair_outputs, columns.first + columns.count - j);
    const PanelRange panels(j, count);
    multiply(w, matrix, panels.first, panels.count, scratch.records, m, scratch.gate, pair_outputs, scratch.unpacked);
    float biases[pair_outputs];
    copy_bias(bias ? bias + j : nullptr, count, pair_outputs, biases);
    take(j, count, scratch.gate, biases);
  }
}

void add_outputs(const moesaic_packed_experts& experts, RowRange rows, ColumnRange columns,
                 const uint8_t* hidden_records, float* y, float* scratch_floats) {
  const Scratch scratch(scratch_floats);
  const moesaic_packed& w = experts.down;
  const int64_t D = experts.hidden_size, bytes = record_bytes(w.columns, w.group_size);
  for (int64_t i = 0; i < rows.count; ++i) scratch.records[i] = hidden_records + (rows.first + i) * bytes;
  const float* const bias = experts.down_bias ? experts.down_bias + rows.expert * D : nullptr;
  const auto add = [&](int64_t column, int64_t count, const float* outputs, const float* biases) {
    for (int64_t i = 0; i < rows.count; ++i) {
      const float* const weights = experts.row_weights;
      const Vector weight = Vector::fill(weights ? weights[experts.plan.assignments[rows.first + i]] : 1.0f);
      float* const to = y + experts.plan.tokens[rows.first + i] * D + column;
      const float* const from = outputs + i * pair_outputs;
      for_each_vector(count, [&](int64_t j, int some) {
        const Vector sum = load(from + j, some) + load(biases + j, some);
        store(multiply_add(weight, sum, load(to + j, some)), to + j, some);
      });
    }
  };
  for_each_pair(w, matrix_of(experts, rows.expert), bias, rows.count, columns, scratch, add);
}

void add_rows(const moesaic_plan& plan, int64_t num_rows, int64_t hidden_size, ColumnRange columns, const float* rows,
              const float* row_weights, float* y) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t n = plan.assignments[i];
    const Vector weight = Vector::fill(row_weights[n]);
    const float* const from = rows + n * hidden_size + columns.first;
    float* const to = y + plan.tokens[i] * hidden_size + columns.first;
    for_each_vector(columns.count, [&](int64_t j, int some) {
      store(multiply_add(weight, load(from + j, some), load(to + j, some)), to + j, some);
    });
  }
}

void linear(const moesaic_packed& w, const float* bias, RowRange tokens, ColumnRange columns, const uint8_t* x_records,
            float* y, float* scratch_floats) {
  const Scratch scratch(scratch_floats);
  const int64_t bytes = record_bytes(w.columns, w.group_size);
  for (int64_t i = 0; i < tokens.count; ++i) scratch.records[i] = x_records + (tokens.first + i) * bytes;
  const auto write = [&](int64_t column, int64_t count, const float* outputs, const float* biases) {
    for (int64_t i = 0; i < tokens.count; ++i) {
      float* const to = y + (tokens.first + i) * w.rows + column;
      const float* const from = outputs + i * pair_outputs;
      for_each_vector(count, [&](int64_t j, int some) {
        store(load(from + j, some) + load(biases + j, some), to + j, some);
      });
    }
  };
  for_each_pair(w, 0, bias, tokens.count, columns, scratch, write);
}

constexpr PackedKernels packed_kernels{Scratch::size(), round_row, hidden, add_outputs, add_rows, linear, pack_panel};

}  // namespace
