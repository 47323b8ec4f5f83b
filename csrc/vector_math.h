// Rows of floats of any length, vector by vector, in terms of `Vector`. An Element is a float or a BFloat16. Internal
// linkage, like matrix_product.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bfloat16.h"
#include "sizes.h"

namespace {

// Calls act(j, some) for each vector of `count` floats: it starts at j and has `some` of them, all but in the last.
template <class Act>
inline void for_each_vector(int64_t count, Act act) {
  for (int64_t j = 0; j < count; j += Vector::width) act(j, int(smaller<int64_t>(Vector::width, count - j)));
}

template <class Element>
inline Vector load(const Element* from, int some) {
  return some == Vector::width ? Vector::load(from) : Vector::load_some(from, some);
}

template <class Element>
inline void store(Vector vector, Element* to, int some) {
  if (some == Vector::width) {
    vector.store(to);
  } else {
    vector.store_some(to, some);
  }
}

// Also from one type to the other. The compiler's own copy has too long a start for rows as short as these.
template <class From, class To>
inline void copy_floats(const From* from, int64_t count, To* to) {
  for_each_vector(count, [&](int64_t j, int some) { store(load(from + j, some), to + j, some); });
}

inline void copy_floats(const BFloat16* from, int64_t count, BFloat16* to) {
  memcpy(to, from, size_t(count) * sizeof *from);
}

template <class Element>
inline float dot(const Element* a, const Element* b, int64_t count) {
  Vector sums[4] = {Vector::fill(0.0f), Vector::fill(0.0f), Vector::fill(0.0f), Vector::fill(0.0f)};
  constexpr int64_t step = 4 * Vector::width;
  int64_t j = 0;
  for (; j + step <= count; j += step) {
    for (int k = 0; k < 4; ++k) {
      sums[k] = multiply_add(Vector::load(a + j + k * Vector::width), Vector::load(b + j + k * Vector::width), sums[k]);
    }
  }
  for_each_vector(count - j, [&](int64_t i, int some) {
    sums[0] = multiply_add(load(a + j + i, some), load(b + j + i, some), sums[0]);
  });
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

}  // namespace
