// The operators of step.h: cuts the work into tasks and gives them to the threads.
#include "step.h"

#include <algorithm>
#include <new>
#include <vector>

#include "kernel_choice.h"
#include "sizes.h"
#include "step_kernels.h"
#include "work_memory.h"

namespace {

// Below so many floats to read, waking another thread takes longer than the work.
constexpr int64_t floats_per_task = 16 * 1024;
constexpr int64_t most_routed_together = 8;

const KernelChoice<StepKernels>& usable_kernels() {
  static const auto usable = choice_of_vectors(moesaic_step_kernels_avx512, moesaic_step_kernels_avx2,
                                               moesaic_step_kernels_portable);
  return usable;
}

// Runs task(first, last, scratch) over 0 .. count - 1 in as many parts as their size deserves.
// Returns 0 or -2.
template <class Task>
int in_parts(int threads, int64_t count, int64_t floats_of_each, int64_t scratch_size, const Task& task) {
  const int64_t per_task = std::max<int64_t>(1, floats_per_task / std::max<int64_t>(1, floats_of_each));
  const Parts parts(count, per_task);
  const auto part = [&](int64_t index, float* scratch) { task(parts.start(index), parts.start(index + 1), scratch); };
  return parallel_with_scratch(threads, parts.number, scratch_size, part) ? 0 : -2;
}

}  // namespace

extern "C" int moesaic_rms_norm(const float* x, const float* weight, int64_t num_rows, int64_t size, float eps,
                                int threads, const char* instruction_set, float* y) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, num_rows, size, 0, [&](int64_t first, int64_t last, float*) {
    for (int64_t i = first; i < last; ++i) kernels->rms_norm(x + i * size, weight, size, eps, y + i * size);
  });
}

extern "C" int moesaic_attend(const moesaic_attention_step* step, int threads, const char* instruction_set,
                              float* y) try {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const int64_t T = step->num_tokens, H = step->num_heads, G = step->num_key_value_heads, d = step->head_dim;
  const Temporary queries = temporary(T * H * d);
  if (!queries) return -2;
  int status = in_parts(threads, T, (H + 2 * G) * d, 0, [&](int64_t first, int64_t last, float*) {
    kernels->place(*step, first, last, queries.get());
  });
  if (status) return status;

  std::vector<AttentionTile> tiles;
  int64_t all_keys = 0, most_keys = 0;
  for (int64_t b = 0; b < step->num_sequences; ++b) {
    const int64_t rows = (step->first_tokens[b + 1] - step->first_tokens[b]) * (H / G);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t row = 0; row < rows; row += rows_of_tile) {
        tiles.push_back({b, g, row, std::min(row + rows_of_tile, rows)});
        all_keys += step->num_keys[b];
      }
    }
    most_keys = std::max(most_keys, step->num_keys[b]);
  }
  const int64_t count = int64_t(tiles.size()), floats = count ? 2 * d * all_keys / count : 0;
  return in_parts(threads, count, floats, scratch_of_attend(most_keys), [&](int64_t first, int64_t last, float* scratch) {
    for (int64_t i = first; i < last; ++i) kernels->attend(*step, tiles[size_t(i)], queries.get(), scratch, y);
  });
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_route(const moesaic_router_step* step, int threads, const char* instruction_set, float* logits,
                             int64_t* expert_ids, float* weights) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const int64_t T = step->num_tokens, E = step->num_experts, K = step->top_k;
  // A task is so many tokens as stay in the cache while it reads the weight, or, where these are not enough for all
  // threads, a part of the experts.
  const Parts groups(T, std::min(most_routed_together, 1 + T / (4 * threads)));
  const int64_t worth_a_task = std::max<int64_t>(1, floats_per_task / std::max<int64_t>(1, step->hidden_size));
  const Parts experts(E, groups.number < threads ? worth_a_task : E);
  parallel(threads, groups.number * experts.number, [&](int64_t index, int) {
    const int64_t group = index / experts.number, part = index % experts.number;
    kernels->router_logits(*step, groups.start(group), groups.start(group + 1), experts.start(part),
                           experts.start(part + 1), logits);
  });
  return in_parts(threads, T, E * (K + 1), scratch_of_top_k(E), [&](int64_t first, int64_t last, float* scratch) {
    kernels->choose(*step, first, last, logits, scratch, expert_ids, weights);
  });
}

extern "C" int moesaic_top_k(const float* values, int64_t num_rows, int64_t size, int64_t k, int threads,
                             const char* instruction_set, int64_t* ids) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, num_rows, size * k, scratch_of_top_k(size), [&](int64_t first, int64_t last, float* scratch) {
    kernels->top_k(values, first, last, size, k, scratch, ids);
  });
}
