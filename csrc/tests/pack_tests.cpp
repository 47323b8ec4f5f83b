// Packing by every instruction set: each number is as near to its code's as any code is, and the sets agree. To be built with
// sanitizers: every array has exactly its size. The first argument seeds the random sizes and numbers. Prints what is wrong
// and exits with 1.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "pack.h"
#include "random_tests.h"

namespace {

struct Weight {
  int64_t rows, columns;
  bool is_float;
  std::vector<float> values;
  std::vector<uint16_t> halves;
  std::vector<int8_t> table;
  std::vector<float> ends{-127, 127, 120};

  Weight() : rows(1 + below(40)), columns(1 + below(150)), is_float(below(2)), values(numbers(rows * columns, 1)) {
    for (float& value : values) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      halves.push_back(uint16_t(bits >> 16));
      bits &= is_float ? ~0u : 0xffff0000u;
      std::memcpy(&value, &bits, 4);
    }
    for (int i = 0; i < 16; ++i) table.push_back(int8_t(-127 + 16 * i + below(15)));
  }

  moesaic_packing packing(int64_t group_size, int bits) const {
    const void* const weight = is_float ? static_cast<const void*>(values.data()) : halves.data();
    return {rows, columns, int32_t(group_size), bits, is_float ? MOESAIC_FLOAT32 : MOESAIC_BFLOAT16, weight,
            bits == 4 ? table.data() : nullptr, ends.data(), int64_t(ends.size())};
  }
};

struct Code {
  double number, scale;
};

Code code_at(const Weight& w, const std::vector<uint8_t>& data, int64_t G, int64_t bits, int64_t row, int64_t column) {
  const int64_t groups = (w.columns + G - 1) / G, bytes = 32 + 16 * G * bits / 8;
  const uint8_t* const block = data.data() + (row / 16 * groups + column / G) * bytes;
  const int64_t quad = column % G / 4, byte = 4 * (row % 16) + column % 4;
  uint32_t scale_bits = uint32_t(block[2 * (row % 16)] | block[2 * (row % 16) + 1] << 8) << 16;
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  if (bits == 8) return {double(block[32 + 64 * quad + byte]) - 128, scale};
  const uint8_t both = block[32 + 64 * (quad / 2) + byte];
  return {double(w.table[quad % 2 ? both >> 4 : both & 15]), scale};
}

void test_codes(const Weight& w, const std::vector<uint8_t>& data, int64_t G, int64_t bits, const std::string& where) {
  int64_t wrong = 0;
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t column = 0; column < w.columns; ++column) {
      const double value = w.values[size_t(row * w.columns + column)];
      const Code code = code_at(w, data, G, bits, row, column);
      double nearest = std::numeric_limits<double>::infinity();
      for (int n = -127; n <= 127; ++n) {
        if (bits == 8) nearest = std::fmin(nearest, std::fabs(value - n * code.scale));
      }
      for (const int8_t n : w.table) {
        if (bits == 4) nearest = std::fmin(nearest, std::fabs(value - n * code.scale));
      }
      wrong += std::fabs(value - code.number * code.scale) > nearest + 1e-6 * std::fabs(value);
    }
  }
  expect(wrong == 0, where + ": " + std::to_string(wrong) + " numbers have not the nearest code");
}

void test_packing() {
  Weight w;
  const int64_t G = 32 << below(2);
  const int bits = 4 << below(2);
  const moesaic_packing packing = w.packing(G, bits);
  const size_t bytes = size_t(moesaic_packed_bytes(w.rows, w.columns, G, bits));
  std::vector<uint8_t> first;
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    const std::string where = *name + numbered(", rows columns G bits", {w.rows, w.columns, G, bits});
    std::vector<uint8_t> data(bytes), again(bytes);
    expect(moesaic_pack(&packing, 1, *name, data.data()) == 0, where);
    expect(moesaic_pack(&packing, 3, *name, again.data()) == 0, where);
    expect(data == again, where + ": threads");
    test_codes(w, data, G, bits, where);
    if (first.empty()) first = data;
    int64_t different = 0;
    for (size_t i = 0; i < bytes; ++i) different += data[i] != first[i];
    expect(bits == 4 || different == 0, where + ": other bytes than the best instruction set");
  }
  const size_t bad = size_t(below(w.rows * w.columns));
  w.values[bad] = below(2) ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  w.halves[bad] = 0x7f80;
  std::vector<uint8_t> data(bytes);
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    expect(moesaic_pack(&packing, 2, *name, data.data()) == -4, std::string(*name) + ": a number that is not finite");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  for (int64_t i = arguments.get(2, 40); i > 0; --i) test_packing();
  return verdict();
}
