// Eight floats in a register of AVX2 with FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vector {
  static constexpr int width = 8;
  __m256 v;

  static Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vector load_some(const float* from, int count) { return {_mm256_maskload_ps(from, some(count))}; }
  static Vector fill(float value) { return {_mm256_set1_ps(value)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store_some(float* to, int count) const { _mm256_maskstore_ps(to, some(count), v); }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

 private:
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

// 8 rows of 8 floats, `stride` apart, into `to`: row p, `to_stride` further each, holds element p of every row.
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t to_stride) {
  for (int quad = 0; quad < 2; ++quad) {
    // Half h of rows[r]: elements 4 quad .. 4 quad + 3 of row 4 h + r.
    __m256 rows[4];
    for (int r = 0; r < 4; ++r) {
      const float* row = from + r * stride + 4 * quad;
      rows[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * stride), 1);
    }
    const __m256 low01 = _mm256_unpacklo_ps(rows[0], rows[1]), high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 low23 = _mm256_unpacklo_ps(rows[2], rows[3]), high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
    float* const out = to + 4 * quad * to_stride;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(low01, low23, 0x44));
    _mm256_storeu_ps(out + to_stride, _mm256_shuffle_ps(low01, low23, 0xee));
    _mm256_storeu_ps(out + 2 * to_stride, _mm256_shuffle_ps(high01, high23, 0x44));
    _mm256_storeu_ps(out + 3 * to_stride, _mm256_shuffle_ps(high01, high23, 0xee));
  }
}

}  // namespace
