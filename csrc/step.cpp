// The operators of step.h: cuts the work into tasks and gives them to the threads.
#include "step.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "cpu_features.h"
#include "expert_kernels.h"
#include "step_kernels.h"
#include "work_memory.h"

namespace {

// Below so many floats to read, waking another thread takes longer than the work.
constexpr int64_t floats_per_task = 16 * 1024;

const StepKernels* kernels_named(const char* name) {
  static const std::vector<const StepKernels*> usable = [] {
    std::vector<const StepKernels*> found;
    if (moesaic_step_kernels_avx512() && moesaic_cpu_reaches("avx512f")) found.push_back(moesaic_step_kernels_avx512());
    if (moesaic_step_kernels_avx2() && moesaic_cpu_reaches("avx2")) found.push_back(moesaic_step_kernels_avx2());
    found.push_back(moesaic_step_kernels_portable());
    return found;
  }();
  for (const StepKernels* one : usable) {
    if (!name || !*name || !std::strcmp(one->name, name)) return one;
  }
  return nullptr;
}

// Runs task(first, last, scratch) over 0 .. count - 1 in as many parts as their size deserves. Returns 0 or -2.
template <class Task>
int in_parts(int threads, int64_t count, int64_t floats_of_each, int64_t scratch_size, const Task& task) {
  const int64_t per_task = std::max<int64_t>(1, floats_per_task / std::max<int64_t>(1, floats_of_each));
  const Parts parts(count, per_task);
  std::atomic<bool> complete{true};
  parallel(parts.number > 1 ? threads : 1, parts.number, [&](int64_t index, int) {
    float* const scratch = scratch_of_thread.room_for(std::max<int64_t>(1, scratch_size));
    if (scratch) {
      task(parts.start(index), parts.start(index + 1), scratch);
    } else {
      complete = false;
    }
  });
  return complete ? 0 : -2;
}

}  // namespace

extern "C" int moesaic_rms_norm(const float* x, const float* weight, int64_t num_rows, int64_t size, float eps,
                                int threads, const char* instruction_set, float* y) {
  const StepKernels* const kernels = kernels_named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, num_rows, size, 0, [&](int64_t first, int64_t last, float*) {
    for (int64_t i = first; i < last; ++i) kernels->rms_norm(x + i * size, weight, size, eps, y + i * size);
  });
}

extern "C" int moesaic_attend(const moesaic_attention_step* step, int threads, const char* instruction_set, float* y) {
  const StepKernels* const kernels = kernels_named(instruction_set);
  if (!kernels) return -1;
  const int64_t heads = step->num_key_value_heads;
  const int64_t floats = 2 * step->num_keys * step->head_dim;
  return in_parts(threads, step->batch_size * heads, floats, scratch_of_attend(*step),
                  [&](int64_t first, int64_t last, float* scratch) {
                    for (int64_t i = first; i < last; ++i) kernels->attend(*step, i / heads, i % heads, scratch, y);
                  });
}

extern "C" int moesaic_route(const moesaic_router_step* step, int threads, const char* instruction_set, float* logits,
                             int64_t* expert_ids, float* weights) {
  const StepKernels* const kernels = kernels_named(instruction_set);
  if (!kernels) return -1;
  return in_parts(threads, step->num_tokens, step->hidden_size * step->num_experts, step->num_experts,
                  [&](int64_t first, int64_t last, float* scratch) {
                    kernels->route(*step, first, last, scratch, logits, expert_ids, weights);
                  });
}
