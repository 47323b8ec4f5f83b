// The small operators of inference between the products with weights, where the overhead of calling a large library would
// cost more than the work: the C-level interface. float32 and pointers, every array row-major and contiguous unless
// strides are given, as in experts.h.
//
// T tokens, B sequences, L new tokens of each, S tokens attended to (the new ones are the last), H query heads, G key-value
// heads, d head dim, r rotary dim, D hidden size, E experts, K experts per token.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Each function returns 0, -1 when this machine or build lacks the instruction set, -2 when memory runs out.

// y (T, size) = x (T, size) / rms(x), times weight (size) unless that is NULL.
int moesaic_rms_norm(const float* x, const float* weight, int64_t num_rows, int64_t size, float eps, int threads,
                     const char* instruction_set, float* y);

enum moesaic_qk_norm { MOESAIC_QK_NORM_NONE = 0, MOESAIC_QK_NORM_HEAD = 1, MOESAIC_QK_NORM_WIDTH = 2 };

typedef struct {
  int64_t batch_size, num_new, num_keys, num_heads, num_key_value_heads, head_dim, rotary_dim;
  int64_t cache_capacity;  // rows of one head in the cache
  const float *query, *key, *value;  // (B, L, H d), (B, L, G d) and (B, L, G d), as projected
  int32_t qk_norm;                   // a moesaic_qk_norm, before the rotation
  float norm_eps;
  const float *query_norm, *key_norm;  // (d) or (H d) and (G d); NULL without a norm
  int32_t interleaved;                 // pairs are (2i, 2i + 1) rather than (i, i + r / 2)
  const float *cosine, *sine;          // (B, L, r); NULL when rotary_dim is 0
  float* keys;                         // (B, G, cache_capacity, d): rows S - L .. S - 1 are written, then all are read
  float* values;
  const uint8_t* mask;     // (B or 1, L, S), 0 where a query does not see a key; no row is empty
  int64_t mask_stride;     // from one sequence to the next, 0 when they share it
  const float* sinks;      // (H) or NULL: logits that take their share of each softmax and give nothing
  float scale;
} moesaic_attention_step;

// y (B, L, H d): what softmax attention over the cache gives, after putting the new keys and values into it.
int moesaic_attend(const moesaic_attention_step* step, int threads, const char* instruction_set, float* y);

enum moesaic_scores { MOESAIC_SOFTMAX = 0, MOESAIC_SIGMOID = 1 };

typedef struct {
  int64_t num_tokens, hidden_size, num_experts, top_k;
  int32_t scores;         // a moesaic_scores
  int32_t normalise;      // whether a token's weights are divided by their sum, which is then at least least_sum
  float least_sum, scaling;
  const float* x;              // (T, D)
  const float* weight;         // (E, D)
  const float* bias;           // (E) of the logits, or NULL
  const float* selection_bias;  // (E), takes part in the choice only, or NULL
} moesaic_router_step;

// logits (T, E), the K experts of the highest score plus selection bias in descending order (T, K), their weights (T, K).
int moesaic_route(const moesaic_router_step* step, int threads, const char* instruction_set, float* logits,
                  int64_t* expert_ids, float* weights);

// ids (num_rows, k): where the k highest of each row of values (num_rows, size) stand, in descending order.
int moesaic_top_k(const float* values, int64_t num_rows, int64_t size, int64_t k, int threads, const char* instruction_set,
                  int64_t* ids);

#ifdef __cplusplus
}
#endif
