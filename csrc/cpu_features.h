// What this CPU can run, asked at run time so that one build serves every machine of its architecture.
//
// A feature counts only when the CPU has it *and* the operating system saves its registers. Kernels dispatch on
// `moesaic_instruction_set()`; each level includes all that the levels below it on the same architecture have.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const char* name;  // spelled as in Linux's /proc/cpuinfo
  int present;       // 0 or 1
} moesaic_cpu_feature;

// The features that kernels may ask about, ended by an entry whose name is NULL. The array lives as long as the process.
const moesaic_cpu_feature* moesaic_cpu_features(void);

// The best level that this machine runs:
//   "avx512_bf16"  avx512_vnni and bf16 dot products
//   "avx512_vnni"  avx512f and int8 dot products
//   "avx512f"      AVX-512 with F, BW, DQ and VL, on top of avx2
//   "avx2"         AVX2 with FMA and F16C
//   "neon"         64-bit ARM
//   "portable"     none of these: plain C++
const char* moesaic_instruction_set(void);

// Whether kernels of this level run here, "portable" or one of x86-64: 1 or 0.
int moesaic_cpu_reaches(const char* level);

#ifdef __cplusplus
}
#endif
