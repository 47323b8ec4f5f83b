// Rows of an expert, gathered into factors of matrix_product.h, and other work on whole rows. Internal linkage.
//
// m rows of one expert, D hidden size.
#pragma once

#include "expert_kernels.h"
#include "matrix_product.h"

namespace {

// A "blocked" matrix (m, columns) is a left factor: blocks of block_width columns one after another, each (m,
// block_stride).
inline int64_t blocked_size(int64_t m, int64_t columns) { return divide_up(columns, block_width) * m * block_stride; }
inline int64_t width_of_block(int64_t columns, int64_t start) { return smaller<int64_t>(block_width, columns - start); }

template <class Element>
const Element* as(const void* array) {
  return static_cast<const Element*>(array);
}
template <class Element>
Element* as(void* array) {
  return static_cast<Element*>(array);
}

// The tokens' rows of x (T, D), columns start .. start + width - 1, as one block.
template <class Element>
void gather_block(const Element* x, int64_t D, const int32_t* tokens, int64_t m, int64_t start, int64_t width,
                  float* block) {
  for (int64_t i = 0; i < m; ++i) copy_floats(x + tokens[i] * D + start, width, block + i * block_stride);
}

// One row (columns) of panels of `steps` rows each.
template <class Element>
void store_panels_row(const Element* from, int64_t columns, int64_t steps, float* to) {
  for (int64_t j = 0; j < columns; j += panel_width) {
    copy_panel_row(from + j, smaller<int64_t>(panel_width, columns - j), to + j * steps);
  }
}

// The tokens' rows of x (T, D), these columns, packed as a right factor.
template <class Element>
void gather_panels(const Element* x, int64_t D, const int32_t* tokens, int64_t m, ColumnRange columns, float* panels) {
  const Parts sums(m, most_steps);
  for (int64_t s = 0; s < sums.number; ++s) {
    float* const part = panels + sums.start(s) * round_up(columns.count, panel_width);
    for (int64_t p = 0; p < sums.size(s); ++p) {
      const Element* const from = x + tokens[sums.start(s) + p] * D + columns.first;
      store_panels_row(from, columns.count, sums.size(s), part + p * panel_width);
    }
  }
}

// Row i of c (m, columns) = bias.
template <class Element>
void fill_rows(const Element* bias, int64_t m, int64_t columns, float* c) {
  for (int64_t i = 0; i < m; ++i) copy_floats(bias, columns, c + i * columns);
}

// to += factor * from.
template <class Element>
void add_scaled(const Element* from, float factor, int64_t count, float* to) {
  const Vector scale = Vector::fill(factor);
  for_each_vector(count, [&](int64_t j, int some) {
    store(multiply_add(scale, load(from + j, some), load(to + j, some)), to + j, some);
  });
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

}  // namespace
