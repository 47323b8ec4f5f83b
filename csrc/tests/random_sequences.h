// Sequences of random lengths whose blocks lie anywhere, for tests of attention. Every array has exactly its size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "random_tests.h"
#include "step.h"

namespace {

struct Sequences {
  std::vector<int64_t> first_tokens{0}, num_keys, block_tables, first_keys;
  int64_t num_tokens = 0, num_blocks = 0, table_size = 0;
  bool windows = below(2);

  // Of up to `most`, whose new tokens are mostly few and sometimes more than a block holds.
  explicit Sequences(int64_t most) {
    const int64_t count = 1 + below(most);
    std::vector<int64_t> pasts;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t added = below(6) ? below(5) : below(70);  // none, too
      pasts.push_back(below(4) ? below(100) : below(2) * MOESAIC_BLOCK_TOKENS);
      for (int64_t i = 0; i < added; ++i) first_keys.push_back(below(pasts.back() + i + 1));
      num_keys.push_back(pasts.back() + added);
      first_tokens.push_back(num_tokens += added);
      table_size = std::max(table_size, blocks_of_tokens(num_keys.back()) + below(2));
    }
    make_tables(pasts);
  }

  void describe_to(moesaic_attention_step& step) const {
    step.num_tokens = num_tokens, step.num_sequences = int64_t(num_keys.size());
    step.first_tokens = first_tokens.data(), step.num_keys = num_keys.data();
    step.block_tables = block_tables.data(), step.table_size = table_size;
    step.first_keys = windows ? first_keys.data() : nullptr;
  }

  // (blocks, ..., size of a token), tokens before or after the heads' dimensions: NaN where nothing has been written that
  // a sequence holds.
  std::vector<float> pool(int64_t heads, int64_t head_dim, bool tokens_last) const {
    std::vector<float> floats(size_t(num_blocks * heads * head_dim * MOESAIC_BLOCK_TOKENS), std::nanf(""));
    for (size_t b = 0; b < num_keys.size(); ++b) {
      const int64_t past = num_keys[b] - (first_tokens[b + 1] - first_tokens[b]);
      for (int64_t s = 0; s < past; ++s) {
        const int64_t block = block_tables[b * size_t(table_size) + size_t(s / MOESAIC_BLOCK_TOKENS)];
        const int64_t slot = s % MOESAIC_BLOCK_TOKENS;
        for (int64_t g = 0; g < heads; ++g) {
          float* const start = floats.data() + (block * heads + g) * head_dim * MOESAIC_BLOCK_TOKENS;
          for (int64_t j = 0; j < head_dim; ++j) {
            start[tokens_last ? j * MOESAIC_BLOCK_TOKENS + slot : slot * head_dim + j] = float(normal(1));
          }
        }
      }
    }
    return floats;
  }

 private:
  static int64_t blocks_of_tokens(int64_t tokens) { return (tokens + MOESAIC_BLOCK_TOKENS - 1) / MOESAIC_BLOCK_TOKENS; }

  // Blocks in any order, some of nobody; a sequence may share those that were full before with the one before it. What a
  // table holds beyond them is no block at all.
  void make_tables(const std::vector<int64_t>& pasts) {
    block_tables.assign(pasts.size() * size_t(table_size), std::numeric_limits<int64_t>::max() / 2);
    std::vector<int64_t*> places;
    for (size_t b = 0; b < pasts.size(); ++b) {
      const int64_t both = b ? std::min(pasts[b], pasts[b - 1]) / MOESAIC_BLOCK_TOKENS : 0, shared = below(2) * both;
      for (int64_t i = shared; i < blocks_of_tokens(num_keys[b]); ++i) {
        places.push_back(block_tables.data() + b * size_t(table_size) + size_t(i));
      }
      shared_.push_back(shared);
    }
    std::vector<int64_t> numbers(places.size() + size_t(below(3)));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = int64_t(i);
    std::shuffle(numbers.begin(), numbers.end(), random_bits);
    for (size_t i = 0; i < places.size(); ++i) *places[i] = numbers[i];
    for (size_t b = 1; b < pasts.size(); ++b) {
      int64_t* const table = block_tables.data() + b * size_t(table_size);
      std::copy(table - table_size, table - table_size + shared_[b], table);
    }
    num_blocks = int64_t(numbers.size());
  }

  std::vector<int64_t> shared_;
};

// What may be compared: a number for each NaN.
std::vector<float> without_nan(std::vector<float> floats) {
  for (float& each : floats) each = std::isnan(each) ? -12345.0f : each;
  return floats;
}

}  // namespace
