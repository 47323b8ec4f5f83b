// The experts' forward and backward pass: cuts the work into tasks, gives them to the threads, keeps their memory.
#include "experts.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "expert_kernels.h"
#include "kernel_choice.h"
#include "work_memory.h"

namespace {

// Bytes of one chunk's data that may be in use at a time: about a core's share of the cache.
constexpr int64_t chunk_bytes = 2560 * 1024;
constexpr int64_t tokens_per_task = 64;
// Bytes of weights that a task reads of an expert with few rows, about.
constexpr int64_t few_rows_bytes = 256 * 1024;

const KernelChoice<ExpertKernels>& usable_kernels(int32_t element) {
  static const auto of_float =
      choice_of_vectors(moesaic_float_kernels_avx512, moesaic_float_kernels_avx2, moesaic_float_kernels_portable);
  static const KernelChoice<ExpertKernels> of_bfloat16{
      {"avx512_bf16", moesaic_bfloat16_kernels_avx512_bf16},
      {"avx512f", moesaic_bfloat16_kernels_avx512},
      {"avx2", moesaic_bfloat16_kernels_avx2},
      {"portable", moesaic_bfloat16_kernels_portable},
      // Never the best: tests force it where the CPU lacks avx512_bf16.
      {"avx512f", moesaic_bfloat16_kernels_avx512_pairs, "avx512f_pairs"},
  };
  return element == MOESAIC_BFLOAT16 ? of_bfloat16 : of_float;
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

void sum_rows(const moesaic_experts& experts, int threads, const ExpertKernels& kernels, const float* rows, void* out) {
  const Parts tokens(experts.num_tokens, tokens_per_task);
  parallel(threads, tokens.number, [&](int64_t index, int) {
    kernels.sum_rows(experts, rows, tokens.start(index), tokens.start(index + 1), out);
  });
}

// The forward pass of one call. Experts with few rows read their weights once, in pieces that the threads share: first for
// the hidden units, beside the chunks of the other experts, then for the outputs.
class Forward {
 public:
  Forward(const moesaic_experts& experts, int threads, const ExpertKernels& kernels, void* pre_activations)
      : experts_(experts),
        threads_(threads),
        kernels_(kernels),
        pre_activations_(pre_activations),
        rows_out_(temporary(experts.num_rows * experts.hidden_size)),
        hidden_(nullptr, free_aligned) {
    const int64_t D = experts.hidden_size, F = experts.intermediate_size;
    int64_t hidden = 0;
    for (int64_t e = 0; e < experts.num_experts; ++e) {
      const RowRange rows{e, experts.plan.expert_offsets[e], rows_of(experts, e)};
      if (!rows.count) continue;
      if (rows.count > few_rows) {
        for_each_chunk(experts, e, [&](RowRange chunk) { chunks_.push_back(chunk); });
        continue;
      }
      cut(F, 2 * D, [&](ColumnRange units) { units_.push_back({rows, units, hidden}); });
      cut(D, F, [&](ColumnRange outputs) { outputs_.push_back({rows, outputs, hidden}); });
      hidden += rows.count * F;
    }
    hidden_ = temporary(hidden);
  }

  // Whether there was memory for it.
  bool run(void* y) const {
    if (!rows_out_ || !hidden_) return false;
    const int64_t num_chunks = int64_t(chunks_.size());
    const int64_t scratch_size =
        kernels_.buffer_sizes(most_rows_of_chunk(experts_), experts_.hidden_size, experts_.intermediate_size).scratch;
    const auto chunk_or_units = [&](int64_t index, float* scratch) {
      if (index < num_chunks) {
        kernels_.forward(experts_, chunks_[size_t(index)], pre_activations_, rows_out_.get(), scratch);
      } else {
        const Piece& piece = units_[size_t(index - num_chunks)];
        kernels_.few_hidden(experts_, piece.rows, piece.columns, pre_activations_, hidden_.get() + piece.hidden_at,
                            scratch);
      }
    };
    const int64_t num_tasks = num_chunks + int64_t(units_.size());
    if (!parallel_with_scratch(threads_, num_tasks, scratch_size, chunk_or_units)) return false;
    parallel(threads_, int64_t(outputs_.size()), [&](int64_t index, int) {
      const Piece& piece = outputs_[size_t(index)];
      kernels_.few_outputs(experts_, piece.rows, piece.columns, hidden_.get() + piece.hidden_at, rows_out_.get());
    });
    sum_rows(experts_, threads_, kernels_, rows_out_.get(), y);
    return true;
  }

 private:
  // Some hidden units or outputs of an expert with few rows, whose hidden units start at hidden_at.
  struct Piece {
    RowRange rows;
    ColumnRange columns;
    int64_t hidden_at;
  };

  // `columns` that take so many weights each.
  template <class Add>
  void cut(int64_t columns, int64_t weights, const Add& add) const {
    const int64_t most = std::max<int64_t>(few_rows_bytes / (weights * kernels_.element_size), 16);
    const Parts parts(columns, most);
    for (int64_t part = 0; part < parts.number; ++part) add(ColumnRange{parts.start(part), parts.size(part)});
  }

  const moesaic_experts& experts_;
  const int threads_;
  const ExpertKernels& kernels_;
  void* const pre_activations_;
  Temporary rows_out_;  // (N, D): what each row adds to its token
  Temporary hidden_;    // of the experts with few rows
  std::vector<RowRange> chunks_;
  std::vector<Piece> units_, outputs_;
};

// The backward pass of one call. An expert is either computed whole by one thread, chunk by chunk, with what the chunk's
// gradients of the weights need in that thread's buffers. Or, where that would leave other threads idle, it is "split":
// its chunks are tasks, and after these the columns of its gradients. Both give the same numbers.
class Backward {
 public:
  Backward(const moesaic_experts& experts, int threads, const ExpertKernels& kernels, const void* pre_activations,
           const void* grad_y, const moesaic_expert_gradients& gradients)
      : experts_(experts),
        threads_(threads),
        kernels_(kernels),
        pre_activations_(pre_activations),
        grad_y_(grad_y),
        gradients_(gradients),
        rows_out_(temporary(experts.num_rows * experts.hidden_size)),
        saved_(nullptr, free_aligned) {
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
    const int64_t num_whole = int64_t(whole_.size());
    const int64_t sums = sums_size({0, experts_.hidden_size}, {0, experts_.intermediate_size});
    const int64_t buffers_of_thread =
        sizes_.scratch + sizes_.hidden + sizes_.grad_gate_up + (whole_.empty() ? 0 : sums);
    const auto expert_or_chunk = [&](int64_t index, float* buffers) {
      if (index < num_whole) {
        whole_expert(whole_[size_t(index)], buffers);
      } else {
        const Chunk& chunk = split_[size_t(index - num_whole)];
        chunk_backward(chunk.rows, hidden_of(chunk), grad_gate_up_of(chunk), buffers);
      }
    };
    const int64_t num_tasks = num_whole + int64_t(split_.size());
    if (!parallel_with_scratch(threads_, num_tasks, buffers_of_thread, expert_or_chunk)) return false;
    if (!gradients_of_split_experts()) return false;
    sum_rows(experts_, threads_, kernels_, rows_out_.get(), gradients_.x);
    return true;
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

  int64_t sums_size(ColumnRange gate_up, ColumnRange down) const {
    return kernels_.sums_size(experts_.hidden_size, experts_.intermediate_size, gate_up.count, down.count);
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
    float* const sums = scratch + sizes_.scratch;
    const int32_t* const ends = experts_.plan.expert_offsets + expert;
    for_each_chunk(experts_, expert, [&](RowRange rows) {
      chunk_backward(rows, hidden, grad_gate_up, scratch);
      const Turn turn{rows.first == ends[0], rows.first + rows.count == ends[1]};
      kernels_.weight_gradients(experts_, rows, grad_y_, hidden, grad_gate_up, {0, D}, {0, F}, turn, gradients_, sums,
                                scratch);
    });
    if (ends[0] == ends[1]) zero_gradients(expert);
  }

  void zero_gradients(int64_t expert) const {
    const int64_t D = experts_.hidden_size, F = experts_.intermediate_size;
    const auto zero = [&](void* gradient, int64_t count) {
      const size_t bytes = size_t(count * kernels_.element_size);
      if (gradient) std::memset(static_cast<char*>(gradient) + size_t(expert) * bytes, 0, bytes);
    };
    zero(gradients_.gate_up, 2 * F * D);
    zero(gradients_.down, D * F);
    zero(gradients_.gate_up_bias, 2 * F);
    zero(gradients_.down_bias, D);
  }

  bool gradients_of_split_experts() const {
    const std::vector<Columns> tasks = columns_of_split_experts();
    int64_t sums = 0;
    for (const Columns& columns : tasks) sums = std::max(sums, sums_size(columns.gate_up, columns.down));
    const auto gradients_of = [&](int64_t index, float* scratch) {
      const Columns& columns = tasks[size_t(index)];
      for (int64_t c = columns.first_chunk; c < columns.end_chunk; ++c) {
        const Chunk& chunk = split_[size_t(c)];
        kernels_.weight_gradients(experts_, chunk.rows, grad_y_, hidden_of(chunk), grad_gate_up_of(chunk),
                                  columns.gate_up, columns.down, {c == columns.first_chunk, c + 1 == columns.end_chunk},
                                  gradients_, scratch + sizes_.scratch, scratch);
      }
    };
    return parallel_with_scratch(threads_, int64_t(tasks.size()), sizes_.scratch + sums, gradients_of);
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
  const void* const pre_activations_;
  const void* const grad_y_;
  const moesaic_expert_gradients& gradients_;
  Temporary rows_out_;  // (N, D): gradient of each row's copy of x
  Temporary saved_;     // of the split experts' chunks
  BufferSizes sizes_;
  std::vector<int64_t> whole_;
  std::vector<Chunk> split_;
};

}  // namespace

extern "C" const char* const* moesaic_expert_kernels(int32_t element) { return usable_kernels(element).names(); }

extern "C" int moesaic_experts_forward(const moesaic_experts* experts, int threads, const char* instruction_set,
                                       void* pre_activations, void* y) try {
  const ExpertKernels* kernels = usable_kernels(experts->element).named(instruction_set);
  if (!kernels) return -1;
  return Forward(*experts, threads, *kernels, pre_activations).run(y) ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_experts_backward(const moesaic_experts* experts, int threads, const char* instruction_set,
                                        const void* pre_activations, const void* grad_y,
                                        moesaic_expert_gradients* gradients) try {
  const ExpertKernels* kernels = usable_kernels(experts->element).named(instruction_set);
  if (!kernels) return -1;
  return Backward(*experts, threads, *kernels, pre_activations, grad_y, *gradients).run() ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}
