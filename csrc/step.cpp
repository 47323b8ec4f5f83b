// The operators of step.h: cuts the work into tasks and gives them to the threads.
#include "step.h"

#include <algorithm>

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

// Runs task(first, last, scratch) over 0 .. count - 1 in as many parts as their size deserves. Returns 0 or -2.
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

extern "C" int moesaic_attend(const moesaic_attention_step* step, int threads, const char* instruction_set, float* y) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const int64_t tokens = step->batch_size * step->num_new, heads = step->num_key_value_heads, d = step->head_dim;
  const Temporary rms = temporary(2 * tokens);
  if (!rms) return -2;
  if (step->qk_norm == MOESAIC_QK_NORM_WIDTH) {  // once for all the tasks that share a row
    const int status = in_parts(
        threads, tokens, (step->num_heads + heads) * d, 0,
        [&](int64_t first, int64_t last, float*) { kernels->rms_of_rows(*step, first, last, rms.get()); });
    if (status) return status;
  }
  return in_parts(threads, step->batch_size * heads, 2 * step->num_keys * d, scratch_of_attend(*step),
                  [&](int64_t first, int64_t last, float* scratch) {
                    for (int64_t i = first; i < last; ++i) {
                      kernels->attend(*step, i / heads, i % heads, rms.get(), scratch, y);
                    }
                  });
}

extern "C" int moesaic_route(const moesaic_router_step* step, int threads, const char* instruction_set, float* logits,
                             int64_t* expert_ids, float* weights) {
  const StepKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, step->num_tokens, step->hidden_size * step->num_experts,
                  scratch_of_top_k(step->num_experts),
                  [&](int64_t first, int64_t last, float* scratch) {
                    kernels->route(*step, first, last, scratch, logits, expert_ids, weights);
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
