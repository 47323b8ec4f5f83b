// Softmax attention over keys and values in blocks, in terms of `Vector`, for one thread; internal linkage, like step_math.h.
// What a row gets is summed up in an order that depends neither on the other rows nor on how they are cut into tiles.
#pragma once

#include <math.h>

#include "gated_activation.h"
#include "step_kernels.h"
#include "vector_math.h"

namespace {

constexpr int block_tokens = MOESAIC_BLOCK_TOKENS;
constexpr int vectors_of_block = block_tokens / Vector::width;
// What is summed up at the same time stays in registers, of which narrow instruction sets have half.
constexpr int most_sums = Vector::width == 16 ? 16 : 8;
constexpr int most_rows = most_sums / vectors_of_block;

// Where the keys or values of a sequence's block stand, for one head.
template <class Float>
struct Blocks {
  Float* data;
  const int64_t* table;
  int64_t heads, head, size;  // size: of a block of one head, in floats
  Float* at(int64_t block) const { return data + (table[block] * heads + head) * size; }
};

inline Blocks<float> blocks_of(const moesaic_attention_step& step, float* data, int64_t sequence, int64_t head) {
  return {data, step.block_tables + sequence * step.table_size, step.num_key_value_heads, head,
          step.head_dim * block_tokens};
}

// Rows of a tile: their queries and scores. Score s of a row is that of token first_block * block_tokens + s.
struct Rows {
  const float* queries[rows_of_tile];
  float* scores[rows_of_tile];
  float* outputs[rows_of_tile];
  float shares[rows_of_tile];  // of the sum of weights, 1
  int64_t first_block, end;    // they see tokens up to end - 1

  Rows from(int64_t row) const {
    Rows rest = *this;
    for (int64_t r = row; r < rows_of_tile; ++r) {
      rest.queries[r - row] = queries[r], rest.scores[r - row] = scores[r];
      rest.outputs[r - row] = outputs[r], rest.shares[r - row] = shares[r];
    }
    return rest;
  }
};

// scores = scale * queries times keys, for whole blocks.
template <int R>
void score_rows(const Rows& rows, const Blocks<float>& keys, int64_t d, float scale) {
  for (int64_t block = rows.first_block; block * block_tokens < rows.end; ++block) {
    const float* const of_block = keys.at(block);
    Vector sums[R][vectors_of_block];
    for (auto& of_row : sums) {
      for (Vector& sum : of_row) sum = Vector::fill(0.0f);
    }
    for (int64_t j = 0; j < d; ++j) {
      for (int v = 0; v < vectors_of_block; ++v) {
        const Vector some_keys = Vector::load(of_block + j * block_tokens + v * Vector::width);
        for (int r = 0; r < R; ++r) sums[r][v] = multiply_add(Vector::fill(rows.queries[r][j]), some_keys, sums[r][v]);
      }
    }
    const int64_t start = (block - rows.first_block) * block_tokens;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < vectors_of_block; ++v) {
        (sums[r][v] * Vector::fill(scale)).store(rows.scores[r] + start + v * Vector::width);
      }
    }
  }
}

// C vectors of the outputs, from j on, of which the last holds `some`: shares * scores times values.
template <int R, int C>
void weigh_vectors(const Rows& rows, const Blocks<float>& values, int64_t d, int64_t j, int some) {
  Vector sums[R][C];
  for (auto& of_row : sums) {
    for (Vector& sum : of_row) sum = Vector::fill(0.0f);
  }
  for (int64_t block = rows.first_block; block * block_tokens < rows.end; ++block) {
    const float* const of_block = values.at(block) + j;
    const int64_t start = (block - rows.first_block) * block_tokens;
    const int64_t count = smaller<int64_t>(block_tokens, rows.end - block * block_tokens);
    for (int64_t s = 0; s < count; ++s) {
      for (int c = 0; c < C; ++c) {
        const Vector value = load(of_block + s * d + c * Vector::width, c + 1 == C ? some : Vector::width);
        for (int r = 0; r < R; ++r) {
          sums[r][c] = multiply_add(Vector::fill(rows.scores[r][start + s]), value, sums[r][c]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      store(sums[r][c] * Vector::fill(rows.shares[r]), rows.outputs[r] + j + c * Vector::width,
            c + 1 == C ? some : Vector::width);
    }
  }
}

// All vectors of the outputs from j on, C at a time, then fewer.
template <int R, int C>
void weigh_from(const Rows& rows, const Blocks<float>& values, int64_t d, int64_t j) {
  for (; j + C * Vector::width <= d; j += C * Vector::width) {
    weigh_vectors<R, C>(rows, values, d, j, Vector::width);
  }
  if constexpr (C > 1) {
    weigh_from<R, C / 2>(rows, values, d, j);
  } else if (j < d) {
    weigh_vectors<R, 1>(rows, values, d, j, int(d - j));
  }
}

template <int R>
void weigh_values(const Rows& rows, const Blocks<float>& values, int64_t d) {
  weigh_from<R, most_sums / R>(rows, values, d, 0);
}

// Calls act.template run<R>(rows) for all rows, so many at a time as registers hold.
template <int R, class Act>
void some_at_a_time(const Rows& rows, int64_t count, const Act& act) {
  int64_t row = 0;
  for (; row + R <= count; row += R) act.template run<R>(rows.from(row));
  if constexpr (R > 1) {
    if (row < count) some_at_a_time<R / 2>(rows.from(row), count - row, act);
  }
}

struct ScoreRows {
  const Blocks<float>& keys;
  int64_t d;
  float scale;
  template <int R>
  void run(const Rows& rows) const {
    score_rows<R>(rows, keys, d, scale);
  }
};

struct WeighValues {
  const Blocks<float>& values;
  int64_t d;
  template <int R>
  void run(const Rows& rows) const {
    weigh_values<R>(rows, values, d);
  }
};

float largest_of(const float* x, int64_t count, float most) {
  for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x (count) = exp(x - most); returns their sum. What is below e to the -87th of the largest counts
// as nothing, and so does a hidden key, which is -infinity.
float exponentials(float* x, int64_t count, float most) {
  const Vector shift = Vector::fill(most), least = Vector::fill(-87.0f);
  Vector sums = Vector::fill(0.0f);
  for_each_vector(count, [&](int64_t j, int some) {
    const Vector shifted = load(x + j, some) - shift;
    store(where_at_most(least, shifted, exponential(at_least(shifted, least))), x + j, some);
    sums = sums + load(x + j, some);
  });
  return sums.sum();
}

void attend(const moesaic_attention_step& step, const AttentionTile& tile, const float* queries, float* scratch, float* y) {
  const int64_t d = step.head_dim, H = step.num_heads, shared_by = H / step.num_key_value_heads;
  const int64_t first_token = step.first_tokens[tile.sequence], count = tile.last_row - tile.first_row;
  const int64_t past = step.num_keys[tile.sequence] - (step.first_tokens[tile.sequence + 1] - first_token);
  int64_t ends[rows_of_tile], starts[rows_of_tile], heads[rows_of_tile];
  Rows rows;
  rows.first_block = INT64_MAX, rows.end = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t of_sequence = (tile.first_row + i) / shared_by, token = first_token + of_sequence;
    heads[i] = tile.head * shared_by + (tile.first_row + i) % shared_by;
    ends[i] = past + of_sequence + 1;
    starts[i] = step.first_keys ? step.first_keys[token] : 0;
    rows.first_block = smaller<int64_t>(rows.first_block, starts[i] / block_tokens);
    rows.end = larger(rows.end, ends[i]);
    rows.queries[i] = queries + (token * H + heads[i]) * d;
    rows.outputs[i] = y + (token * H + heads[i]) * d;
  }
  const int64_t offset = rows.first_block * block_tokens, width = round_up(rows.end - offset, block_tokens);
  for (int64_t i = 0; i < count; ++i) rows.scores[i] = scratch + i * width;

  some_at_a_time<most_rows>(rows, count, ScoreRows{blocks_of(step, step.keys, tile.sequence, tile.head), d, step.scale});
  for (int64_t i = 0; i < count; ++i) {
    float* const scores = rows.scores[i];
    for (int64_t s = 0; s < starts[i] - offset; ++s) scores[s] = -INFINITY;
    for (int64_t s = ends[i] - offset; s < width; ++s) scores[s] = -INFINITY;
    const float most = largest_of(scores, width, step.sinks ? step.sinks[heads[i]] : -INFINITY);
    float sum = exponentials(scores, width, most);
    if (step.sinks) sum += expf(step.sinks[heads[i]] - most);
    rows.shares[i] = 1.0f / sum;
  }
  some_at_a_time<most_rows>(rows, count, WeighValues{blocks_of(step, step.values, tile.sequence, tile.head), d});
}

}  // namespace
