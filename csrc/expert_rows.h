// Rows of an expert, gathered into factors of matrix_product.h, and other work on whole rows. Internal linkage.
//
// m rows of one expert, D hidden size.
#pragma once

#include "expert_kernels.h"
#include "matrix_product.h"

namespace {

// A "blocked" matrix (m, columns) is a left factor: blocks of block_width steps one after another, each (m, block_stride).
template <class Factor = float>
int64_t blocked_size(int64_t m, int64_t columns) {
  return divide_up(columns, block_numbers<Factor>) * m * block_stride;
}
template <class Factor = float>
int64_t width_of_block(int64_t columns, int64_t start) {
  return smaller<int64_t>(block_numbers<Factor>, columns - start);
}
// Where the block stands whose first column is `start`.
template <class Factor = float>
int64_t block_at(int64_t start, int64_t m) {
  return start / block_numbers<Factor> * m * block_stride;
}

template <class Element>
const Element* as(const void* array) {
  return static_cast<const Element*>(array);
}
template <class Element>
Element* as(void* array) {
  return static_cast<Element*>(array);
}

// `count` numbers of one row of a block.
template <class From>
inline void copy_block_row(const From* from, int64_t count, float* to) {
  copy_floats(from, count, to);
}

inline float* numbers_of(float* factors) { return factors; }
inline const float* numbers_of(const float* factors) { return factors; }

// The tokens' rows of x (T, D), columns start .. start + width - 1, as one block.
template <class Element, class Factor>
void gather_block(const Element* x, int64_t D, const int32_t* tokens, int64_t m, int64_t start, int64_t width,
                  Factor* block) {
  for (int64_t i = 0; i < m; ++i) copy_block_row(x + tokens[i] * D + start, width, block + i * block_stride);
}

// One row (columns) of a part's panels of `steps` rows each.
template <class Element, class Factor>
void store_panels_row(const Element* from, const Element* second, int64_t columns, int64_t steps, Factor* to) {
  for (int64_t j = 0; j < columns; j += panel_width) {
    const Element* const beside = second ? second + j : nullptr;
    copy_panel_row(from + j, beside, smaller<int64_t>(panel_width, columns - j), to + j * steps);
  }
}

// Calls put(part, step, row, second) for each step of the parts that m rows are summed up in: the number of its row and of
// the second, -1 where it has none.
template <class Factor, class Put>
void for_each_step(int64_t m, Put put) {
  const SumParts<Factor> sums(m);
  for (int64_t s = 0; s < sums.number; ++s) {
    for (int64_t p = 0; p < sums.steps(s); ++p) {
      const int64_t row = sums.start(s) + p * numbers_per<Factor>, second = row + numbers_per<Factor> - 1;
      put(s, p, row, second > row && second < sums.start(s + 1) ? second : -1);
    }
  }
}

// The tokens' rows of x (T, D), these columns, packed as a right factor.
template <class Element, class Factor>
void gather_panels(const Element* x, int64_t D, const int32_t* tokens, int64_t m, ColumnRange columns, Factor* panels) {
  const SumParts<Factor> sums(m);
  const int64_t padded = round_up(columns.count, panel_width);
  const auto row_at = [&](int64_t i) { return i < 0 ? nullptr : x + tokens[i] * D + columns.first; };
  for_each_step<Factor>(m, [&](int64_t s, int64_t p, int64_t row, int64_t second) {
    store_panels_row(row_at(row), row_at(second), columns.count, sums.steps(s),
                     panels + sums.first_step(s) * padded + p * panel_width);
  });
}

// The rows' numbers, `width` of each from row_at(row) on, as a block whose columns, not its rows, are multiplied.
template <class Factor, class RowAt>
void gather_transposable(int64_t m, int64_t width, RowAt row_at, Factor* block) {
  const SumParts<Factor> sums(m);
  for_each_step<Factor>(m, [&](int64_t s, int64_t p, int64_t row, int64_t second) {
    copy_step(row_at(row), second < 0 ? nullptr : row_at(second), width, block + (sums.first_step(s) + p) * block_stride);
  });
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
template <class Factor>
void store_blocked_row(const float* from, int64_t columns, int64_t m, Factor* to) {
  for (int64_t start = 0; start < columns; start += block_numbers<Factor>) {
    copy_block_row(from + start, width_of_block<Factor>(columns, start), to + block_at<Factor>(start, m));
  }
}

}  // namespace
