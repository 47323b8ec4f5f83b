// One block of a decoder in one call, for packed weights: the operators of step.h and packed.h between two states of the
// residual stream. Called one by one for a few tokens, each would wait for the caller's code, which the weights that stream
// through the caches have pushed out of them.
//
// T tokens, D hidden size, H query heads, G key-value heads, d head dim, E experts, K experts per token.
#pragma once

#include "packed.h"
#include "step.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  moesaic_packed weight;
  const float* bias;  // NULL for none
} moesaic_packed_layer;

typedef struct {
  const float *attention_norm, *feed_forward_norm;  // (D), of what enters each half
  float norm_eps;
  float residual;                     // what each half adds is multiplied by it
  moesaic_packed_layer query, key, value, output;
  moesaic_attention_step attention;   // without its query, key and value
  moesaic_router_step router;         // without its num_tokens and x
  moesaic_packed_experts experts;     // without its num_tokens, num_rows, plan, x and row_weights
} moesaic_block_step;

// y (T, D) = x (T, D) plus attention of its norm, plus experts of that sum's norm, where T is the attention's num_tokens;
// and what the router said: logits (T, E), expert_ids and weights (T, K). Returns what the functions of step.h and packed.h
// return.
int moesaic_block(const moesaic_block_step* block, const float* x, int threads, float* y, float* logits,
                  int64_t* expert_ids, float* weights);

// The same in three steps, for experts that have to be fetched when it is known which; they come between the second and the
// third as moesaic_packed_experts_rows. `experts` is not read.
//
// y (T, D) = x plus attention of its norm; normed (T, D) is the norm of that, for the experts.
int moesaic_block_attend(const moesaic_block_step* block, const float* x, int threads, float* y, float* normed);

// What the router says of normed (T, D): logits (T, E), expert_ids and weights (T, K), and the plan of these T K assignments,
// moesaic_plan_size() int32.
int moesaic_block_route(const moesaic_block_step* block, const float* normed, int threads, float* logits,
                        int64_t* expert_ids, float* weights, int32_t* plan);

// y (T, D) += the rows (T K, D) of the experts, times their weights, by way of update (T, D).
int moesaic_block_finish(const moesaic_block_step* block, const int32_t* plan, const float* rows, const float* weights,
                         int threads, float* update, float* y);

#ifdef __cplusplus
}
#endif
