// Sixteen floats in a register of AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "bfloat16.h"
#include "compiler.h"

namespace {

struct Vector {
  static constexpr int width = 16;
  __m512 v;

  static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vector load_some(const float* from, int count) { return {_mm512_maskz_loadu_ps(some(count), from)}; }
  static Vector load(const BFloat16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static Vector load_some(const BFloat16* from, int count) { return widen(_mm256_maskz_loadu_epi16(some(count), from)); }
  static Vector fill(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store_some(float* to, int count) const { _mm512_mask_storeu_ps(to, some(count), v); }
  void store(BFloat16* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round()); }
  void store_some(BFloat16* to, int count) const { _mm256_mask_storeu_epi16(to, some(count), round()); }
  float sum() const { return _mm_cvtss_f32(sums_of_four(*this, *this, *this, *this)); }
  float largest() const { return _mm512_reduce_max_ps(v); }
  // The first of the numbers that equals `value`; `width` where none does.
  int find(float value) const {
    return lowest_bit(_mm512_cmp_ps_mask(v, _mm512_set1_ps(value), _CMP_EQ_OQ) | 1u << width);
  }
  static void store_sums(const Vector (&of)[4], float* to) {
    _mm_storeu_ps(to, sums_of_four(of[0], of[1], of[2], of[3]));
  }

 private:
  static __m128 sums_of_four(Vector a, Vector b, Vector c, Vector d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 halves =
        _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, lanes, 0), _mm512_maskz_extractf32x8_ps(0xff, lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  }
  static Vector widen(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  __m256i round() const {
    const __m512i bits = _mm512_castps_si512(v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i up = _mm512_add_epi32(_mm512_and_si512(upper, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(nearest, is_nan, upper, _mm512_set1_epi32(0x40)));
  }
  static __mmask16 some(int count) { return __mmask16((1u << count) - 1); }
};

inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// NaN in `a` stays NaN.
inline Vector at_most(Vector a, Vector limit) { return {_mm512_min_ps(limit.v, a.v)}; }
inline Vector at_least(Vector a, Vector limit) { return {_mm512_max_ps(limit.v, a.v)}; }
// `value` where a <= b, else 0.
inline Vector where_at_most(Vector a, Vector b, Vector value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGT_UQ), value.v)};
}
inline Vector round_to_integer(Vector a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
// a times 2 to the power of the whole number n in -126 .. 127.
inline Vector times_power_of_two(Vector a, Vector n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// 16 rows of 16 times 32 bits, `stride` bytes apart: put(p, column p) for each.
template <class Put>
inline void for_each_column(const char* from, int64_t stride, Put put) {
  for (int quad = 0; quad < 4; ++quad) {
    // Lane l of rows[r]: elements 4 quad .. 4 quad + 3 of row 4 l + r.
    __m512 rows[4];
    for (int r = 0; r < 4; ++r) {
      const char* row = from + r * stride + 16 * quad;
      const auto lane = [&](int l) { return _mm_loadu_ps(reinterpret_cast<const float*>(row + 4 * l * stride)); };
      __m512 lanes = _mm512_castps128_ps512(lane(0));
      lanes = _mm512_insertf32x4(lanes, lane(1), 1);
      lanes = _mm512_insertf32x4(lanes, lane(2), 2);
      rows[r] = _mm512_insertf32x4(lanes, lane(3), 3);
    }
    const __m512 low01 = _mm512_unpacklo_ps(rows[0], rows[1]), high01 = _mm512_unpackhi_ps(rows[0], rows[1]);
    const __m512 low23 = _mm512_unpacklo_ps(rows[2], rows[3]), high23 = _mm512_unpackhi_ps(rows[2], rows[3]);
    put(4 * quad, _mm512_shuffle_ps(low01, low23, 0x44));
    put(4 * quad + 1, _mm512_shuffle_ps(low01, low23, 0xee));
    put(4 * quad + 2, _mm512_shuffle_ps(high01, high23, 0x44));
    put(4 * quad + 3, _mm512_shuffle_ps(high01, high23, 0xee));
  }
}

// 16 rows of 64 bytes, `stride` numbers apart, into `to`: row p, `to_stride` further each, holds element p of every row.
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t to_stride) {
  for_each_column(reinterpret_cast<const char*>(from), stride * int64_t(sizeof *from),
                  [&](int p, __m512 column) { _mm512_storeu_ps(to + p * to_stride, column); });
}

inline void transpose_block(const BFloat16* from, int64_t stride, float* to, int64_t to_stride) {
  for_each_column(reinterpret_cast<const char*>(from), stride * int64_t(sizeof *from), [&](int pair, __m512 column) {
    const __m512i bits = _mm512_castps_si512(column);
    float* const out = to + 2 * pair * to_stride;
    _mm512_storeu_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    _mm512_storeu_ps(out + to_stride, _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536))));
  });
}

}  // namespace
