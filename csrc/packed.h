// Products with packed weights: the C-level interface. Pointers and sizes only; arrays are row-major and contiguous, and
// belong to the caller. T tokens, N assignments, E experts, D hidden size, F expert intermediate size, as in experts.h.
//
// A packed matrix of `rows` outputs and `columns` inputs is cut into panels of 16 outputs and groups of group_size
// inputs; missing outputs and inputs are zeros. Its blocks, in the order [panel][group], stand one after another:
//   16 scales, bfloat16, of the panel's outputs
//   8 bits: for each 4 inputs ("quad") 64 bytes; byte 4 o + i is the code of output o, input i; number = code - 128
//   4 bits: for each 2 quads 64 bytes like that, the first quad's codes in the low halves of the bytes, the second's in
//           the high ones; number = table[code]
// A weight is its number times its scale.
//
// Inputs are rounded on the way: each row of x, and of the hidden units between the two products, in groups of group_size
// numbers, to whole multiples -127 .. 127 of the group's largest magnitude / 127. Groups whose numbers are all below 1e-30
// count as zeros. Sums within a group are exact, sums over groups are float32. NaN and infinities give results
// that are not finite, and numbers beyond 1e32 may. Results do not depend on the number of threads.
#pragma once

#include "experts.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t rows, columns;
  int32_t group_size, bits;  // 32 or 64; 8 or 4
  const int8_t* table;       // 16 numbers; NULL for 8 bits
  const uint8_t* data;       // of the first matrix, where several stand one after another
} moesaic_packed;

// Bytes of one matrix.
int64_t moesaic_packed_bytes(int64_t rows, int64_t columns, int64_t group_size, int64_t bits);

typedef struct {
  int64_t num_tokens, num_rows, num_experts, hidden_size, intermediate_size;
  int32_t activation;  // a moesaic_activation
  float limit, alpha;  // of MOESAIC_CLAMPED_SWIGLU
  moesaic_plan plan;
  const float* x;             // (T, D)
  const float* row_weights;   // (N), in the order of the assignments
  moesaic_packed gate_up;     // E matrices (2F, D), gate first; or as many as there are slots
  moesaic_packed down;        // as many (D, F)
  const float* gate_up_bias;  // (E, 2F) or NULL
  const float* down_bias;     // (E, D) or NULL
  const int32_t* slots;       // (E) where each expert's matrices stand in gate_up and down; NULL: at its number
} moesaic_packed_experts;

// y (T, D): each token's experts, times the weights of its rows, summed in the order of the experts.
//
// instruction_set is a name of moesaic_packed_kernels(), or NULL or "" for the best. Returns 0, -1 when this machine or
// build lacks the instruction set, -2 when memory runs out, -3 when a matrix has other bits, groups or sizes than these.
int moesaic_packed_experts_forward(const moesaic_packed_experts* experts, int threads, const char* instruction_set,
                                   float* y);

// Half of it, for experts that come in several parts: what the expert of each assignment gives, before its weight, in rows
// (N, D). Assignments whose expert is not there (slots[e] < 0) leave theirs as it is. Returns as above.
int moesaic_packed_experts_rows(const moesaic_packed_experts* experts, int threads, const char* instruction_set,
                                float* rows);

// The other half: y (T, D), the rows (N, D) times their weights, summed in the order of the experts; bit for bit what
// moesaic_packed_experts_forward gives. Returns 0, or -1 as above.
int moesaic_sum_rows(const moesaic_plan* plan, int64_t num_tokens, int64_t num_rows, int64_t hidden_size,
                     const float* rows, const float* row_weights, int threads, const char* instruction_set, float* y);

typedef struct {
  moesaic_packed weight;
  const float* bias;  // (rows) or NULL
} moesaic_packed_layer;

// ys[i] (T, rows) = x (T, columns) times the transposed matrix of layer i, plus its bias: of several layers with the same
// inputs, whose tasks the threads share. Returns as above.
int moesaic_packed_linear(const moesaic_packed_layer* layers, int64_t num_layers, const float* x, int64_t num_tokens,
                          int threads, const char* instruction_set, float* const* ys);

// The instruction sets that packed kernels are built for and this machine runs, the best first, ended by NULL.
const char* const* moesaic_packed_kernels(void);

#ifdef __cplusplus
}
#endif
