// Products of a few rows with a matrix that is read once, in the order in which it stands: what decoding needs, where the
// time is that of reading the weights. In terms of `Vector` and `dot_rows` of the file that includes this one; internal
// linkage, like matrix_product.h.
#pragma once

#include "matrix_product.h"

namespace {

constexpr int dot_columns = 4;  // rows of the matrix that are read side by side

// c (rows, columns) = a (rows, steps) times the transpose of matrix (columns, steps). The order of a sum does not depend
// on `rows` and `columns`.
template <int rows, int columns, class Element>
void dot_tile(const float* a, int64_t a_stride, const Element* matrix, int64_t steps, const Element* ahead, float* c,
              int64_t c_stride) {
  Vector sums[rows][columns];
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    MOESAIC_UNROLL
    for (int j = 0; j < columns; ++j) sums[i][j] = Vector::fill(0.0f);
  }
  const auto step = [&](int64_t p, auto read) {
    Vector right[columns];
    MOESAIC_UNROLL
    for (int j = 0; j < columns; ++j) right[j] = read(matrix + j * steps + p);
    MOESAIC_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Vector left = read(a + i * a_stride + p);
      MOESAIC_UNROLL
      for (int j = 0; j < columns; ++j) sums[i][j] = multiply_add(left, right[j], sums[i][j]);
    }
  };
  constexpr int64_t line = line_bytes / int64_t(sizeof(Element));
  int64_t p = 0;
  for (; p + line <= steps; p += line) {
    if (ahead) {
      MOESAIC_UNROLL
      for (int j = 0; j < columns; ++j) MOESAIC_PREFETCH(ahead + j * steps + p);
    }
    MOESAIC_UNROLL
    for (int64_t k = 0; k < line; k += Vector::width) step(p + k, [](const auto* from) { return Vector::load(from); });
  }
  for (; p < steps; p += Vector::width) {
    const int some = int(smaller<int64_t>(Vector::width, steps - p));
    step(p, [=](const auto* from) { return load(from, some); });
  }
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    if constexpr (columns == 4) {
      Vector::store_sums(sums[i], c + i * c_stride);
    } else {
      for (int j = 0; j < columns; ++j) c[i * c_stride + j] = sums[i][j].sum();
    }
  }
}

template <int columns, class Element, int most_rows = dot_rows>
void dot_tile_of(int64_t rows, const float* a, int64_t a_stride, const Element* matrix, int64_t steps,
                 const Element* ahead, float* c, int64_t c_stride) {
  if constexpr (most_rows > 0) {
    if (rows == most_rows) {
      dot_tile<most_rows, columns>(a, a_stride, matrix, steps, ahead, c, c_stride);
    } else {
      dot_tile_of<columns, Element, most_rows - 1>(rows, a, a_stride, matrix, steps, ahead, c, c_stride);
    }
  }
}

// c (rows, columns) = a (rows, steps) times the transpose of matrix (columns, steps), whose rows follow one another.
template <class Element>
void multiply_few(const float* a, int64_t a_stride, int64_t rows, const Element* matrix, int64_t columns, int64_t steps,
                  float* c, int64_t c_stride) {
  const Parts groups(rows, dot_rows);
  for (int64_t j = 0; j < columns; j += dot_columns) {
    const bool whole = j + dot_columns <= columns, more = j + 2 * dot_columns <= columns;
    for (int64_t g = 0; g < groups.number; ++g) {
      const float* const left = a + groups.start(g) * a_stride;
      const Element* const right = matrix + j * steps;
      float* const to = c + groups.start(g) * c_stride + j;
      if (whole) {
        const Element* const ahead = more && g == 0 ? right + dot_columns * steps : nullptr;
        dot_tile_of<dot_columns>(groups.size(g), left, a_stride, right, steps, ahead, to, c_stride);
      } else {
        for (int64_t k = 0; k < columns - j; ++k) {
          const Element* const none = nullptr;
          dot_tile_of<1>(groups.size(g), left, a_stride, right + k * steps, steps, none, to + k, c_stride);
        }
      }
    }
  }
}

}  // namespace
