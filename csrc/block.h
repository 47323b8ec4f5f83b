// One block of a decoder in one call, for packed weights: the operators of step.h and packed.h between two states of the
// residual stream. Called one by one for a few tokens, each would wait for the caller's code, which the weights that stream
// through the caches have pushed out of them.
//
// T tokens, R of them that are kept, D hidden size, H query heads, G key-value heads, d head dim, E experts, K experts per token.
#pragma once

#include "packed.h"
#include "step.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  const float *attention_norm, *feed_forward_norm;  // (D), of what enters each half
  float norm_eps;
  float residual;                     // what each half adds is multiplied by it
  moesaic_packed_layer query, key, value, output;
  moesaic_attention_step attention;   // without its query, key and value
  moesaic_router_step router;         // without its num_tokens and x
  moesaic_packed_experts experts;     // without its num_tokens, num_rows, plan, x and row_weights
  const int64_t* kept;                // (R) tokens that go on after attention
  int64_t num_kept;                   // R, or -1: all go on, in their order
} moesaic_block_step;

// y (R, D) = x (T, D) plus attention of its norm, plus experts of that sum's norm, where T is the attention's num_tokens, for
// the R tokens that are kept; and what the router said of them: logits (R, E), expert_ids and weights (R, K). Returns what
// the functions of step.h and packed.h return.
int moesaic_block(const moesaic_block_step* block, const float* x, int threads, float* y, float* logits,
                  int64_t* expert_ids, float* weights);

// The same in three steps, for experts that have to be fetched when it is known which; they come between the second and the
// third as moesaic_packed_experts_rows. `experts` is not read.
//
// y (R, D) = x plus attention of its norm; normed (R, D) is the norm of that, for the experts.
int moesaic_block_attend(const moesaic_block_step* block, const float* x, int threads, float* y, float* normed);

// What the router says of normed (R, D): logits (R, E), expert_ids and weights (R, K), and the plan of these R K assignments,
// moesaic_plan_size() int32.
int moesaic_block_route(const moesaic_block_step* block, const float* normed, int threads, float* logits,
                        int64_t* expert_ids, float* weights, int32_t* plan);

// y (R, D) += the rows (R K, D) of the experts, times their weights, by way of update (R, D).
int moesaic_block_finish(const moesaic_block_step* block, const int32_t* plan, const float* rows, const float* weights,
                         int threads, float* update, float* y);

#ifdef __cplusplus
}
#endif
