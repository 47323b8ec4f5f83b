// The step of the optimizer Muon: gives the matrices to the threads.
#include "muon.h"

#include <algorithm>
#include <new>
#include <vector>

#include "kernel_choice.h"
#include "muon_kernels.h"
#include "work_memory.h"

namespace {

const KernelChoice<MuonKernels>& usable_kernels() {
  static const auto usable = choice_of_vectors(moesaic_muon_kernels_avx512, moesaic_muon_kernels_avx2,
                                               moesaic_muon_kernels_portable);
  return usable;
}

}  // namespace

extern "C" int64_t moesaic_muon_largest_side(void) { return muon_largest_side; }

extern "C" int moesaic_muon_step(const moesaic_matrix_stack* stacks, int64_t num_stacks, float momentum, int threads,
                                 const char* instruction_set) try {
  const MuonKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  struct Task {
    const moesaic_matrix_stack* stack;
    int64_t matrix;
  };
  std::vector<Task> tasks;
  int64_t scratch_size = 0;
  for (const moesaic_matrix_stack* stack = stacks; stack < stacks + num_stacks; ++stack) {
    scratch_size = std::max(scratch_size, kernels->scratch_size(stack->rows, stack->columns));
    for (int64_t matrix = 0; matrix < stack->number; ++matrix) tasks.push_back({stack, matrix});
  }
  const auto step = [&](int64_t index, float* scratch) {
    kernels->step(*tasks[size_t(index)].stack, tasks[size_t(index)].matrix, momentum, scratch);
  };
  return parallel_with_scratch(threads, int64_t(tasks.size()), scratch_size, step) ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}
