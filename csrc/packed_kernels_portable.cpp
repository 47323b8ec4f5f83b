#include "compiler.h"
#include "packed_kernels.h"
#include "vector_portable.h"

namespace {

constexpr int tile_rows = 2;
constexpr int direct_rows = 2;

struct Numbers {
  int8_t v[4][panel_outputs];  // each input's outputs together, which compilers turn into vectors
  static Numbers load(const uint8_t* from) {
    Numbers numbers;
    memcpy(numbers.v, from, sizeof numbers.v);
    return numbers;
  }
  void store(uint8_t* to) const { memcpy(to, v, sizeof v); }
};

struct Table {
  int8_t v[16] = {};
  explicit Table(const int8_t* table) {
    if (table) memcpy(v, table, sizeof v);
  }
};

inline Numbers numbers_of_8_bits(const uint8_t* codes) {
  Numbers numbers;
  for (int o = 0; o < panel_outputs; ++o) {
    for (int i = 0; i < 4; ++i) numbers.v[i][o] = int8_t(codes[4 * o + i] - 128);
  }
  return numbers;
}

inline void numbers_of_4_bits(const uint8_t* codes, const Table& table, Numbers& first, Numbers& second) {
  for (int o = 0; o < panel_outputs; ++o) {
    for (int i = 0; i < 4; ++i) {
      first.v[i][o] = table.v[codes[4 * o + i] & 15];
      second.v[i][o] = table.v[codes[4 * o + i] >> 4];
    }
  }
}

struct Inputs {
  int8_t v[4];
  static Inputs load(const uint8_t* from) {
    Inputs four;
    memcpy(four.v, from, sizeof four.v);
    return four;
  }
};

// sums += the products of 16 outputs. Two products of magnitudes 128 and 127 fit 16 bits, of which a register holds twice
// as many as of 32. On its own, because compilers turn a loop into vectors, and what is left of it unrolled in a tile not.
MOESAIC_NOT_INLINE void add_products(const int8_t* numbers, const int8_t* inputs, int32_t* __restrict sums) {
  const int16_t a = inputs[0], b = inputs[1], c = inputs[2], d = inputs[3];
  const int8_t *const second = numbers + panel_outputs, *const third = second + panel_outputs;
  const int8_t* const fourth = third + panel_outputs;
  for (int o = 0; o < panel_outputs; ++o) {
    const int16_t first_two = int16_t(numbers[o] * a + second[o] * b);
    const int16_t last_two = int16_t(third[o] * c + fourth[o] * d);
    sums[o] += first_two + last_two;
  }
}

struct Sums {
  int32_t v[panel_outputs];
  static Sums fill(int32_t start) {
    Sums sums;
    for (int32_t& one : sums.v) one = start;
    return sums;
  }
  void add(const Numbers& numbers, const Inputs& inputs) { add_products(numbers.v[0], inputs.v, v); }
  Vector scaled(int j, Vector scale, Vector) const {
    return scale * Vector::make([&](int i) { return float(v[j * Vector::width + i]); });
  }
};

inline int32_t start_of(int32_t) { return 0; }

inline uint32_t largest_bits(const float* x, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = largest < bits ? bits : largest;
  }
  return largest;
}

// The sum is not needed here.
inline int32_t round_group(const float* x, float inverse, int count, int8_t* codes) {
  for (int i = 0; i < count; ++i) {
    const float whole = rintf(x[i] * inverse);
    codes[i] = whole >= -127.0f && whole <= 127.0f ? int8_t(whole) : int8_t(-128);  // NaN
  }
  return 0;
}

}  // namespace
#define MOESAIC_UNROLL_QUADS
#include "packed_math.h"

const PackedKernels* moesaic_packed_kernels_portable() { return &packed_kernels; }
