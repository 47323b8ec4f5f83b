// Packed matrices of random codes, for tests.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "packed.h"
#include "random_tests.h"

namespace {

// Matrices (count, N, K) of random codes, and what they stand for.
struct Packed {
  int64_t count, N, K, G, bits;
  std::vector<int8_t> table;
  std::vector<uint8_t> data;
  std::vector<double> weights;

  Packed(int64_t count_, int64_t N_, int64_t K_) : count(count_), N(N_), K(K_), G(32 << below(2)), bits(4 << below(2)) {
    for (int i = 0; i < 16; ++i) table.push_back(int8_t(below(8) ? below(255) - 127 : below(2) ? -128 : 127));
    const int64_t bytes = moesaic_packed_bytes(N, K, G, bits);
    data.resize(size_t(count * bytes));
    weights.resize(size_t(count * N * K));
    for (int64_t e = 0; e < count; ++e) fill(data.data() + e * bytes, weights.data() + e * N * K);
  }

  moesaic_packed view() const {
    return {N, K, int32_t(G), int32_t(bits), bits == 4 ? table.data() : nullptr, data.data()};
  }

 private:
  // Codes of outputs and inputs that are only there to fill a block are random too.
  void fill(uint8_t* block, double* w) {
    const int64_t panels = (N + 15) / 16, groups = (K + G - 1) / G;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t g = 0; g < groups; ++g, block += 32 + 16 * G * bits / 8) {
        for (int64_t b = 32; b < 32 + 16 * G * bits / 8; ++b) block[b] = uint8_t(below(256));
        for (int64_t o = 0; o < 16; ++o) {
          float scale = float(normal(1 / (70 * std::sqrt(double(K)))));
          uint32_t scale_bits;
          std::memcpy(&scale_bits, &scale, 4);
          const uint16_t half = uint16_t(scale_bits >> 16);
          std::memcpy(block + 2 * o, &half, 2);
          scale_bits = uint32_t(half) << 16;
          std::memcpy(&scale, &scale_bits, 4);
          for (int64_t i = 0; i < G; ++i) {
            const int64_t n = 16 * p + o, k = g * G + i;
            if (n < N && k < K) w[n * K + k] = scale * number(block + 32, o, i);
          }
        }
      }
    }
  }

  int number(const uint8_t* codes, int64_t output, int64_t input) const {
    const int64_t quad = input / 4, byte = 4 * output + input % 4;
    if (bits == 8) return codes[64 * quad + byte] - 128;
    const uint8_t both = codes[64 * (quad / 2) + byte];
    return table[quad % 2 ? both >> 4 : both & 15];
  }
};

}  // namespace
