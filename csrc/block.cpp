// A block as a sequence of calls: what stands between them stays in memory that is kept.
#include "block.h"

#include <algorithm>
#include <cstring>
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

int64_t tokens_kept(const moesaic_block_step& block) {
  return block.num_kept < 0 ? block.attention.num_tokens : block.num_kept;
}

// y = x + factor * update.
void add(const float* x, float factor, const float* update, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] + factor * update[i];
}

// The rows of x (T, width) that are kept: x itself where all are, else `to` (R, width).
const float* kept_rows(const moesaic_block_step& block, const float* x, int64_t width, float* to) {
  if (block.num_kept < 0) return x;
  for (int64_t i = 0; i < block.num_kept; ++i) {
    std::memcpy(to + i * width, x + block.kept[i] * width, size_t(width) * sizeof(float));
  }
  return to;
}

}  // namespace

extern "C" int moesaic_block_attend(const moesaic_block_step* block, const float* x, int threads, float* y,
                                    float* normed) try {
  moesaic_attention_step attention = block->attention;
  const int64_t T = attention.num_tokens, R = tokens_kept(*block), D = block->router.hidden_size;
  const int64_t width = attention.num_heads * attention.head_dim;
  const int64_t key_width = attention.num_key_value_heads * attention.head_dim;
  thread_local Buffer memory_kept;
  const int64_t gathered = block->num_kept >= 0 ? R * std::max(width, D) : 0;
  float* const memory = memory_kept.room_for(T * (std::max(width, D) + width + 2 * key_width) + R * D + gathered);
  if (!memory) return -2;
  Arrays arrays(memory);
  float *const attended = arrays.take(T * std::max(width, D)), *const query = arrays.take(T * width);
  float *const key = arrays.take(T * key_width), *const value = arrays.take(T * key_width);
  float *const update = arrays.take(R * D), *const rows = arrays.take(gathered);
  float* const input = attended;  // which is read before there is anything attended

  int status = moesaic_rms_norm(x, block->attention_norm, T, D, block->norm_eps, threads, best, input);
  const moesaic_packed_layer projections[] = {block->query, block->key, block->value};
  float* const projected[] = {query, key, value};
  if (!status) status = moesaic_packed_linear(projections, 3, input, T, threads, best, projected);
  attention.query = query;
  attention.key = key;
  attention.value = value;
  if (!status) status = moesaic_attend(&attention, threads, best, attended);
  if (status || !R) return status;
  const float* const output = kept_rows(*block, attended, width, rows);
  status = moesaic_packed_linear(&block->output, 1, output, R, threads, best, &update);
  if (status) return status;
  add(kept_rows(*block, x, D, rows), block->residual, update, R * D, y);
  return moesaic_rms_norm(y, block->feed_forward_norm, R, D, block->norm_eps, threads, best, normed);
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_block_route(const moesaic_block_step* block, const float* normed, int threads, float* logits,
                                   int64_t* expert_ids, float* weights, int32_t* plan) try {
  moesaic_router_step router = block->router;
  const int64_t R = tokens_kept(*block), N = R * router.top_k;
  router.num_tokens = R;
  router.x = normed;
  if (const int status = moesaic_route(&router, threads, best, logits, expert_ids, weights)) return status;
  std::vector<int64_t> token_ids(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) token_ids[size_t(n)] = n / router.top_k;
  moesaic_make_plan(token_ids.data(), expert_ids, R, N, router.num_experts, plan);
  return 0;
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_block_finish(const moesaic_block_step* block, const int32_t* plan, const float* rows,
                                    const float* weights, int threads, float* update, float* y) {
  const int64_t R = tokens_kept(*block), D = block->router.hidden_size, N = R * block->router.top_k;
  const moesaic_plan view = moesaic_plan_view(plan, R, N, block->router.num_experts);
  if (const int status = moesaic_sum_rows(&view, R, N, D, rows, weights, threads, best, update)) return status;
  add(y, block->residual, update, R * D, y);
  return 0;
}

extern "C" int moesaic_block(const moesaic_block_step* block, const float* x, int threads, float* y, float* logits,
                             int64_t* expert_ids, float* weights) try {
  const int64_t R = tokens_kept(*block), D = block->router.hidden_size, E = block->router.num_experts;
  const int64_t N = R * block->router.top_k;
  thread_local Buffer memory_kept;
  float* const memory = memory_kept.room_for(2 * R * D);
  if (!memory) return -2;
  Arrays arrays(memory);
  float *const normed = arrays.take(R * D), *const update = arrays.take(R * D);
  std::vector<int32_t> plan(static_cast<size_t>(moesaic_plan_size(R, N, E)));

  if (const int status = moesaic_block_attend(block, x, threads, y, normed)) return status;
  if (!R) return 0;
  if (const int status = moesaic_block_route(block, normed, threads, logits, expert_ids, weights, plan.data())) {
    return status;
  }
  moesaic_packed_experts experts = block->experts;
  experts.num_tokens = R;
  experts.num_rows = N;
  experts.plan = moesaic_plan_view(plan.data(), R, N, E);
  experts.x = normed;
  experts.row_weights = weights;
  if (const int status = moesaic_packed_experts_forward(&experts, threads, best, update)) return status;
  add(y, block->residual, update, R * D, y);
  return 0;
} catch (const std::bad_alloc&) {
  return -2;
}
