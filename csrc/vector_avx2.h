// Eight floats in a register of AVX2 with FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "bfloat16.h"
#include "compiler.h"

namespace {

struct Vector {
  static constexpr int width = 8;
  __m256 v;

  static Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vector load_some(const float* from, int count) { return {_mm256_maskload_ps(from, some(count))}; }
  static Vector load(const BFloat16* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  static Vector load_some(const BFloat16* from, int count) {
    BFloat16 whole[width] = {};
    memcpy(whole, from, size_t(count) * sizeof *from);
    return load(whole);
  }
  static Vector fill(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store_some(float* to, int count) const { _mm256_maskstore_ps(to, some(count), v); }
  void store(BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
    const __m256i up = _mm256_add_epi32(_mm256_and_si256(upper, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(nearest, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), is_nan);
    const __m256i packed = _mm256_packus_epi32(chosen, chosen);  // within each half
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
  void store_some(BFloat16* to, int count) const {
    BFloat16 whole[width];
    store(whole);
    memcpy(to, whole, size_t(count) * sizeof *to);
  }
  float sum() const { return _mm_cvtss_f32(sums_of_four(*this, *this, *this, *this)); }
  float largest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  // The first of the numbers that equals `value`; `width` where none does.
  int find(float value) const {
    return lowest_bit(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(value), _CMP_EQ_OQ))) | 1u << width);
  }
  static void store_sums(const Vector (&of)[4], float* to) {
    _mm_storeu_ps(to, sums_of_four(of[0], of[1], of[2], of[3]));
  }

 private:
  static __m128 sums_of_four(Vector a, Vector b, Vector c, Vector d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    const __m256 lanes = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  }
  static __m256i some(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// NaN in `a` stays NaN.
inline Vector at_most(Vector a, Vector limit) { return {_mm256_min_ps(limit.v, a.v)}; }
inline Vector at_least(Vector a, Vector limit) { return {_mm256_max_ps(limit.v, a.v)}; }
// `value` where a <= b, else 0.
inline Vector where_at_most(Vector a, Vector b, Vector value) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NGT_UQ), value.v)};
}
inline Vector round_to_integer(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// a times 2 to the power of the whole number n in -126 .. 127.
inline Vector times_power_of_two(Vector a, Vector n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

// 8 rows of 8 times 32 bits, `stride` bytes apart: put(p, column p) for each.
template <class Put>
inline void for_each_column(const char* from, int64_t stride, Put put) {
  for (int quad = 0; quad < 2; ++quad) {
    // Half h of rows[r]: elements 4 quad .. 4 quad + 3 of row 4 h + r.
    __m256 rows[4];
    for (int r = 0; r < 4; ++r) {
      const char* row = from + r * stride + 16 * quad;
      const auto half = [&](int h) { return _mm_loadu_ps(reinterpret_cast<const float*>(row + 4 * h * stride)); };
      rows[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(half(0)), half(1), 1);
    }
    const __m256 low01 = _mm256_unpacklo_ps(rows[0], rows[1]), high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 low23 = _mm256_unpacklo_ps(rows[2], rows[3]), high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
    put(4 * quad, _mm256_shuffle_ps(low01, low23, 0x44));
    put(4 * quad + 1, _mm256_shuffle_ps(low01, low23, 0xee));
    put(4 * quad + 2, _mm256_shuffle_ps(high01, high23, 0x44));
    put(4 * quad + 3, _mm256_shuffle_ps(high01, high23, 0xee));
  }
}

// 8 rows of 32 bytes, `stride` numbers apart, into `to`: row p, `to_stride` further each, holds element p of every row.
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t to_stride) {
  for_each_column(reinterpret_cast<const char*>(from), stride * int64_t(sizeof *from),
                  [&](int p, __m256 column) { _mm256_storeu_ps(to + p * to_stride, column); });
}

inline void transpose_block(const BFloat16* from, int64_t stride, float* to, int64_t to_stride) {
  for_each_column(reinterpret_cast<const char*>(from), stride * int64_t(sizeof *from), [&](int pair, __m256 column) {
    const __m256i bits = _mm256_castps_si256(column);
    float* const out = to + 2 * pair * to_stride;
    _mm256_storeu_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    _mm256_storeu_ps(out + to_stride, _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536))));
  });
}

}  // namespace
