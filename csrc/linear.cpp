// A linear layer: cuts the work into tasks and gives them to the threads.
#include "linear.h"

#include <algorithm>
#include <new>

#include "expert_kernels.h"
#include "kernel_choice.h"
#include "linear_kernels.h"
#include "work_memory.h"

namespace {

constexpr int64_t tokens_of_task = 320;
constexpr int64_t most_outputs = 1024;       // of a task; each task copies its tokens anew
constexpr int64_t few_bytes = 256 * 1024;    // of weights that a task of few tokens reads, about
constexpr int64_t outputs_step = 64;         // whole panels

const KernelChoice<LinearKernels>& usable_kernels() {
  static const auto usable = choice_of_vectors(moesaic_linear_kernels_avx512, moesaic_linear_kernels_avx2,
                                               moesaic_linear_kernels_portable);
  return usable;
}

int64_t outputs_of_task(const moesaic_linear_layer& layer, int64_t chunks, int threads, bool few) {
  if (few) return std::max<int64_t>(few_bytes / (layer.columns * 2), 16);
  const int64_t share = divide_up(layer.rows * chunks, 4 * std::max(threads, 1));
  return std::clamp(round_up(share, outputs_step), outputs_step, most_outputs);
}

}  // namespace

extern "C" int moesaic_linear(const moesaic_linear_layer* layer, const void* x, int64_t num_tokens, int threads,
                              const char* instruction_set, void* y) try {
  const LinearKernels* const kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const bool few = num_tokens <= few_rows;
  const Parts chunks(num_tokens, tokens_of_task);
  const int64_t most = outputs_of_task(*layer, chunks.number, threads, few);
  const Parts pieces(divide_up(layer->rows, outputs_step), std::max<int64_t>(most / outputs_step, 1));
  const auto run = few ? kernels->few : kernels->many;
  const auto task = [&](int64_t index, float* scratch) {
    const int64_t chunk = index % chunks.number, piece = index / chunks.number;
    const int64_t first = pieces.start(piece) * outputs_step;
    const int64_t end = std::min(pieces.start(piece + 1) * outputs_step, layer->rows);
    run(*layer, x, {chunks.start(chunk), chunks.size(chunk)}, {first, end - first}, y, scratch);
  };
  const int64_t widest = std::min(layer->rows, std::max(most, outputs_step));
  const int64_t scratch = kernels->scratch_size(std::min(num_tokens, tokens_of_task), widest, layer->columns);
  return parallel_with_scratch(threads, chunks.number * pieces.number, scratch, task) ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}
