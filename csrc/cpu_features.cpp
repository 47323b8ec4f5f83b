#include "cpu_features.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#if defined(__x86_64__) || defined(_M_X64)
#define MOESAIC_X86_64 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace {

struct Features {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16, neon;
};

#if defined(MOESAIC_X86_64)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
#if defined(_MSC_VER)
  int words[4];
  __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
  return {uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), uint32_t(words[3])};
#else
  Registers r{};
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
#endif
}

// Extended control register 0: which register files the operating system saves on a context switch.
uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
#endif
}

bool bit(uint64_t word, int position) { return (word >> position) & 1; }

Features detect() {
  Features f{};
  const uint32_t max_leaf = cpuid(0, 0).eax;
  const Registers leaf1 = cpuid(1, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (max_leaf < 7 || !osxsave) return f;

  constexpr uint64_t ymm_state = 0x06;  // XMM, upper halves of YMM
  constexpr uint64_t zmm_state = 0xe6;  // those, mask registers, upper halves of ZMM0-15, ZMM16-31
  const uint64_t saved = xcr0();
  if ((saved & ymm_state) != ymm_state) return f;
  const Registers leaf7 = cpuid(7, 0);
  f.fma = bit(leaf1.ecx, 12);
  f.f16c = bit(leaf1.ecx, 29);
  f.avx2 = bit(leaf7.ebx, 5);

  if ((saved & zmm_state) != zmm_state) return f;
  f.avx512f = bit(leaf7.ebx, 16);
  f.avx512dq = bit(leaf7.ebx, 17);
  f.avx512bw = bit(leaf7.ebx, 30);
  f.avx512vl = bit(leaf7.ebx, 31);
  f.avx512_vnni = bit(leaf7.ecx, 11);
  f.avx512_bf16 = leaf7.eax >= 1 && bit(cpuid(7, 1).eax, 5);
  return f;
}

#else

Features detect() {
  Features f{};
#if defined(__aarch64__) || defined(_M_ARM64)
  f.neon = true;  // part of the base architecture
#endif
  return f;
}

#endif

const Features& features() {
  static const Features detected = detect();
  return detected;
}

}  // namespace

extern "C" const moesaic_cpu_feature* moesaic_cpu_features(void) {
  const Features& f = features();
  static const moesaic_cpu_feature table[] = {
      {"avx2", f.avx2},
      {"fma", f.fma},
      {"f16c", f.f16c},
      {"avx512f", f.avx512f},
      {"avx512bw", f.avx512bw},
      {"avx512dq", f.avx512dq},
      {"avx512vl", f.avx512vl},
      {"avx512_vnni", f.avx512_vnni},
      {"avx512_bf16", f.avx512_bf16},
      {"neon", f.neon},
      {nullptr, 0},
  };
  return table;
}

extern "C" const char* moesaic_instruction_set(void) {
  const Features& f = features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512f = avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
  const bool avx512_vnni = avx512f && f.avx512_vnni;
  if (avx512_vnni && f.avx512_bf16) return "avx512_bf16";
  if (avx512_vnni) return "avx512_vnni";
  if (avx512f) return "avx512f";
  if (avx2) return "avx2";
  if (f.neon) return "neon";
  return "portable";
}

extern "C" int moesaic_cpu_reaches(const char* level) {
  if (!std::strcmp(level, "portable")) return 1;
  static const char* const levels[] = {"avx512_bf16", "avx512_vnni", "avx512f", "avx2"};
  const auto place = [&](const char* name) {
    return std::find_if(std::begin(levels), std::end(levels), [&](const char* one) { return !std::strcmp(one, name); });
  };
  const auto* best = place(moesaic_instruction_set());
  return best != std::end(levels) && best <= place(level);
}
