#include "packed_kernels.h"

#if (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)) || \
    (defined(_MSC_VER) && defined(__AVX512F__))
#include <string.h>

#include "vector_avx512.h"

namespace {

// Of 32 registers two panels of 8 rows take 16 for sums, 2 for numbers, 1 for inputs, and the rest for some results.
constexpr int tile_rows = 8;
constexpr int direct_rows = 8;

// Numbers plus 128, as the dot product's unsigned side.
struct Numbers {
  __m512i v;
  static Numbers load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
  void store(uint8_t* to) const { _mm512_storeu_si512(to, v); }
};

struct Table {
  __m512i v;
  explicit Table(const int8_t* table) : v(_mm512_setzero_si512()) {
    if (!table) return;
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    v = _mm512_broadcast_i32x4(_mm_xor_si128(numbers, _mm_set1_epi8(-128)));
  }
};

inline Numbers numbers_of_8_bits(const uint8_t* codes) { return Numbers::load(codes); }

inline void numbers_of_4_bits(const uint8_t* codes, Table table, Numbers& first, Numbers& second) {
  const __m512i low_half = _mm512_set1_epi8(0x0f), both = _mm512_loadu_si512(codes);
  first.v = _mm512_shuffle_epi8(table.v, _mm512_and_si512(both, low_half));
  second.v = _mm512_shuffle_epi8(table.v, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half));
}

struct Inputs {
  __m512i v;
  static Inputs load(const uint8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return {_mm512_set1_epi32(four)};
  }
};

// The bits of 1.5 * 2^23: plus a whole number below 2^22, read as a float's bits, they are 1.5 * 2^23 plus that number.
constexpr int32_t float_of_zero = 0x4b400000;

struct Sums {
  __m512i v;
  static Sums fill(int32_t start) { return {_mm512_set1_epi32(start)}; }
  void add(Numbers numbers, Inputs inputs) { v = _mm512_dpbusd_epi32(v, numbers.v, inputs.v); }
  Vector scaled(int, Vector scale, Vector offset) const {
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(v), scale.v, offset.v)};
  }
};

inline int32_t start_of(int32_t sum) { return float_of_zero - 128 * sum; }

inline uint32_t largest_bits(const float* x, int count) {
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, bits);
  }
  return _mm512_reduce_max_epu32(largest);
}

inline int32_t round_group(const float* x, float inverse, int count, int8_t* codes) {
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < count; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
    const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
    sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(bytes));
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace
#define MOESAIC_UNROLL_QUADS MOESAIC_UNROLL
#include "packed_math.h"

const PackedKernels* moesaic_packed_kernels_avx512_vnni() { return &packed_kernels; }
#else
const PackedKernels* moesaic_packed_kernels_avx512_vnni() { return nullptr; }
#endif
