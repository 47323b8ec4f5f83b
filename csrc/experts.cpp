// The experts' forward and backward pass: cuts the work into tasks, gives them to the threads, keeps their memory.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu_features.h"
#include "expert_kernels.h"
#include "thread_pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Bytes of one chunk's data that may be in use at a time: about a core's share of the cache.
constexpr int64_t chunk_bytes = 2560 * 1024;
constexpr int64_t tokens_per_task = 64;

// Memory that is kept from call to call, so that it need not be faulted in again.
class Buffer {
 public:
  // NULL when there is no memory.
  float* room_for(int64_t floats) {
    if (floats > capacity_) {
      constexpr size_t page = 2 << 20;
      const size_t bytes = (size_t(floats) * sizeof(float) + page - 1) / page * page;
      data_.reset(static_cast<float*>(allocate(bytes)));
      capacity_ = data_ ? int64_t(bytes / sizeof(float)) : 0;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* data) const {
#if defined(_WIN32)
      _aligned_free(data);
#else
      std::free(data);
#endif
    }
  };

  static void* allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 2 << 20);
#else
    void* data = nullptr;
    if (posix_memalign(&data, 2 << 20, bytes)) return nullptr;
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
#endif
  }

  std::unique_ptr<float, Free> data_;
  int64_t capacity_ = 0;
};

thread_local Buffer scratch_of_thread;

template <class Task>
void parallel(int threads, int64_t num_tasks, const Task& task) {
  moesaic_parallel(
      threads, num_tasks,
      [](void* data, int64_t index, int worker) { (*static_cast<const Task*>(data))(index, worker); },
      const_cast<Task*>(&task));
}


// Memory of one call, or NULL.
std::unique_ptr<float[], void (*)(void*)> temporary(int64_t floats) {
  return {static_cast<float*>(std::malloc(size_t(std::max<int64_t>(floats, 1)) * sizeof(float))), std::free};
}

bool cpu_reaches(const char* level) {
  static const char* const levels[] = {"avx512_bf16", "avx512_vnni", "avx512f", "avx2"};
  const auto place = [&](const char* name) {
    return std::find_if(std::begin(levels), std::end(levels), [&](const char* one) { return !std::strcmp(one, name); });
  };
  const auto* best = place(moesaic_instruction_set());
  return best != std::end(levels) && best <= place(level);
}

// Those that run here, the best first.
const std::vector<const ExpertKernels*>& usable_kernels() {
  static const std::vector<const ExpertKernels*> usable = [] {
    std::vector<const ExpertKernels*> found;
    if (moesaic_kernels_avx512() && cpu_reaches("avx512f")) found.push_back(moesaic_kernels_avx512());
    if (moesaic_kernels_avx2() && cpu_reaches("avx2")) found.push_back(moesaic_kernels_avx2());
    found.push_back(moesaic_kernels_portable());
    return found;
  }();
  return usable;
}

const ExpertKernels* kernels_named(const char* name) {
  for (const ExpertKernels* one : usable_kernels()) {
    if (!name || !*name || !std::strcmp(one->name, name)) return one;
  }
  return nullptr;
}

// The rows of an expert are computed in chunks of at most this many, so that what a chunk needs stays in a core's cache.
// A function of the sizes alone, because the chunks decide in which order the gradients of the weights are summed up.
int64_t rows_per_chunk(const moesaic_experts& experts) {
  const int64_t bytes_per_row = (2 * experts.hidden_size + 3 * experts.intermediate_size) * int64_t(sizeof(float));
  return std::clamp<int64_t>(chunk_bytes / bytes_per_row, 320, 768);
}

int64_t rows_of(const moesaic_experts& experts, int64_t expert) {
  return experts.plan.expert_offsets[expert + 1] - experts.plan.expert_offsets[expert];
}

template <class Visit>
void for_each_chunk(const moesaic_experts& experts, int64_t expert, const Visit& visit) {
  const Parts chunks(rows_of(experts, expert), rows_per_chunk(experts));
  for (int64_t c = 0; c < chunks.number; ++c) {
    visit(RowRange{expert, experts.plan.expert_offsets[expert] + chunks.start(c), chunks.size(c)});
  }
}

int64_t most_rows_of_chunk(const moesaic_experts& experts) {
  int64_t most = 0;
  for (int64_t e = 0; e < experts.num_experts; ++e) {
    for_each_chunk(experts, e, [&](RowRange rows) { most = std::max(most, rows.count); });
  }
  return most;
}

void sum_rows(const moesaic_experts& experts, int threads, const ExpertKernels& kernels, const float* rows, float* out) {
  const Parts tokens(experts.num_tokens, tokens_per_task);
  parallel(threads, tokens.number, [&](int64_t index, int) {
    kernels.sum_rows(experts, rows, tokens.start(index), tokens.start(index + 1), out);
  });
}

// The backward pass of one call. An expert is either computed whole by one thread, chunk by chunk, with what the chunk's
// gradients of the weights need in that thread's buffers. Or, where that would leave other threads idle, it is "split":
// its chunks are tasks, and after these the columns of its gradients. Both give the same numbers.
class Backward {
 public:
  Backward(const moesaic_experts& experts, int threads, const ExpertKernels& kernels, const float* pre_activations,
           const float* grad_y, const moesaic_expert_gradients& gradients)
      : experts_(experts),
        threads_(threads),
        kernels_(kernels),
        pre_activations_(pre_activations),
        grad_y_(grad_y),
        gradients_(gradients),
        rows_out_(temporary(experts.num_rows * experts.hidden_size)),
        saved_(nullptr, std::free) {
    sizes_ = sizes_for(most_rows_of_chunk(experts));
    for (int64_t e = 0; e < experts.num_experts; ++e) {
      if (threads > 1 && rows_of(experts, e) * threads * split_share > experts.num_rows) {
        for_each_chunk(experts, e, [&](RowRange rows) { split_.push_back({rows, 0}); });
      } else {
        whole_.push_back(e);
      }
    }
    // Long tasks first, so that the threads end at about the same time.
    std::stable_sort(whole_.begin(), whole_.end(),
                     [&](int64_t a, int64_t b) { return rows_of(experts, a) > rows_of(experts, b); });
    int64_t saved = 0;
    for (Chunk& chunk : split_) {
      chunk.saved_at = saved;
      saved += sizes_for(chunk.rows.count).hidden + sizes_for(chunk.rows.count).grad_gate_up;
    }
    saved_ = temporary(saved);
  }

  // Whether there was memory for it.
  bool run() {
    if (!rows_out_ || !saved_) return false;
    std::atomic<bool> complete{true};
    const int64_t num_whole = int64_t(whole_.size());
    parallel(threads_, num_whole + int64_t(split_.size()), [&](int64_t index, int) {
      float* const scratch = scratch_of_thread.room_for(sizes_.scratch + sizes_.hidden + sizes_.grad_gate_up);
      if (!scratch) {
        complete = false;
      } else if (index < num_whole) {
        whole_expert(whole_[size_t(index)], scratch);
      } else {
        const Chunk& chunk = split_[size_t(index - num_whole)];
        chunk_backward(chunk.rows, hidden_of(chunk), grad_gate_up_of(chunk), scratch);
      }
    });
    if (!complete) return false;
    return gradients_of_split_experts() && (sum_rows(experts_, threads_, kernels_, rows_out_.get(), gradients_.x), true);
  }

 private:
  // An expert with more than this share of a thread's part of the rows is split.
  static constexpr int64_t split_share = 8;

  struct Chunk {
    RowRange rows;
    int64_t saved_at;
  };

  // Columns of an expert's gradients.
  struct Columns {
    int64_t first_chunk, end_chunk;
    ColumnRange gate_up, down;
  };

  BufferSizes sizes_for(int64_t rows) const {
    return kernels_.buffer_sizes(rows, experts_.hidden_size, experts_.intermediate_size);
  }

  float* hidden_of(const Chunk& chunk) const { return saved_.get() + chunk.saved_at; }
  float* grad_gate_up_of(const Chunk& chunk) const { return hidden_of(chunk) + sizes_for(chunk.rows.count).hidden; }

  void chunk_backward(RowRange rows, float* hidden, float* grad_gate_up, float* scratch) const {
    kernels_.backward(experts_, rows, pre_activations_, grad_y_, gradients_.row_weights, rows_out_.get(), hidden,
                      grad_gate_up, scratch);
  }

  void whole_expert(int64_t expert, float* buffers) const {
    const int64_t D = experts_.hidden_size, F = experts_.intermediate_size;
    float* const hidden = buffers;
    float* const grad_gate_up = hidden + sizes_.hidden;
    float* const scratch = grad_gate_up + sizes_.grad_gate_up;
    bool accumulate = false;
    for_each_chunk(experts_, expert, [&](RowRange rows) {
      chunk_backward(rows, hidden, grad_gate_up, scratch);
      kernels_.weight_gradients(experts_, rows, grad_y_, hidden, grad_gate_up, {0, D}, {0, F}, accumulate, gradients_,
                                scratch);
      accumulate = true;
    });
    if (!accumulate) zero_gradients(expert);
  }

  void zero_gradients(int64_t expert) const {
    const int64_t D = experts_.hidden_size, F = experts_.intermediate_size;
    const auto zero = [&](float* gradient, int64_t count) {
      if (gradient) std::memset(gradient + expert * count, 0, size_t(count) * sizeof(float));
    };
    zero(gradients_.gate_up, 2 * F * D);
    zero(gradients_.down, D * F);
    zero(gradients_.gate_up_bias, 2 * F);
    zero(gradients_.down_bias, D);
  }

  bool gradients_of_split_experts() const {
    const std::vector<Columns> tasks = columns_of_split_experts();
    std::atomic<bool> complete{true};
    parallel(threads_, int64_t(tasks.size()), [&](int64_t index, int) {
      const Columns& columns = tasks[size_t(index)];
      float* const scratch = scratch_of_thread.room_for(sizes_.scratch);
      if (!scratch) {
        complete = false;
        return;
      }
      for (int64_t c = columns.first_chunk; c < columns.end_chunk; ++c) {
        const Chunk& chunk = split_[size_t(c)];
        kernels_.weight_gradients(experts_, chunk.rows, grad_y_, hidden_of(chunk), grad_gate_up_of(chunk),
                                  columns.gate_up, columns.down, c > columns.first_chunk, gradients_, scratch);
      }
    });
    return complete;
  }

  std::vector<Columns> columns_of_split_experts() const {
    std::vector<Columns> tasks;
    const int64_t num_chunks = int64_t(split_.size());
    for (int64_t first = 0, end; first < num_chunks; first = end) {
      for (end = first; end < num_chunks && split_[size_t(end)].rows.expert == split_[size_t(first)].rows.expert;) ++end;
      const auto cut = [&](int64_t columns, const auto& add) {
        const int64_t part = round_up(std::max<int64_t>(divide_up(columns, 2 * threads_), 64), kernels_.column_step);
        for (int64_t j = 0; j < columns; j += part) add(ColumnRange{j, std::min(part, columns - j)});
      };
      cut(experts_.hidden_size, [&](ColumnRange range) { tasks.push_back({first, end, range, {0, 0}}); });
      cut(experts_.intermediate_size, [&](ColumnRange range) { tasks.push_back({first, end, {0, 0}, range}); });
    }
    return tasks;
  }

  const moesaic_experts& experts_;
  const int threads_;
  const ExpertKernels& kernels_;
  const float* const pre_activations_;
  const float* const grad_y_;
  const moesaic_expert_gradients& gradients_;
  std::unique_ptr<float[], void (*)(void*)> rows_out_;  // (N, D): gradient of each row's copy of x
  std::unique_ptr<float[], void (*)(void*)> saved_;     // of the split experts' chunks
  BufferSizes sizes_;
  std::vector<int64_t> whole_;
  std::vector<Chunk> split_;
};

}  // namespace

extern "C" const char* const* moesaic_expert_kernels(void) {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
    for (const ExpertKernels* one : usable_kernels()) found.push_back(one->name);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

extern "C" int moesaic_experts_forward(const moesaic_experts* experts, int threads, const char* instruction_set,
                                       float* pre_activations, float* y) try {
  const ExpertKernels* kernels = kernels_named(instruction_set);
  if (!kernels) return -1;
  std::vector<RowRange> chunks;
  for (int64_t e = 0; e < experts->num_experts; ++e) {
    for_each_chunk(*experts, e, [&](RowRange rows) { chunks.push_back(rows); });
  }
  const auto rows_out = temporary(experts->num_rows * experts->hidden_size);
  if (!rows_out) return -2;
  const int64_t scratch_size =
      kernels->buffer_sizes(most_rows_of_chunk(*experts), experts->hidden_size, experts->intermediate_size).scratch;
  std::atomic<bool> complete{true};
  parallel(threads, int64_t(chunks.size()), [&](int64_t index, int) {
    float* const scratch = scratch_of_thread.room_for(scratch_size);
    if (scratch) {
      kernels->forward(*experts, chunks[size_t(index)], pre_activations, rows_out.get(), scratch);
    } else {
      complete = false;
    }
  });
  if (!complete) return -2;
  sum_rows(*experts, threads, *kernels, rows_out.get(), y);
  return 0;
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_experts_backward(const moesaic_experts* experts, int threads, const char* instruction_set,
                                        const float* pre_activations, const float* grad_y,
                                        moesaic_expert_gradients* gradients) try {
  const ExpertKernels* kernels = kernels_named(instruction_set);
  if (!kernels) return -1;
  return Backward(*experts, threads, *kernels, pre_activations, grad_y, *gradients).run() ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}
