// The small operators of inference between the products with weights, where the overhead of calling a large library would
// cost more than the work: the C-level interface. float32 and pointers, every array row-major and contiguous unless
// strides are given, as in experts.h.
//
// T tokens, side by side of B sequences, H query heads, G key-value heads, d head dim, r rotary dim, D hidden size, E experts,
// K experts per token.
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

// Keys and values lie in blocks of so many tokens, which sequences take as they grow.
enum { MOESAIC_BLOCK_TOKENS = 32 };

typedef struct {
  int64_t num_tokens, num_sequences, num_heads, num_key_value_heads, head_dim, rotary_dim;
  const float *query, *key, *value;  // (T, H d), (T, G d) and (T, G d), as projected
  int32_t qk_norm;                   // a moesaic_qk_norm, before the rotation
  float norm_eps;
  const float *query_norm, *key_norm;  // (d) or (H d) and (G d); NULL without a norm
  int32_t interleaved;                 // pairs are (2i, 2i + 1) rather than (i, i + r / 2)
  const float *cosine, *sine;          // (T, r); NULL when rotary_dim is 0
  const int64_t* first_tokens;  // (B + 1): sequence b has the new tokens first_tokens[b] .. first_tokens[b + 1] - 1, its last
  const int64_t* num_keys;      // (B): tokens of each sequence, the new ones among them
  const int64_t* block_tables;  // (B, table_size): the blocks of each, in the order of its tokens
  int64_t table_size;
  const int64_t* first_keys;  // (T) or NULL: the first token of its sequence that a token sees; it sees none after itself
  float* keys;                // (blocks, G, d, MOESAIC_BLOCK_TOKENS)
  float* values;              // (blocks, G, MOESAIC_BLOCK_TOKENS, d)
  const float* sinks;         // (H) or NULL: logits that take their share of each softmax and give nothing
  float scale;
} moesaic_attention_step;

// y (T, H d): what softmax attention gives, after putting the new keys and values into their blocks. What a token gets depends
// on its own sequence alone, to the last bit.
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
