// The step of one matrix, in terms of matrix_product.h. Internal linkage, like it.
//
// The matrix is turned so that it is wide: x (s, l), s <= l, "blocked" as expert_rows.h has it. s is at most block_width, so
// that the Gram matrix is a single block.
#pragma once

#include <math.h>

#include "expert_rows.h"
#include "matrix_product.h"
#include "muon_kernels.h"

namespace {

static_assert(muon_largest_side <= block_width, "a Gram matrix is one block");

struct MatrixSize {
  int64_t rows, columns;
  bool is_tall() const { return rows > columns; }
  int64_t short_side() const { return smaller(rows, columns); }
  int64_t long_side() const { return larger(rows, columns); }
  int64_t count() const { return rows * columns; }
};

inline int64_t muon_scratch_size(int64_t rows, int64_t columns) {
  const MatrixSize size{rows, columns};
  const int64_t s = size.short_side();
  return size.count() + 2 * blocked_size(s, size.long_side()) + 2 * blocked_size(s, s) +
         int64_t(block_width) * panel_width;
}

// Moves the momentum towards the gradient and writes Nesterov's direction. Returns the direction's norm, or -1 where the
// gradient is zero everywhere.
inline float direction_of(const float* gradient, int64_t count, float kept, float* momentum, float* direction) {
  const Vector keep = Vector::fill(kept);
  Vector gradient_squares = Vector::fill(0.0f), squares = gradient_squares;
  for_each_vector(count, [&](int64_t j, int some) {
    const Vector g = load(gradient + j, some);
    const Vector m = multiply_add(keep, load(momentum + j, some) - g, g);
    const Vector d = multiply_add(keep, m - g, g);
    store(m, momentum + j, some);
    store(d, direction + j, some);
    squares = multiply_add(d, d, squares);
    gradient_squares = multiply_add(g, g, gradient_squares);
  });
  bool any = gradient_squares.sum() != 0.0f;
  for (int64_t j = 0; !any && j < count; ++j) any = gradient[j] != 0.0f;  // whose square is too small for a float
  return any ? sqrtf(squares.sum()) : -1.0f;
}

// x = the direction times `scale`.
inline void to_blocked(const float* direction, MatrixSize size, float scale, float* x) {
  const int64_t s = size.short_side(), l = size.long_side();
  const Vector factor = Vector::fill(scale);
  for (int64_t start = 0; start < l; start += block_width) {
    const int64_t width = width_of_block(l, start);
    float* const block = x + block_at(start, s);
    if (size.is_tall()) transpose(direction + start * s, s, width, s, block, block_stride);
    for (int64_t i = 0; i < s; ++i) {
      const float* const from = size.is_tall() ? block + i * block_stride : direction + i * l + start;
      for_each_vector(width, [&](int64_t j, int some) {
        store(load(from + j, some) * factor, block + i * block_stride + j, some);
      });
    }
  }
}

// The other way round: x as a matrix of `size`.
inline void from_blocked(const float* x, MatrixSize size, float* matrix) {
  const int64_t s = size.short_side(), l = size.long_side();
  for (int64_t start = 0; start < l; start += block_width) {
    const int64_t width = width_of_block(l, start);
    const float* const block = x + block_at(start, s);
    if (size.is_tall()) {
      transpose(block, block_stride, s, width, matrix + start * s, s);
    } else {
      for (int64_t i = 0; i < s; ++i) copy_floats(block + i * block_stride, width, matrix + i * l + start);
    }
  }
}

// into (s, s) = left (s, steps) times right, which is known to be symmetric: below the diagonal it is computed, above it
// copied once `complete`.
inline void multiply_symmetric(const float* left, int64_t s, int64_t steps, Right<float> right, Into<float> into,
                               float* panel, bool complete) {
  for (int64_t j = 0; j < s; j += panel_width) {
    const int64_t width = smaller<int64_t>(panel_width, s - j);
    multiply(left + j * block_stride, s - j, steps, right.from(0, j), width, into.from(j, j), panel);
  }
  for (int64_t j = 0; complete && j + panel_width < s; j += panel_width) {
    const int64_t below = j + panel_width;
    transpose(into.sums + below * into.stride + j, into.stride, s - below, panel_width,
              into.sums + j * into.stride + below, into.stride);
  }
}

// next = a x + b (x x^T) x + c (x x^T)^2 x, all blocked; gram and polynomial are (s, s).
inline void iterate(const float* x, int64_t s, int64_t l, const float* coefficients, float* gram, float* polynomial,
                    float* next, float* panel) {
  for (int64_t start = 0; start < l; start += block_width) {
    const float* const block = x + block_at(start, s);
    multiply_symmetric(block, s, width_of_block(l, start), Right<float>{block, block_stride, true},
                       Into<float>{gram, block_stride, start > 0}, panel, start + block_width >= l);
  }
  multiply_symmetric(gram, s, s, Right<float>{gram, block_stride, false}, Into<float>{polynomial, block_stride, false},
                     panel, true);
  const Vector b = Vector::fill(coefficients[1]), c = Vector::fill(coefficients[2]);
  for (int64_t i = 0; i < s; ++i) {
    float* const row = polynomial + i * block_stride;
    for_each_vector(s, [&](int64_t j, int some) {
      store(multiply_add(c, load(row + j, some), b * load(gram + i * block_stride + j, some)), row + j, some);
    });
    row[i] += coefficients[0];
  }
  for (int64_t start = 0; start < l; start += block_width) {
    const int64_t at = block_at(start, s);
    multiply(polynomial, s, s, Right<float>{x + at, block_stride, false}, width_of_block(l, start),
             Into<float>{next + at, block_stride, false}, panel);
  }
}

inline void muon_step(const moesaic_matrix_stack& stack, int64_t matrix, float momentum, float* scratch) {
  const MatrixSize size{stack.rows, stack.columns};
  const int64_t s = size.short_side(), l = size.long_side(), first = matrix * size.count();
  float* const direction = scratch;
  float* x = direction + size.count();
  float* next = x + blocked_size(s, l);
  float* const gram = next + blocked_size(s, l);
  float* const polynomial = gram + blocked_size(s, s);
  float* const panel = polynomial + blocked_size(s, s);

  const float norm = direction_of(stack.gradients + first, size.count(), momentum, stack.momenta + first, direction);
  const Vector keep = Vector::fill(stack.keep), step = Vector::fill(-stack.step_size);
  float* const parameter = stack.parameters + first;
  if (norm < 0.0f) {
    for_each_vector(size.count(), [&](int64_t j, int some) {
      store(load(parameter + j, some) * keep, parameter + j, some);
    });
    return;
  }
  to_blocked(direction, size, 1.0f / (norm + 1e-7f), x);
  for (int64_t i = 0; i < stack.iterations; ++i) {
    iterate(x, s, l, stack.coefficients + 3 * i, gram, polynomial, next, panel);
    float* const last = x;
    x = next, next = last;
  }
  from_blocked(x, size, direction);
  for_each_vector(size.count(), [&](int64_t j, int some) {
    store(multiply_add(step, load(direction + j, some), load(parameter + j, some) * keep), parameter + j, some);
  });
}

constexpr MuonKernels muon_kernels{muon_scratch_size, muon_step};

}  // namespace
