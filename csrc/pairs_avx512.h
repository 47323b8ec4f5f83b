// Sixteen pairs of bfloat16 in a register of AVX-512.
#pragma once

#include "vector_avx512.h"

namespace {

struct Pairs {
  __m512i v;
};

inline Pairs load_factors(const Pair* from) { return {_mm512_loadu_si512(from)}; }
inline Pairs fill_factors(Pair pair) {
  int32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return {_mm512_set1_epi32(bits)};
}

#if defined(__AVX512BF16__)
inline Vector multiply_add(Pairs a, Pairs b, Vector c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
// Takes longer than widening the factors once for many products.
inline Vector multiply_add(Pairs a, Pairs b, Vector c) {
  const auto first = [](Pairs of) { return _mm512_castsi512_ps(_mm512_slli_epi32(of.v, 16)); };
  const auto second = [](Pairs of) { return _mm512_castsi512_ps(_mm512_and_si512(of.v, _mm512_set1_epi32(-65536))); };
  return {_mm512_fmadd_ps(first(a), first(b), _mm512_fmadd_ps(second(a), second(b), c.v))};
}
#endif

// Pair j: number j of `first` and of `second`.
inline void interleave_vector(const BFloat16* first, const BFloat16* second, Pair* to) {
  const auto words = [](const BFloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  _mm512_storeu_si512(to, _mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16)));
}

// 16 rows of 64 bytes, `stride` numbers apart, into `to`: row p, `to_stride` further each, holds pair p of every row.
inline void transpose_block(const BFloat16* from, int64_t stride, Pair* to, int64_t to_stride) {
  for_each_column(reinterpret_cast<const char*>(from), stride * int64_t(sizeof *from),
                  [&](int p, __m512 column) { _mm512_storeu_ps(to + p * to_stride, column); });
}

}  // namespace
