// Rounded rows, and their products with packed weights, for one thread, in terms of what the including file defines:
//   Vector, tile_rows, direct_rows   as many rows as unpacked_tile() and direct_tile() take at most
//   MOESAIC_UNROLL_QUADS             MOESAIC_UNROLL where that pays, for the quads of a group, or nothing
//   Numbers  16 outputs' numbers for 4 inputs each, as bytes that Sums::add() takes; load(), store()
//   Table    the 16 numbers of 4 bit codes
//   numbers_of_8_bits, numbers_of_4_bits   from 64 bytes of codes: one quad, two quads
//   Inputs   the codes of 4 inputs; load()
//   Sums     16 outputs' sums of products; fill(start), add(), scaled(j, scale, offset) for its Vector j
//   start_of(sum of a group's codes)       GroupScale::start
//   largest_bits, round_group              of a group of floats: largest magnitude's bits; codes and their sum
// Internal linkage, as each instruction set compiles it anew.
//
// A panel is 16 outputs, m rows of inputs are multiplied at once, G is the group size.
#pragma once

#include <stddef.h>
#include <string.h>

#include "compiler.h"
#include "packed_kernels.h"
#include "vector_math.h"

namespace {

constexpr int panel_vectors = panel_outputs / Vector::width;
constexpr int line_bytes = 64;
constexpr int pair_outputs = 2 * panel_outputs;  // of the two panels that are unpacked at once
// Their inputs that are: few enough for the first cache.
constexpr int64_t stretch_inputs = 512;
constexpr int64_t unpacked_bytes = pair_outputs * (stretch_inputs + stretch_inputs / 32 * int64_t(sizeof(float)));
// Bytes that are read ahead where weights are used straight from memory.
constexpr int64_t read_ahead = 8192;

// A Vector of the scales of a block, from number j on.
inline Vector scales_at(const uint8_t* block, int64_t j) {
  return Vector::load(reinterpret_cast<const BFloat16*>(block) + j);
}

template <class Number>
inline Number number_at(const uint8_t* from) {
  Number number;
  memcpy(&number, from, sizeof number);
  return number;
}

// The codes of `count` floats, zeros up to G, and their scale.
template <int G>
inline void round_to_record(const float* x, int64_t count, uint8_t* record) {
  float whole[G];
  if (count < G) {
    for (int64_t i = 0; i < G; ++i) whole[i] = i < count ? x[i] : 0.0f;
    x = whole;
  }
  uint32_t bits = largest_bits(x, G);  // bits of magnitudes are in the order of the magnitudes, NaN above all
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  GroupScale group{0, 0.0f, 0.0f, 0};
  if (largest < 1e-30f) {
    group.start = start_of(0);
    memset(record, 0, G);
  } else {
    // Without the last two bits of the scale the offset is exact, and so is all but the last rounding of Sums::scaled().
    group.scale = largest / 127.0f;
    memcpy(&bits, &group.scale, sizeof bits);
    bits &= ~3u;
    memcpy(&group.scale, &bits, sizeof bits);
    group.start = start_of(round_group(x, 1.0f / group.scale, G, reinterpret_cast<int8_t*>(record)));
    group.offset = -12582912.0f * group.scale;
  }
  memcpy(record + G, &group, sizeof group);
}

template <int G>
void round_row_of(const float* x, int64_t columns, uint8_t* record) {
  for (int64_t k = 0; k < columns; k += G) {
    round_to_record<G>(x + k, smaller<int64_t>(G, columns - k), record);
    record += G + sizeof(GroupScale);
  }
}

void round_row(const float* x, int64_t columns, int64_t group_size, uint8_t* record) {
  const auto run = group_size == 32 ? round_row_of<32> : round_row_of<64>;
  run(x, columns, record);
}

// A tile of results, `rows` times `panels` panels, in registers or near them.
template <int rows, int panels>
struct Tile {
  Vector at[rows][panels][panel_vectors];

  void zero() {
    each([](Vector& one, int64_t, int64_t) { one = Vector::fill(0.0f); });
  }
  void load(const float* from, int64_t stride) {
    each([&](Vector& one, int64_t i, int64_t j) { one = Vector::load(from + i * stride + j); });
  }
  void store(float* to, int64_t stride) {
    each([&](Vector& one, int64_t i, int64_t j) { one.store(to + i * stride + j); });
  }

 private:
  template <class Act>
  inline void each(Act act) {
    MOESAIC_UNROLL
    for (int i = 0; i < rows; ++i) {
      MOESAIC_UNROLL
      for (int p = 0; p < panels; ++p) {
        MOESAIC_UNROLL
        for (int j = 0; j < panel_vectors; ++j) act(at[i][p][j], i, p * panel_outputs + j * Vector::width);
      }
    }
  }
};

// results += sums * scales of the rows * scales of the weights.
template <int rows, int panels, int G>
inline void add_group(const Sums (&sums)[rows][panels], const Vector (&scales)[panels][panel_vectors],
                      const uint8_t* const (&inputs)[rows], int64_t at, Tile<rows, panels>& results) {
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    const uint8_t* const group = inputs[i] + at + G;
    const Vector scale = Vector::fill(number_at<float>(group + offsetof(GroupScale, scale)));
    const Vector offset = Vector::fill(number_at<float>(group + offsetof(GroupScale, offset)));
    MOESAIC_UNROLL
    for (int p = 0; p < panels; ++p) {
      MOESAIC_UNROLL
      for (int j = 0; j < panel_vectors; ++j) {
        results.at[i][p][j] = multiply_add(sums[i][p].scaled(j, scale, offset), scales[p][j], results.at[i][p][j]);
      }
    }
  }
}

template <int rows, int panels>
inline void add_quad(const uint8_t* const (&inputs)[rows], int64_t at, const Numbers (&numbers)[panels],
                     Sums (&sums)[rows][panels]) {
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    const Inputs four = Inputs::load(inputs[i] + at);
    MOESAIC_UNROLL
    for (int p = 0; p < panels; ++p) sums[i][p].add(numbers[p], four);
  }
}

template <int rows, int panels, int G>
inline void start_group(const uint8_t* const (&inputs)[rows], int64_t at, Sums (&sums)[rows][panels]) {
  MOESAIC_UNROLL
  for (int i = 0; i < rows; ++i) {
    const Sums start = Sums::fill(number_at<int32_t>(inputs[i] + at + G + offsetof(GroupScale, start)));
    MOESAIC_UNROLL
    for (int p = 0; p < panels; ++p) sums[i][p] = start;
  }
}

// out (rows, 16) = rows of inputs times one panel, unpacked on the way.
template <int G, int bits, int rows>
void direct_tile(const uint8_t* const* records, const uint8_t* block, int64_t groups, Table table, float* out,
                 int64_t stride) {
  const uint8_t* inputs[rows];
  for (int i = 0; i < rows; ++i) inputs[i] = records[i];
  Tile<rows, 1> results;
  results.zero();
  for (int64_t at = 0; groups > 0; --groups, at += G + sizeof(GroupScale), block += block_bytes(G, bits)) {
    for (int64_t b = 0; b < block_bytes(G, bits); b += line_bytes) MOESAIC_PREFETCH(block + read_ahead + b);
    Sums sums[rows][1];
    start_group<rows, 1, G>(inputs, at, sums);
    const uint8_t* const codes = block + scale_bytes;
    MOESAIC_UNROLL_QUADS
    for (int q = 0; q < G / 4; q += 8 / bits) {
      if constexpr (bits == 8) {
        const Numbers numbers[1] = {numbers_of_8_bits(codes + q * 64)};
        add_quad(inputs, at + 4 * q, numbers, sums);
      } else {
        Numbers first[1], second[1];
        numbers_of_4_bits(codes + q * 32, table, first[0], second[0]);
        add_quad(inputs, at + 4 * q, first, sums);
        add_quad(inputs, at + 4 * q + 4, second, sums);
      }
    }
    Vector scales[1][panel_vectors];
    for (int j = 0; j < panel_vectors; ++j) scales[0][j] = scales_at(block, j * Vector::width);
    add_group<rows, 1, G>(sums, scales, inputs, at, results);
  }
  results.store(out, stride);
}

template <int G, int bits, int most = direct_rows>
void direct_tile_of(int64_t rows, const uint8_t* const* records, const uint8_t* block, int64_t groups, Table table,
                    float* out, int64_t stride) {
  if constexpr (most > 0) {
    if (rows == most) {
      direct_tile<G, bits, most>(records, block, groups, table, out, stride);
    } else {
      direct_tile_of<G, bits, most - 1>(rows, records, block, groups, table, out, stride);
    }
  }
}

// Unpacked groups: the panels' scales as floats, then for each quad the panels' numbers.
constexpr int64_t unpacked_group(int panels, int G) {
  return panels * panel_outputs * (G + int64_t(sizeof(float)));
}

template <int G, int bits, int panels>
void unpack(const uint8_t* block, int64_t bytes_of_panel, int64_t groups, Table table, uint8_t* to) {
  for (; groups > 0; --groups, block += block_bytes(G, bits), to += unpacked_group(panels, G)) {
    MOESAIC_UNROLL
    for (int p = 0; p < panels; ++p) {
      const uint8_t* const from = block + p * bytes_of_panel;
      float* const scales = reinterpret_cast<float*>(to) + p * panel_outputs;
      for (int j = 0; j < panel_vectors; ++j) {
        scales_at(from, j * Vector::width).store(scales + j * Vector::width);
      }
      uint8_t* const quads = to + panels * panel_outputs * sizeof(float) + p * 64;
      for (int q = 0; q < G / 4; q += 8 / bits) {
        if constexpr (bits == 8) {
          numbers_of_8_bits(from + scale_bytes + q * 64).store(quads + q * panels * 64);
        } else {
          Numbers first, second;
          numbers_of_4_bits(from + scale_bytes + q * 32, table, first, second);
          first.store(quads + q * panels * 64);
          second.store(quads + (q + 1) * panels * 64);
        }
      }
    }
  }
}

// Packed weights that will be unpacked next, of two panels: brought closer a few lines at a time.
struct PackedAhead {
  const uint8_t* at;
  int64_t distance, lines, per_call;

  void some() {
    for (int64_t i = smaller(per_call, lines); i > 0; --i, --lines, at += line_bytes) {
      MOESAIC_PREFETCH(at);
      MOESAIC_PREFETCH(at + distance);
    }
  }
};

// out (rows, panels * 16) = or += rows of inputs times unpacked panels.
template <int G, int panels, int rows>
void unpacked_tile(const uint8_t* const* records, int64_t at, const uint8_t* unpacked, int64_t groups, float* out,
                   int64_t stride, bool accumulate, PackedAhead& ahead) {
  const uint8_t* inputs[rows];
  for (int i = 0; i < rows; ++i) inputs[i] = records[i];
  Tile<rows, panels> results;
  if (accumulate) {
    results.load(out, stride);
  } else {
    results.zero();
  }
  for (; groups > 0; --groups, at += G + sizeof(GroupScale), unpacked += unpacked_group(panels, G)) {
    ahead.some();
    Sums sums[rows][panels];
    start_group<rows, panels, G>(inputs, at, sums);
    const uint8_t* const quads = unpacked + panels * panel_outputs * sizeof(float);
    MOESAIC_UNROLL_QUADS
    for (int q = 0; q < G / 4; ++q) {
      Numbers numbers[panels];
      for (int p = 0; p < panels; ++p) numbers[p] = Numbers::load(quads + (q * panels + p) * 64);
      add_quad(inputs, at + 4 * q, numbers, sums);
    }
    Vector scales[panels][panel_vectors];
    for (int p = 0; p < panels; ++p) {
      for (int j = 0; j < panel_vectors; ++j) {
        scales[p][j] = Vector::load(reinterpret_cast<const float*>(unpacked) + p * panel_outputs + j * Vector::width);
      }
    }
    add_group<rows, panels, G>(sums, scales, inputs, at, results);
  }
  results.store(out, stride);
}

template <int G, int panels, int most = tile_rows>
void unpacked_tile_of(int64_t rows, const uint8_t* const* records, int64_t at, const uint8_t* unpacked, int64_t groups,
                      float* out, int64_t stride, bool accumulate, PackedAhead& ahead) {
  if constexpr (most > 0) {
    if (rows == most) {
      unpacked_tile<G, panels, most>(records, at, unpacked, groups, out, stride, accumulate, ahead);
    } else {
      unpacked_tile_of<G, panels, most - 1>(rows, records, at, unpacked, groups, out, stride, accumulate, ahead);
    }
  }
}

// out (m, panels * 16) = m rows of inputs times panels that stand one after another from `block` on.
template <int G, int bits, int panels>
void many_rows(const moesaic_packed& w, const uint8_t* block, const uint8_t* const* records, int64_t m, float* out,
               int64_t stride, uint8_t* unpacked) {
  const Table table(w.table);
  const int64_t groups = divide_up(w.columns, G), whole = panel_bytes(w);
  const Parts tiles(m, tile_rows), stretches(groups, stretch_inputs / G);
  for (int64_t s = 0; s < stretches.number; ++s) {
    const int64_t first = stretches.start(s), count = stretches.size(s);
    unpack<G, bits, panels>(block + first * block_bytes(G, bits), whole, count, table, unpacked);
    const bool last = s + 1 == stretches.number;
    const int64_t next = last ? 0 : stretches.start(s + 1);
    const int64_t lines = stretches.size(last ? 0 : s + 1) * block_bytes(G, bits) / line_bytes + 1;
    PackedAhead ahead{block + next * block_bytes(G, bits) + (last ? panels * whole : 0), whole, lines,
                      divide_up(lines, tiles.number * count)};
    for (int64_t t = 0; t < tiles.number; ++t) {
      unpacked_tile_of<G, panels>(tiles.size(t), records + tiles.start(t), first * (G + int64_t(sizeof(GroupScale))),
                                  unpacked, count, out + tiles.start(t) * stride, stride, s > 0, ahead);
    }
  }
}

template <int G, int bits>
void multiply_panels(const moesaic_packed& w, const uint8_t* block, int64_t panels, const uint8_t* const* records,
                     int64_t m, float* out, int64_t stride, uint8_t* unpacked) {
  const int64_t groups = divide_up(w.columns, G), whole = panel_bytes(w);
  if (m <= direct_rows) {
    const Table table(w.table);
    for (int64_t p = 0; p < panels; ++p) {
      direct_tile_of<G, bits>(m, records, block + p * whole, groups, table, out + p * panel_outputs, stride);
    }
    return;
  }
  for (; panels >= 2; panels -= 2, block += 2 * whole, out += pair_outputs) {
    many_rows<G, bits, 2>(w, block, records, m, out, stride, unpacked);
  }
  if (panels) many_rows<G, bits, 1>(w, block, records, m, out, stride, unpacked);
}

// out (m, count * 16) = m rows of inputs times panels first .. first + count - 1 of matrix number `matrix`.
void multiply(const moesaic_packed& w, int64_t matrix, int64_t first, int64_t count, const uint8_t* const* records,
              int64_t m, float* out, int64_t stride, uint8_t* unpacked) {
  const auto run = w.group_size == 32 ? (w.bits == 4 ? multiply_panels<32, 4> : multiply_panels<32, 8>)
                                      : (w.bits == 4 ? multiply_panels<64, 4> : multiply_panels<64, 8>);
  run(w, w.data + matrix * matrix_bytes(w) + first * panel_bytes(w), count, records, m, out, stride, unpacked);
}

}  // namespace
