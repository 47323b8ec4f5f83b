// Four floats in plain C++, which compilers turn into the registers that every machine of an architecture has.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"

namespace {

struct Vector {
  static constexpr int width = 4;
  float v[width];

  template <class Entry>
  static Vector make(Entry entry) {
    Vector made;
    for (int i = 0; i < width; ++i) made.v[i] = entry(i);
    return made;
  }
  static Vector load(const float* from) {
    Vector loaded;
    memcpy(loaded.v, from, sizeof loaded.v);
    return loaded;
  }
  static Vector load_some(const float* from, int count) {
    return make([&](int i) { return i < count ? from[i] : 0.0f; });
  }
  static Vector load(const BFloat16* from) {
    return make([&](int i) { return widened(from[i]); });
  }
  static Vector load_some(const BFloat16* from, int count) {
    return make([&](int i) { return i < count ? widened(from[i]) : 0.0f; });
  }
  static Vector fill(float value) {
    return make([&](int) { return value; });
  }
  void store(float* to) const { memcpy(to, v, sizeof v); }
  void store_some(float* to, int count) const {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  }
  void store(BFloat16* to) const { store_some(to, width); }
  void store_some(BFloat16* to, int count) const {
    for (int i = 0; i < count; ++i) to[i] = rounded(v[i]);
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float largest() const {
    const float first = v[0] > v[1] ? v[0] : v[1], second = v[2] > v[3] ? v[2] : v[3];
    return first > second ? first : second;
  }
  // The first of the numbers that equals `value`; `width` where none does.
  int find(float value) const {
    int i = 0;
    while (i < width && v[i] != value) ++i;
    return i;
  }
  static void store_sums(const Vector (&of)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] = of[i].sum();
  }
};

inline Vector operator+(Vector a, Vector b) {
  return Vector::make([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vector operator-(Vector a, Vector b) {
  return Vector::make([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vector operator*(Vector a, Vector b) {
  return Vector::make([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vector operator/(Vector a, Vector b) {
  return Vector::make([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return Vector::make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}

// NaN in `a` stays NaN.
inline Vector at_most(Vector a, Vector limit) {
  return Vector::make([&](int i) { return limit.v[i] < a.v[i] ? limit.v[i] : a.v[i]; });
}
inline Vector at_least(Vector a, Vector limit) {
  return Vector::make([&](int i) { return limit.v[i] > a.v[i] ? limit.v[i] : a.v[i]; });
}
// `value` where a <= b, else 0.
inline Vector where_at_most(Vector a, Vector b, Vector value) {
  return Vector::make([&](int i) { return a.v[i] > b.v[i] ? 0.0f : value.v[i]; });
}
inline Vector round_to_integer(Vector a) {
  return Vector::make([&](int i) { return rintf(a.v[i]); });
}
// a times 2 to the power of the whole number n in -126 .. 127.
inline Vector times_power_of_two(Vector a, Vector n) {
  return Vector::make([&](int i) {
    const uint32_t bits = n.v[i] == n.v[i] ? uint32_t(int32_t(n.v[i]) + 127) << 23 : 0x7fc00000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return a.v[i] * power;
  });
}

// 4 rows of 16 bytes, `stride` numbers apart, into `to`: row p, `to_stride` further each, holds element p of every row.
template <class Element>
inline void transpose_block(const Element* from, int64_t stride, float* to, int64_t to_stride) {
  for (int p = 0; p < int(16 / sizeof(Element)); ++p) {
    for (int r = 0; r < 4; ++r) to[p * to_stride + r] = widened(from[r * stride + p]);
  }
}

}  // namespace
