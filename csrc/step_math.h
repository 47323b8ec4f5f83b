// The operators of step.h in terms of `Vector`, for one thread. Internal linkage: each instruction set compiles it anew.
// The including file hands out step_kernels.
#pragma once

#include "attention_math.h"

namespace {

float root_mean_square(const float* x, int64_t size, float eps) {
  return sqrtf(dot(x, x, size) / float(size) + eps);
}

// y = x / rms * weight.
void divide_by(float rms, const float* x, const float* weight, int64_t size, float* y) {
  const Vector factor = Vector::fill(1.0f / rms);
  for_each_vector(size, [&](int64_t j, int some) {
    const Vector normed = load(x + j, some) * factor;
    store(weight ? normed * load(weight + j, some) : normed, y + j, some);
  });
}

void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  divide_by(root_mean_square(x, size, eps), x, weight, size, y);
}

// Turns x (d) by its position; the dimensions from rotary_dim on pass.
void rotate(const moesaic_attention_step& step, const float* cosine, const float* sine, float* x) {
  const int64_t r = step.rotary_dim, half = r / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t a = step.interleaved ? 2 * i : i, b = step.interleaved ? 2 * i + 1 : i + half;
    const float first = x[a], second = x[b];
    x[a] = first * cosine[a] - second * sine[a];
    x[b] = second * cosine[b] + first * sine[b];
  }
}

// One projected head (d), which is part of a token's row over all heads, with its root mean square where that is needed:
// normalised and rotated into `to`.
void place_head(const moesaic_attention_step& step, const float* row, float row_rms, int64_t head, const float* norm,
                int64_t token, float* to) {
  const int64_t d = step.head_dim;
  const float* const from = row + head * d;
  if (step.qk_norm == MOESAIC_QK_NORM_HEAD) {
    divide_by(root_mean_square(from, d, step.norm_eps), from, norm, d, to);
  } else if (step.qk_norm == MOESAIC_QK_NORM_WIDTH) {
    divide_by(row_rms, from, norm + head * d, d, to);
  } else {
    copy_floats(from, d, to);
  }
  if (step.rotary_dim) rotate(step, step.cosine + token * step.rotary_dim, step.sine + token * step.rotary_dim, to);
}

// Tokens first .. last - 1 of one sequence, all in one of its blocks.
void place_in_block(const moesaic_attention_step& step, int64_t sequence, int64_t first, int64_t last, float* queries) {
  const int64_t d = step.head_dim, H = step.num_heads, G = step.num_key_value_heads, shared_by = H / G;
  const int64_t first_slot = step.num_keys[sequence] - (step.first_tokens[sequence + 1] - first);
  float query_rms[block_tokens], key_rms[block_tokens];
  for (int64_t i = 0; i < last - first && step.qk_norm == MOESAIC_QK_NORM_WIDTH; ++i) {
    query_rms[i] = root_mean_square(step.query + (first + i) * H * d, H * d, step.norm_eps);
    key_rms[i] = root_mean_square(step.key + (first + i) * G * d, G * d, step.norm_eps);
  }
  for (int64_t g = 0; g < G; ++g) {
    float* const keys = blocks_of(step, step.keys, sequence, g).at(first_slot / block_tokens);
    float* const values = blocks_of(step, step.values, sequence, g).at(first_slot / block_tokens);
    for (int64_t i = 0; i < last - first; ++i) {
      const int64_t token = first + i, slot = (first_slot + i) % block_tokens;
      float* const placed = queries + (token * H + g * shared_by) * d;  // of the key first, then of the queries
      place_head(step, step.key + token * G * d, key_rms[i], g, step.key_norm, token, placed);
      for (int64_t j = 0; j < d; ++j) keys[j * block_tokens + slot] = placed[j];
      copy_floats(step.value + (token * G + g) * d, d, values + slot * d);
      for (int64_t h = 0; h < shared_by; ++h) {
        place_head(step, step.query + token * H * d, query_rms[i], g * shared_by + h, step.query_norm, token,
                   placed + h * d);
      }
    }
  }
}

void place(const moesaic_attention_step& step, int64_t first, int64_t last, float* queries) {
  for (int64_t b = 0; b < step.num_sequences; ++b) {
    const int64_t end = smaller(last, step.first_tokens[b + 1]);
    int64_t token = larger(first, step.first_tokens[b]);
    while (token < end) {
      const int64_t slot = step.num_keys[b] - (step.first_tokens[b + 1] - token);
      const int64_t some = smaller<int64_t>(block_tokens - slot % block_tokens, end - token);
      place_in_block(step, b, token, token + some, queries);
      token += some;
    }
  }
}

// The first of values (E) that is not among the k taken.
int64_t first_left(const int64_t* taken, int64_t k, int64_t E) {
  for (int64_t e = 0; e < E; ++e) {
    int64_t i = 0;
    while (i < k && taken[i] != e) ++i;
    if (i == k) return e;
  }
  return E;
}

// The K highest of values (E), K at most E, the first of equal ones, in descending order; NaN counts as infinity. These
// become -infinity. `values` has room for whole vectors.
void take_highest(float* values, int64_t E, int64_t K, int64_t* ids) {
  const int64_t padded = round_up(E, Vector::width);
  for (int64_t e = 0; e < E; ++e) values[e] = values[e] == values[e] ? values[e] : INFINITY;
  for (int64_t e = E; e < padded; ++e) values[e] = -INFINITY;
  for (int64_t k = 0; k < K; ++k) {
    Vector highest = Vector::load(values);
    for (int64_t e = Vector::width; e < padded; e += Vector::width) highest = at_least(highest, Vector::load(values + e));
    const float most = highest.largest();
    int64_t start = 0;
    int lane = Vector::load(values).find(most);
    while (lane == Vector::width) lane = Vector::load(values + (start += Vector::width)).find(most);
    ids[k] = most > -INFINITY ? start + lane : first_left(ids, k, E);
    values[ids[k]] = -INFINITY;
  }
}

// Each row of the weight is read once for all tokens, so these should be few enough to stay in the cache.
void router_logits(const moesaic_router_step& step, int64_t first, int64_t last, int64_t first_expert,
                   int64_t last_expert, float* logits) {
  const int64_t D = step.hidden_size, E = step.num_experts;
  for (int64_t e = first_expert; e < last_expert; ++e) {
    for (int64_t t = first; t < last; ++t) {
      logits[t * E + e] = dot(step.x + t * D, step.weight + e * D, D) + (step.bias ? step.bias[e] : 0.0f);
    }
  }
}

void choose(const moesaic_router_step& step, int64_t first, int64_t last, const float* all_logits, float* selection,
            int64_t* all_ids, float* all_weights) {
  const int64_t E = step.num_experts, K = step.top_k;
  for (int64_t t = first; t < last; ++t) {
    const float* const logits = all_logits + t * E;
    float* const weights = all_weights + t * K;
    copy_floats(logits, E, selection);
    float scale = 1.0f;
    const float most = largest_of(logits, E, -INFINITY);
    if (step.scores == MOESAIC_SOFTMAX) {
      scale = 1.0f / exponentials(selection, E, most);
    } else {
      for_each_vector(E, [&](int64_t j, int some) { store(sigmoid(load(selection + j, some)), selection + j, some); });
    }
    const auto score = [&](int64_t e) {
      return step.scores == MOESAIC_SOFTMAX ? expf(logits[e] - most) * scale : 1.0f / (1.0f + expf(-logits[e]));
    };
    for (int64_t e = 0; e < E; ++e) {
      selection[e] = selection[e] * scale + (step.selection_bias ? step.selection_bias[e] : 0.0f);
    }
    take_highest(selection, E, K, all_ids + t * K);
    float sum = 0.0f;
    for (int64_t k = 0; k < K; ++k) sum += weights[k] = score(all_ids[t * K + k]);
    const float factor = step.scaling / (step.normalise ? (sum > step.least_sum ? sum : step.least_sum) : 1.0f);
    for (int64_t k = 0; k < K; ++k) weights[k] *= factor;
  }
}

void top_k(const float* values, int64_t first, int64_t last, int64_t size, int64_t k, float* scratch, int64_t* ids) {
  for (int64_t i = first; i < last; ++i) {
    copy_floats(values + i * size, size, scratch);
    take_highest(scratch, size, k, ids + i * k);
  }
}

constexpr StepKernels step_kernels{rms_norm, place, attend, router_logits, choose, top_k};

}  // namespace
