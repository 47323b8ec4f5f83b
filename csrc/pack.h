// Packing of weights: from float32 or bfloat16 into the layout of packed.h. Pointers and sizes only.
#pragma once

#include "packed.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t rows, columns;
  int32_t group_size, bits;  // 32 or 64; 8 or 4
  int32_t element;           // a moesaic_element
  const void* weight;        // (rows, columns)
  // For 4 bits: the 16 numbers of the codes, ascending; and what the largest number of a group is tried as.
  const int8_t* table;
  const float* ends;
  int64_t num_ends;
} moesaic_packing;

// Writes one matrix, moesaic_packed_bytes() of it. A group's scale, bfloat16, is with 8 bits its largest magnitude / 127,
// rounded up; with 4 bits, of those that bring its largest number to one of the ends and are then fitted to the codes, the
// one of the least squared error. Inputs that only fill up a group have no say in it.
//
// Returns 0, -1 when this machine or build lacks the instruction set, -3 for other bits or groups than these, -4 when a
// number is not finite.
int moesaic_pack(const moesaic_packing* packing, int threads, const char* instruction_set, uint8_t* data);

#ifdef __cplusplus
}
#endif
