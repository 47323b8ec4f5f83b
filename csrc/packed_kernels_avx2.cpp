#include "packed_kernels.h"

#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
#include <string.h>

#include "vector_avx2.h"

namespace {

constexpr int tile_rows = 3;  // with one panel 6 sums and 4 of numbers and inputs in 16 registers
constexpr int direct_rows = 4;

struct Numbers {
  __m256i v[2];  // 8 outputs each
  static Numbers load(const uint8_t* from) {
    const auto* const halves = reinterpret_cast<const __m256i*>(from);
    return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
  }
  void store(uint8_t* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, v[1]);
  }
};

struct Table {
  __m256i v;
  explicit Table(const int8_t* table) : v(_mm256_setzero_si256()) {
    if (table) v = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  }
};

inline Numbers numbers_of_8_bits(const uint8_t* codes) {
  Numbers numbers = Numbers::load(codes);
  for (__m256i& half : numbers.v) half = _mm256_xor_si256(half, _mm256_set1_epi8(-128));
  return numbers;
}

inline void numbers_of_4_bits(const uint8_t* codes, Table table, Numbers& first, Numbers& second) {
  const __m256i low_half = _mm256_set1_epi8(0x0f);
  const Numbers both = Numbers::load(codes);
  for (int h = 0; h < 2; ++h) {
    first.v[h] = _mm256_shuffle_epi8(table.v, _mm256_and_si256(both.v[h], low_half));
    second.v[h] = _mm256_shuffle_epi8(table.v, _mm256_and_si256(_mm256_srli_epi16(both.v[h], 4), low_half));
  }
}

struct Inputs {
  __m256i v;
  static Inputs load(const uint8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return {_mm256_set1_epi32(four)};
  }
};

struct Sums {
  __m256i v[2];
  static Sums fill(int32_t start) { return {{_mm256_set1_epi32(start), _mm256_set1_epi32(start)}}; }
  // The inputs take the numbers' signs: two products of magnitudes 128 and 127 fit the 16 bits in which they are added.
  void add(Numbers numbers, Inputs inputs) {
    for (int h = 0; h < 2; ++h) {
      const __m256i magnitudes = _mm256_abs_epi8(numbers.v[h]);
      const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(inputs.v, numbers.v[h]));
      v[h] = _mm256_add_epi32(v[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  Vector scaled(int j, Vector scale, Vector) const { return {_mm256_mul_ps(_mm256_cvtepi32_ps(v[j]), scale.v)}; }
};

inline int32_t start_of(int32_t) { return 0; }

inline uint32_t largest_bits(const float* x, int count) {
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return uint32_t(_mm_cvtsi128_si32(half));
}

// The sum is not needed here.
inline int32_t round_group(const float* x, float inverse, int count, int8_t* codes) {
  const auto whole = [&](const float* from) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), _mm256_set1_ps(inverse)));
  };
  for (int i = 0; i < count; i += 32) {
    const __m256i low = _mm256_packs_epi32(whole(x + i), whole(x + i + 8));
    const __m256i high = _mm256_packs_epi32(whole(x + i + 16), whole(x + i + 24));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing leaves the halves interleaved
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
  }
  return 0;
}

}  // namespace
#define MOESAIC_UNROLL_QUADS MOESAIC_UNROLL
#include "packed_math.h"

const PackedKernels* moesaic_packed_kernels_avx2() { return &packed_kernels; }
#else
const PackedKernels* moesaic_packed_kernels_avx2() { return nullptr; }
#endif
