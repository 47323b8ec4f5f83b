// Sixteen floats in a register of AVX-512.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vector {
  static constexpr int width = 16;
  __m512 v;

  static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vector load_some(const float* from, int count) { return {_mm512_maskz_loadu_ps(some(count), from)}; }
  static Vector fill(float value) { return {_mm512_set1_ps(value)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store_some(float* to, int count) const { _mm512_mask_storeu_ps(to, some(count), v); }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
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

// 16 rows of 16 floats, `stride` apart, into `to`: row p, 32 floats further each, holds element p of every row.
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t to_stride) {
  for (int quad = 0; quad < 4; ++quad) {
    // Lane l of rows[r]: elements 4 quad .. 4 quad + 3 of row 4 l + r.
    __m512 rows[4];
    for (int r = 0; r < 4; ++r) {
      const float* row = from + r * stride + 4 * quad;
      __m512 lanes = _mm512_castps128_ps512(_mm_loadu_ps(row));
      lanes = _mm512_insertf32x4(lanes, _mm_loadu_ps(row + 4 * stride), 1);
      lanes = _mm512_insertf32x4(lanes, _mm_loadu_ps(row + 8 * stride), 2);
      rows[r] = _mm512_insertf32x4(lanes, _mm_loadu_ps(row + 12 * stride), 3);
    }
    const __m512 low01 = _mm512_unpacklo_ps(rows[0], rows[1]), high01 = _mm512_unpackhi_ps(rows[0], rows[1]);
    const __m512 low23 = _mm512_unpacklo_ps(rows[2], rows[3]), high23 = _mm512_unpackhi_ps(rows[2], rows[3]);
    float* const out = to + 4 * quad * to_stride;
    _mm512_storeu_ps(out, _mm512_shuffle_ps(low01, low23, 0x44));
    _mm512_storeu_ps(out + to_stride, _mm512_shuffle_ps(low01, low23, 0xee));
    _mm512_storeu_ps(out + 2 * to_stride, _mm512_shuffle_ps(high01, high23, 0x44));
    _mm512_storeu_ps(out + 3 * to_stride, _mm512_shuffle_ps(high01, high23, 0xee));
  }
}

}  // namespace
