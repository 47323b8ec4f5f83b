// How pairs of bfloat16 take the place of floats in the factors of matrix_product.h and expert_rows.h, in terms of
// `interleave_vector` of the file that is included before. An odd number at the end is paired with zero. Internal linkage.
#pragma once

#include "vector_math.h"

namespace {

inline BFloat16* numbers_of(Pair* factors) { return reinterpret_cast<BFloat16*>(factors); }
inline const BFloat16* numbers_of(const Pair* factors) { return reinterpret_cast<const BFloat16*>(factors); }

inline void copy_step(const BFloat16* first, const BFloat16* second, int64_t count, Pair* to) {
  int64_t j = 0;
  for (; second && j + Vector::width <= count; j += Vector::width) interleave_vector(first + j, second + j, to + j);
  for (; j < count; ++j) to[j] = {first[j], second ? second[j] : BFloat16{}};
}

inline void copy_factor(const BFloat16* from, int64_t left, Pair* to) { *to = {from[0], left > 1 ? from[1] : BFloat16{}}; }

template <class From>
inline void copy_block_row(const From* from, int64_t count, Pair* to) {
  copy_floats(from, count, numbers_of(to));
  if (count % 2) numbers_of(to)[count] = BFloat16{};
}

}  // namespace
