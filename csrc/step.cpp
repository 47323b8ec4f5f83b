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

const KernelChoice<StepKernels>& usable_kernels() {
  static const auto usable = choice_of_vectors(moesaic_step_kernels_avx512, moesaic_step_kernels_avx2,
                                               moesaic_step_kernels_portable);
  return usable;
}

// Runs task(first, last, scratch) over 0 .. count - 1 in as many parts as their size deserves, of at least so many.
// Returns 0 or -2.
template <class Task>
int in_parts(int threads, int64_t count, int64_t floats_of_each, int64_t scratch_size, const Task& task,
             int64_t at_least = 1) {
  const int64_t per_task = std::max(at_least, floats_per_task / std::max<int64_t>(1, floats_of_each));
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
  // Each part reads all of the weight, so a part is more than a token as soon as all threads have one.
  const int64_t at_least = std::min<int64_t>(8, 1 + step->num_tokens / (4 * threads));
  const auto some = [&](int64_t first, int64_t last, float* scratch) {
    kernels->route(*step, first, last, scratch, logits, expert_ids, weights);
  };
  return in_parts(threads, step->num_tokens, step->hidden_size * step->num_experts,
                  scratch_of_top_k(step->num_experts), some, at_least);
}

extern "C" int moesaic_top_k(const float* values, int64_t num_rows, int64_t size, int64_t k, int threads,
                             const char* instruction_set, int64_t* ids) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, num_rows, size * k, scratch_of_top_k(size), [&](int64_t first, int64_t last, float* scratch) {
    kernels->top_k(values, first, last, size, k, scratch, ids);
  });
}
