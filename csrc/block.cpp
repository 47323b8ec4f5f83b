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

// The experts of x (T, D) that the router chooses, times their weights, summed into y (T, D).
int route_and_compute(const moesaic_block_step& block, const float* x, int64_t T, int threads, float* logits,
                      float* weights, float* y) {
  const int64_t E = block.router.num_experts, K = block.router.top_k, N = T * K;
  std::vector<int64_t> ids(size_t(2 * N));  // of the experts, then of the tokens
  std::vector<int32_t> plan(size_t(moesaic_plan_size(T, N, E)));
  moesaic_router_step router = block.router;
  router.num_tokens = T;
  router.x = x;
  if (const int status = moesaic_route(&router, threads, best, logits, ids.data(), weights)) return status;
  for (int64_t n = 0; n < N; ++n) ids[size_t(N + n)] = n / K;
  moesaic_make_plan(ids.data() + N, ids.data(), T, N, E, plan.data());
  moesaic_packed_experts experts = block.experts;
  experts.num_tokens = T;
  experts.num_rows = N;
  experts.plan = moesaic_plan_view(plan.data(), T, N, E);
  experts.x = x;
  experts.row_weights = weights;
  return moesaic_packed_experts_forward(&experts, threads, best, y);
}

}  // namespace

extern "C" int moesaic_block(const moesaic_block_step* block, const float* x, int threads, float* y) try {
  moesaic_attention_step attention = block->attention;
  const moesaic_router_step& router = block->router;
  const int64_t T = attention.batch_size * attention.num_new, D = router.hidden_size;
  const int64_t queries = T * attention.num_heads * attention.head_dim;
  const int64_t keys = T * attention.num_key_value_heads * attention.head_dim;
  thread_local Buffer kept;
  float* const memory = kept.room_for(2 * T * D + 2 * queries + 2 * keys + T * (router.num_experts + router.top_k));
  if (!memory) return -2;
  Arrays arrays(memory);
  float *const normed = arrays.take(T * D), *const update = arrays.take(T * D);
  float *const query = arrays.take(queries), *const attended = arrays.take(queries);
  float *const key = arrays.take(keys), *const value = arrays.take(keys);
  float *const logits = arrays.take(T * router.num_experts), *const weights = arrays.take(T * router.top_k);

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

  status = moesaic_rms_norm(y, block->feed_forward_norm, T, D, block->norm_eps, threads, best, normed);
  if (!status) status = route_and_compute(*block, normed, T, threads, logits, weights, update);
  if (!status) add(y, block->residual, update, T * D, y);
  return status;
} catch (const std::bad_alloc&) {
  return -2;
}
