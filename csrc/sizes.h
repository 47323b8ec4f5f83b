// How work is cut into parts. Internal to csrc/; internal linkage, because each instruction set compiles it anew.
#pragma once

#include <stdint.h>

namespace {

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// `count` things in as few parts as `most` allows, as equal as they can be.
struct Parts {
  int64_t count, number;
  Parts(int64_t count_, int64_t most) : count(count_), number(divide_up(count_, most)) {}
  int64_t start(int64_t part) const { return count * part / number; }
  int64_t size(int64_t part) const { return start(part + 1) - start(part); }
};

}  // namespace

// Columns first .. first + count - 1.
struct ColumnRange {
  int64_t first, count;
};
