// Packing of one panel for one thread, in terms of what packed_product.h is in terms of. Internal linkage, like it.
//
// G group size.
#pragma once

#include <float.h>
#include <math.h>

#include "pack.h"
#include "packed_product.h"

namespace {

constexpr int num_codes = 16;

// The numbers of the codes, ascending: from middles[k] on number k + 1 is nearer than number k.
struct Codes {
  Vector first, steps[num_codes - 1], middles[num_codes - 1];

  explicit Codes(const int8_t* table) : first(Vector::fill(table[0])) {
    for (int k = 0; k + 1 < num_codes; ++k) {
      steps[k] = Vector::fill(float(table[k + 1] - table[k]));
      middles[k] = Vector::fill(0.5f * float(table[k] + table[k + 1]));
    }
  }

  // The nearest number of each of x.
  Vector nearest(Vector x) const {
    Vector number = first;
    MOESAIC_UNROLL
    for (int k = 0; k + 1 < num_codes; ++k) number = number + where_at_most(middles[k], x, steps[k]);
    return number;
  }

  Vector nearest_codes(Vector x) const {
    const Vector one = Vector::fill(1.0f);
    Vector code = Vector::fill(0.0f);
    MOESAIC_UNROLL
    for (int k = 0; k + 1 < num_codes; ++k) code = code + where_at_most(middles[k], x, one);
    return code;
  }
};

inline float rounded_up_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0xffff) & ~0xffffu;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// For given numbers v the best factor of shares w is <w, v> / <v, v>, which takes <w, v>^2 / <v, v> off the error.
template <int G>
float scale_of_4_bits(const moesaic_packing& packing, const Codes& codes, const float* group, int64_t count,
                      float largest) {
  constexpr int vectors = G / Vector::width;
  Vector shares[vectors], counted[vectors];
  float counts[G];
  for (int i = 0; i < G; ++i) counts[i] = i < count ? 1.0f : 0.0f;
  const Vector divisor = Vector::fill(largest == 0.0f ? 1.0f : largest);
  for (int i = 0; i < vectors; ++i) {
    shares[i] = Vector::load(group + i * Vector::width) / divisor;
    counted[i] = Vector::load(counts + i * Vector::width);
  }
  float best = 0.0f, best_gain = -1.0f;
  for (int64_t e = 0; e < packing.num_ends; ++e) {
    const Vector end = Vector::fill(packing.ends[e]);
    Vector products = Vector::fill(0.0f), squares = products;
    for (int i = 0; i < vectors; ++i) {
      const Vector number = codes.nearest(shares[i] * end) * counted[i];
      products = multiply_add(shares[i], number, products);
      squares = multiply_add(number, number, squares);
    }
    const float product = products.sum(), factor = product / squares.sum();
    if (product * factor > best_gain) best = factor, best_gain = product * factor;
  }
  return widened(rounded(largest * best));
}

// Scale and codes of a group of which `count` numbers count; false when one is not finite.
template <int G>
bool pack_group(const moesaic_packing& packing, const Codes& codes, const float* group, int64_t count, float* scale,
                uint8_t* packed) {
  const uint32_t largest_bits_of_group = largest_bits(group, G);
  float largest;
  memcpy(&largest, &largest_bits_of_group, sizeof largest);
  if (!(largest <= FLT_MAX)) return false;
  float scaled[G];
  if (packing.bits == 8) {
    *scale = rounded_up_to_bfloat16(largest / 127.0f);
    const float divisor = *scale == 0.0f ? 1.0f : *scale;
    for (int i = 0; i < G; ++i) scaled[i] = nearbyintf(group[i] / divisor);
    for (int i = 0; i < G; ++i) packed[i] = uint8_t(int32_t(scaled[i]) + 128);
    return true;
  }
  int at = 0;
  while (fabsf(group[at]) != largest) ++at;
  *scale = scale_of_4_bits<G>(packing, codes, group, count, group[at]);
  const Vector divisor = Vector::fill(*scale == 0.0f ? 1.0f : *scale);
  for (int i = 0; i < G; i += Vector::width) codes.nearest_codes(Vector::load(group + i) / divisor).store(scaled + i);
  for (int i = 0; i < G; ++i) packed[i] = uint8_t(int32_t(scaled[i]));
  return true;
}

// The codes of output `output` of a block.
template <int G>
inline void store_codes(const uint8_t* packed, int output, int bits, uint8_t* block) {
  constexpr int quad = 4, line = quad * panel_outputs;
  uint8_t* const to = block + scale_bytes + quad * output;
  for (int q = 0; q < G / quad; ++q) {
    for (int i = 0; i < quad; ++i) {
      if (bits == 8) {
        to[line * q + i] = packed[quad * q + i];
      } else if (q % 2 == 0) {
        to[line * (q / 2) + i] = uint8_t(packed[quad * q + i] | packed[quad * (q + 1) + i] << 4);
      }
    }
  }
}

template <class Element, int G>
bool pack_panel_of(const moesaic_packing& packing, int64_t panel, uint8_t* block) {
  static const int8_t none[num_codes] = {};
  const Codes codes(packing.table ? packing.table : none);
  const int64_t K = packing.columns, row_bytes = block_bytes(G, packing.bits);
  const Element* const weight = static_cast<const Element*>(packing.weight);
  for (int64_t k = 0; k < K; k += G, block += row_bytes) {
    const int64_t count = smaller<int64_t>(G, K - k);
    for (int output = 0; output < panel_outputs; ++output) {
      const int64_t row = panel * panel_outputs + output;
      float group[G] = {}, scale = 0.0f;
      if (row < packing.rows) copy_floats(weight + row * K + k, count, group);
      uint8_t packed[G];
      if (!pack_group<G>(packing, codes, group, count, &scale, packed)) return false;
      const BFloat16 stored = rounded(scale);
      memcpy(block + output * sizeof stored, &stored, sizeof stored);
      store_codes<G>(packed, output, packing.bits, block);
    }
  }
  return true;
}

bool pack_panel(const moesaic_packing& packing, int64_t panel, uint8_t* data) {
  const bool is_float = packing.element == MOESAIC_FLOAT32;
  const auto run = packing.group_size == 32 ? (is_float ? pack_panel_of<float, 32> : pack_panel_of<BFloat16, 32>)
                                            : (is_float ? pack_panel_of<float, 64> : pack_panel_of<BFloat16, 64>);
  return run(packing, panel, data);
}

}  // namespace
