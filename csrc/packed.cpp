// Packed experts and linear layers: cuts the work into tasks, gives them to the threads, keeps their memory.
#include "packed.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "kernel_choice.h"
#include "packed_kernels.h"
#include "work_memory.h"

namespace {

// Hidden units of a task of the first product.
constexpr int64_t hidden_of_task = 128;
// Columns of a task elsewhere: about this many tasks per thread, and at most so many columns.
constexpr int64_t tasks_per_thread = 8;
constexpr int64_t most_columns_of_task = 256;
// Records of fewer numbers are made by the calling thread alone.
constexpr int64_t numbers_worth_a_thread = 32 * 1024;
constexpr int64_t rows_of_rounding_task = 16;
// Memory kept between calls for the records of one call, at most.
constexpr int64_t kept_bytes = 32 << 20;

const KernelChoice<PackedKernels>& usable_kernels() {
  static const KernelChoice<PackedKernels> usable{{"avx512_vnni", moesaic_packed_kernels_avx512_vnni},
                                                  {"avx2", moesaic_packed_kernels_avx2},
                                                  {"portable", moesaic_packed_kernels_portable}};
  return usable;
}

bool known_format(const moesaic_packed& w) {
  return (w.group_size == 32 || w.group_size == 64) && (w.bits == 8 || (w.bits == 4 && w.table));
}

// Records that live as long as a call.
class Records {
 public:
  explicit Records(int64_t bytes) : own_(temporary(0)) {
    thread_local Buffer kept;
    const int64_t floats = divide_up(bytes, sizeof(float));
    if (bytes > kept_bytes) {
      own_ = temporary(floats);
      data_ = own_.get();
    } else {
      data_ = kept.room_for(floats);
    }
  }
  uint8_t* get() const { return reinterpret_cast<uint8_t*>(data_); }

 private:
  Temporary own_;
  float* data_;
};

void round_rows(const PackedKernels& kernels, const float* x, int64_t rows, int64_t columns, int64_t group_size,
                int threads, uint8_t* records) {
  const int64_t bytes = record_bytes(columns, group_size);
  const Parts tasks(rows, rows_of_rounding_task);
  parallel(rows * columns < numbers_worth_a_thread ? 1 : threads, tasks.number, [&](int64_t task, int) {
    for (int64_t i = tasks.start(task); i < tasks.start(task + 1); ++i) {
      kernels.round_row(x + i * columns, columns, group_size, records + i * bytes);
    }
  });
}

// Columns in parts that start at multiples of two panels.
int64_t columns_of_task(int64_t columns, int threads) {
  const int64_t part = round_up(divide_up(columns, tasks_per_thread * std::max(threads, 1)), 2 * panel_outputs);
  return std::min(std::max<int64_t>(part, 2 * panel_outputs), most_columns_of_task);
}

// The rows of the experts that are there.
std::vector<RowRange> chunks_of(const moesaic_packed_experts& experts) {
  std::vector<RowRange> chunks;
  for (int64_t e = 0; e < experts.num_experts; ++e) {
    if (experts.slots && experts.slots[e] < 0) continue;
    const int64_t first = experts.plan.expert_offsets[e];
    const Parts parts(experts.plan.expert_offsets[e + 1] - first, most_packed_rows);
    for (int64_t c = 0; c < parts.number; ++c) chunks.push_back({e, first + parts.start(c), parts.size(c)});
  }
  return chunks;
}

// Records of the tokens of these rows.
void round_tokens(const PackedKernels& kernels, const moesaic_packed_experts& experts,
                  const std::vector<RowRange>& chunks, int threads, uint8_t* records) {
  const int64_t T = experts.num_tokens, D = experts.hidden_size, bytes = record_bytes(D, experts.gate_up.group_size);
  std::vector<uint8_t> is_needed(static_cast<size_t>(T));
  for (const RowRange& rows : chunks) {
    for (int64_t i = 0; i < rows.count; ++i) is_needed[size_t(experts.plan.tokens[rows.first + i])] = 1;
  }
  const Parts tasks(T, rows_of_rounding_task);
  parallel(T * D < numbers_worth_a_thread ? 1 : threads, tasks.number, [&](int64_t task, int) {
    for (int64_t t = tasks.start(task); t < tasks.start(task + 1); ++t) {
      if (!is_needed[size_t(t)]) continue;
      kernels.round_row(experts.x + t * D, D, experts.gate_up.group_size, records + t * bytes);
    }
  });
}

// Both products of these rows. `outputs` says where what they give is added, and with what weights: at its plan's tokens of
// y, which zero(columns) has cleared.
template <class Zero>
int multiply_rows(const moesaic_packed_experts& experts, const std::vector<RowRange>& chunks,
                  const moesaic_packed_experts& outputs, int threads, const char* instruction_set, const Zero& zero,
                  float* y) {
  const int64_t D = experts.hidden_size, F = experts.intermediate_size;
  const moesaic_packed &gate_up = experts.gate_up, &down = experts.down;
  const PackedKernels* kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  if (!known_format(gate_up) || !known_format(down) || gate_up.rows != 2 * F || gate_up.columns != D ||
      down.rows != D || down.columns != F) {
    return -3;
  }
  const int64_t x_bytes = experts.num_tokens * record_bytes(D, gate_up.group_size);
  const Records records(x_bytes + experts.num_rows * record_bytes(F, down.group_size));
  if (!records.get()) return -2;
  uint8_t* const hidden = records.get() + x_bytes;
  round_tokens(*kernels, experts, chunks, threads, records.get());

  const int64_t parts = divide_up(F, hidden_of_task);
  const auto first_product = [&](int64_t index, float* scratch) {
    const int64_t first = index % parts * hidden_of_task;
    const ColumnRange columns{first, std::min(hidden_of_task, F - first)};
    kernels->hidden(experts, chunks[size_t(index / parts)], columns, records.get(), hidden, scratch);
  };
  if (!parallel_with_scratch(threads, int64_t(chunks.size()) * parts, kernels->scratch_size, first_product)) return -2;

  const int64_t width = columns_of_task(D, threads);
  const auto second_product = [&](int64_t index, float* scratch) {
    const ColumnRange columns{index * width, std::min(width, D - index * width)};
    zero(columns);
    for (const RowRange& rows : chunks) kernels->add_outputs(outputs, rows, columns, hidden, y, scratch);
  };
  return parallel_with_scratch(threads, divide_up(D, width), kernels->scratch_size, second_product) ? 0 : -2;
}

void clear(float* y, int64_t row, int64_t D, ColumnRange columns) {
  std::memset(y + row * D + columns.first, 0, size_t(columns.count) * sizeof(float));
}

}  // namespace

extern "C" const char* const* moesaic_packed_kernels(void) { return usable_kernels().names(); }

extern "C" int64_t moesaic_packed_bytes(int64_t rows, int64_t columns, int64_t group_size, int64_t bits) {
  return divide_up(rows, panel_outputs) * divide_up(columns, group_size) * block_bytes(group_size, bits);
}

extern "C" int moesaic_packed_experts_forward(const moesaic_packed_experts* experts, int threads,
                                              const char* instruction_set, float* y) try {
  const auto zero = [&](ColumnRange columns) {
    for (int64_t t = 0; t < experts->num_tokens; ++t) clear(y, t, experts->hidden_size, columns);
  };
  return multiply_rows(*experts, chunks_of(*experts), *experts, threads, instruction_set, zero, y);
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_packed_experts_rows(const moesaic_packed_experts* experts, int threads,
                                           const char* instruction_set, float* rows) try {
  const std::vector<RowRange> chunks = chunks_of(*experts);
  moesaic_packed_experts outputs = *experts;
  outputs.plan.tokens = experts->plan.assignments;
  outputs.row_weights = nullptr;
  const auto zero = [&](ColumnRange columns) {
    for (const RowRange& chunk : chunks) {
      const int32_t* const assignments = experts->plan.assignments + chunk.first;
      for (int64_t i = 0; i < chunk.count; ++i) clear(rows, assignments[i], experts->hidden_size, columns);
    }
  };
  return multiply_rows(*experts, chunks, outputs, threads, instruction_set, zero, rows);
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_sum_rows(const moesaic_plan* plan, int64_t num_tokens, int64_t num_rows, int64_t hidden_size,
                                const float* rows, const float* row_weights, int threads, const char* instruction_set,
                                float* y) {
  const PackedKernels* kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const int64_t width = columns_of_task(hidden_size, threads);
  const int work = num_rows * hidden_size < numbers_worth_a_thread ? 1 : threads;
  parallel(work, divide_up(hidden_size, width), [&](int64_t index, int) {
    const ColumnRange columns{index * width, std::min(width, hidden_size - index * width)};
    for (int64_t t = 0; t < num_tokens; ++t) clear(y, t, hidden_size, columns);
    kernels->add_rows(*plan, num_rows, hidden_size, columns, rows, row_weights, y);
  });
  return 0;
}

extern "C" int moesaic_packed_linear(const moesaic_packed_layer* layers, int64_t num_layers, const float* x,
                                     int64_t num_tokens, int threads, const char* instruction_set,
                                     float* const* ys) try {
  const PackedKernels* kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const int64_t K = layers[0].weight.columns;
  int64_t outputs = 0, rounded_bytes = 0, rounded_at[2] = {-1, -1};  // for groups of 32 and of 64
  for (int64_t i = 0; i < num_layers; ++i) {
    const moesaic_packed& w = layers[i].weight;
    if (!known_format(w) || w.columns != K) return -3;
    outputs += w.rows;
    int64_t& at = rounded_at[w.group_size == 64];
    if (at >= 0) continue;
    at = rounded_bytes;
    rounded_bytes += num_tokens * record_bytes(K, w.group_size);
  }
  const Records records(rounded_bytes);
  if (!records.get()) return -2;
  for (const int64_t group_size : {32, 64}) {
    const int64_t at = rounded_at[group_size == 64];
    if (at >= 0) round_rows(*kernels, x, num_tokens, K, group_size, threads, records.get() + at);
  }
  struct Piece {
    int64_t layer;
    ColumnRange columns;
  };
  std::vector<Piece> pieces;
  const int64_t width = columns_of_task(outputs, threads);
  for (int64_t i = 0; i < num_layers; ++i) {
    const int64_t rows = layers[i].weight.rows;
    for (int64_t first = 0; first < rows; first += width) pieces.push_back({i, {first, std::min(width, rows - first)}});
  }
  const Parts chunks(num_tokens, most_packed_rows);
  const auto product = [&](int64_t index, float* scratch) {
    const int64_t chunk = index % chunks.number;
    const Piece& piece = pieces[size_t(index / chunks.number)];
    const moesaic_packed_layer& layer = layers[piece.layer];
    const RowRange tokens{0, chunks.start(chunk), chunks.size(chunk)};
    const uint8_t* const rounded = records.get() + rounded_at[layer.weight.group_size == 64];
    kernels->linear(layer.weight, layer.bias, tokens, piece.columns, rounded, ys[piece.layer], scratch);
  };
  return parallel_with_scratch(threads, chunks.number * int64_t(pieces.size()), kernels->scratch_size, product) ? 0 : -2;
} catch (const std::bad_alloc&) {
  return -2;
}

extern "C" int moesaic_pack(const moesaic_packing* packing, int threads, const char* instruction_set, uint8_t* data) {
  const PackedKernels* kernels = usable_kernels().named(instruction_set);
  if (!kernels) return -1;
  const moesaic_packed format{packing->rows, packing->columns, packing->group_size, packing->bits, packing->table, data};
  if (!known_format(format)) return -3;
  const int64_t bytes = panel_bytes(format);
  std::atomic<bool> finite{true};
  parallel(threads, divide_up(packing->rows, panel_outputs), [&](int64_t panel, int) {
    if (!kernels->pack_panel(*packing, panel, data + panel * bytes)) finite = false;
  });
  return finite ? 0 : -4;
}
