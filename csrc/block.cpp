// A block as a sequence of calls: what stands between them stays in memory that is kept.
#include "block.h"

#include <new>
#include <vector>

#include "work_memory.h"

namespace {

constexpr const char* best = "";  // of the instruction sets

// Arrays of one call, one after another.
class Arrays {
 public:
  explicit Arrays(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* const taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  float* next_;
};

// y = x + factor * update.
void add(const float* x, float factor, const float* update, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] + factor * update[i];
}

int apply(const moesaic_packed_layer& layer, const float* x, int64_t rows, int threads, float* y) {
  return moesaic_packed_linear(&layer.weight, layer.bias, x, rows, threads, best, y);
}

}  // namespace

extern "C" int moesaic_block_attend(const moesaic_block_step* block, const float* x, int threads, float* y,
                                    float* normed) try {
  moesaic_attention_step attention = block->attention;
  const int64_t T = block->attention.num_tokens, D = block->router.hidden_size;
  const int64_t queries = T * attention.num_heads * attention.head_dim;
  const int64_t keys = T * attention.num_key_value_heads * attention.head_dim;
  thread_local Buffer kept;
  float* const memory = kept.room_for(T * D + 2 * queries + 2 * keys);
  if (!memory) return -2;
  Arrays arrays(memory);
  float *const update = arrays.take(T * D), *const query = arrays.take(queries), *const attended = arrays.take(queries);
  float *const key = arrays.take(keys), *const value = arrays.take(keys);

  int status = moesaic_rms_norm(x, block->attention_norm, T, D, block->norm_eps, threads, best, normed);
  if (!status) status = apply(block->query, normed, T, threads, query);
  if (!status) status = apply(block->key, normed, T, threads, key);
  if (!status) status = apply(block->value, normed, T, threads, value);
  attention.query = query;
  attention.key = key;
  attention.value = value;
  if (!status) status = moesaic_attend(&attention, threads, best, attended);
  if (!status) status = apply(block->output, attended, T, threads, update);
  if (status) return status;
  add(x, block->residual, update, T * D, y);
  return moesaic_rms_norm(y, block->feed_forward_norm, T, D, block->norm_eps, threads, best, normed);
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_block_route(const moesaic_block_step* block, const float* normed, int threads, float* logits,
                                   int64_t* expert_ids, float* weights, int32_t* plan) try {
  moesaic_router_step router = block->router;
  const int64_t T = block->attention.num_tokens, N = T * router.top_k;
  router.num_tokens = T;
  router.x = normed;
  if (const int status = moesaic_route(&router, threads, best, logits, expert_ids, weights)) return status;
  std::vector<int64_t> token_ids(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) token_ids[size_t(n)] = n / router.top_k;
  moesaic_make_plan(token_ids.data(), expert_ids, T, N, router.num_experts, plan);
  return 0;
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_block_finish(const moesaic_block_step* block, const int32_t* plan, const float* rows,
                                    const float* weights, int threads, float* update, float* y) {
  const int64_t T = block->attention.num_tokens, D = block->router.hidden_size, N = T * block->router.top_k;
  const moesaic_plan view = moesaic_plan_view(plan, T, N, block->router.num_experts);
  if (const int status = moesaic_sum_rows(&view, T, N, D, rows, weights, threads, best, update)) return status;
  add(y, block->residual, update, T * D, y);
  return 0;
}

extern "C" int moesaic_block(const moesaic_block_step* block, const float* x, int threads, float* y, float* logits,
                             int64_t* expert_ids, float* weights) try {
  const int64_t T = block->attention.num_tokens, D = block->router.hidden_size, E = block->router.num_experts;
  const int64_t N = T * block->router.top_k;
  thread_local Buffer kept;
  float* const memory = kept.room_for(2 * T * D);
  if (!memory) return -2;
  Arrays arrays(memory);
  float *const normed = arrays.take(T * D), *const update = arrays.take(T * D);
  std::vector<int32_t> plan(static_cast<size_t>(moesaic_plan_size(T, N, E)));

  if (const int status = moesaic_block_attend(block, x, threads, y, normed)) return status;
  if (const int status = moesaic_block_route(block, normed, threads, logits, expert_ids, weights, plan.data())) {
    return status;
  }
  moesaic_packed_experts experts = block->experts;
  experts.num_tokens = T;
  experts.num_rows = N;
  experts.plan = moesaic_plan_view(plan.data(), T, N, E);
  experts.x = normed;
  experts.row_weights = weights;
  if (const int status = moesaic_packed_experts_forward(&experts, threads, best, update)) return status;
  add(y, block->residual, update, T * D, y);
  return 0;
} catch (const std::bad_alloc&) {
  return -2;
}
