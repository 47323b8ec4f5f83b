// bfloat16: the upper half of a float.
#pragma once

#include <stdint.h>
#include <string.h>

struct BFloat16 {
  uint16_t bits;
};

// Internal linkage: each instruction set compiles them anew.
namespace {

// Two numbers, multiplied with two others in one step of a product, which adds both results up.
struct Pair {
  BFloat16 first, second;
};

// Numbers that an element of a factor holds, a float or a Pair.
template <class Factor>
constexpr int numbers_per = 1;
template <>
constexpr int numbers_per<Pair> = 2;

inline float widened(BFloat16 number) {
  const uint32_t bits = uint32_t(number.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, of two equally near ones to the even one. NaN stays NaN.
inline BFloat16 rounded(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  if (number != number) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float widened(float number) { return number; }

}  // namespace
