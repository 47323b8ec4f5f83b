// Experts on a CPU, float32 or bfloat16: the C-level interface of the kernels. Pointers and sizes only; every array is
// row-major and contiguous, and belongs to the caller.
//
// Arrays of `void` are of the layer's element type. bfloat16 is widened to float32, in which all products and sums are
// computed, and every output and gradient is rounded once, to the nearest; so the sums of a weight's gradient are complete
// before they are rounded. The pre-activations that the backward pass reads are rounded as well: half the memory, and an
// error as small as that of rounding the gradients themselves. Where the CPU multiplies pairs of bfloat16 itself, with sums
// in float32, the hidden units and the gradients of the pre-activations are rounded before they are multiplied.
//
// T tokens, N assignments (one row of expert work each), E experts, D hidden size, F expert intermediate size.
//
// Results do not depend on the number of threads: every number is one chain of operations whose order follows from the
// sizes and the routing alone. They differ in the last bits between instruction sets.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum moesaic_activation {
  MOESAIC_SWIGLU = 0,          // silu(gate) * up
  MOESAIC_CLAMPED_SWIGLU = 1,  // (u + 1) * g * sigmoid(alpha * g) with g = min(gate, limit), u = up in -limit..limit
};

enum moesaic_element {
  MOESAIC_FLOAT32 = 0,
  MOESAIC_BFLOAT16 = 1,
};

// Where the rows of a routing are. Assignments in the order of their experts, those of one expert in the order given,
// are the "sorted rows"; pre-activations and scratch are laid out in that order.
//   expert_offsets  (E + 1)  the sorted rows of expert e are expert_offsets[e] .. expert_offsets[e + 1] - 1
//   assignments     (N)      the assignment of each sorted row
//   tokens          (N)      its token
//   token_offsets   (T + 1)  the entries of token t in token_rows are token_offsets[t] .. token_offsets[t + 1] - 1
//   token_rows      (N)      the sorted rows of each token, in the order of its assignments
// All five stand one after another in one array of moesaic_plan_size() int32.
typedef struct {
  const int32_t *expert_offsets, *assignments, *tokens, *token_offsets, *token_rows;
} moesaic_plan;

int64_t moesaic_plan_size(int64_t num_tokens, int64_t num_rows, int64_t num_experts);

moesaic_plan moesaic_plan_view(const int32_t* plan, int64_t num_tokens, int64_t num_rows, int64_t num_experts);

// Fills `plan` from the ids of N assignments. Returns -1, or the first assignment whose token or expert does not exist.
int64_t moesaic_make_plan(const int64_t* token_ids, const int64_t* expert_ids, int64_t num_tokens, int64_t num_rows,
                          int64_t num_experts, int32_t* plan);

typedef struct {
  int64_t num_tokens, num_rows, num_experts, hidden_size, intermediate_size;
  int32_t element;     // a moesaic_element
  int32_t activation;  // a moesaic_activation
  float limit, alpha;  // of MOESAIC_CLAMPED_SWIGLU
  moesaic_plan plan;
  const void* x;             // (T, D)
  const float* row_weights;  // (N), in the order of the assignments
  const void* gate_up;       // (E, 2F, D), gate first
  const void* down;          // (E, D, F)
  const void* gate_up_bias;  // (E, 2F) or NULL
  const void* down_bias;     // (E, D) or NULL
} moesaic_experts;

// y (T, D): each token's experts, times the weights of its rows, summed. Writes the pre-activations (N, 2F), biases
// included, which the backward pass reads.
//
// instruction_set is a name of moesaic_expert_kernels(), or NULL or "" for the best. Returns 0, -1 when this machine or build
// lacks the instruction set, -2 when memory runs out.
int moesaic_experts_forward(const moesaic_experts* experts, int threads, const char* instruction_set,
                            void* pre_activations, void* y);

typedef struct {
  void* x;             // (T, D)
  float* row_weights;  // (N), in the order of the assignments
  void* gate_up;       // (E, 2F, D)
  void* down;          // (E, D, F)
  void* gate_up_bias;  // (E, 2F); NULL where there is no such bias
  void* down_bias;     // (E, D); likewise
} moesaic_expert_gradients;

// All gradients, overwritten; zeros for experts without rows. Returns as moesaic_experts_forward does.
int moesaic_experts_backward(const moesaic_experts* experts, int threads, const char* instruction_set,
                             const void* pre_activations, const void* grad_y, moesaic_expert_gradients* gradients);

// The instruction sets that kernels for this moesaic_element are built for and this machine runs, the best first, ended by
// NULL.
const char* const* moesaic_expert_kernels(int32_t element);

#ifdef __cplusplus
}
#endif
