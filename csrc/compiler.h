// What C++ has no words for.
#pragma once

#if defined(_MSC_VER)
#include <intrin.h>
#include <xmmintrin.h>
#define MOESAIC_PREFETCH(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1)
#define MOESAIC_PREFETCH_FOR_WRITE(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)
#define MOESAIC_UNROLL
#define MOESAIC_NOT_INLINE __declspec(noinline)
#else
#define MOESAIC_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define MOESAIC_PREFETCH_FOR_WRITE(address) __builtin_prefetch(address, 1, 3)
#define MOESAIC_UNROLL _Pragma("GCC unroll 16")
#define MOESAIC_NOT_INLINE __attribute__((noinline))
#endif

// Where the lowest bit is set; there is one.
static inline int lowest_bit(unsigned bits) {
#if defined(_MSC_VER)
  unsigned long place;
  _BitScanForward(&place, bits);
  return int(place);
#else
  return __builtin_ctz(bits);
#endif
}
