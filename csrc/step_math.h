// The operators of step.h in terms of `Vector`, for one thread. Internal linkage: each instruction set compiles it anew.
// The including file hands out step_kernels.
#pragma once

#include <math.h>

#include "gated_activation.h"
#include "step_kernels.h"
#include "vector_math.h"

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

void rms_of_rows(const moesaic_attention_step& step, int64_t first, int64_t last, float* rms) {
  const int64_t query_width = step.num_heads * step.head_dim, key_width = step.num_key_value_heads * step.head_dim;
  for (int64_t t = first; t < last; ++t) {
    rms[2 * t] = root_mean_square(step.query + t * query_width, query_width, step.norm_eps);
    rms[2 * t + 1] = root_mean_square(step.key + t * key_width, key_width, step.norm_eps);
  }
}

// One projected head (d), which is part of a token's row over all heads, with its root mean square where that is needed:
// normalised and rotated into `to`.
void place_head(const moesaic_attention_step& step, const float* row, const float* row_rms, int64_t head,
                const float* norm, int64_t token, float* to) {
  const int64_t d = step.head_dim;
  const float* const from = row + head * d;
  if (step.qk_norm == MOESAIC_QK_NORM_HEAD) {
    divide_by(root_mean_square(from, d, step.norm_eps), from, norm, d, to);
  } else if (step.qk_norm == MOESAIC_QK_NORM_WIDTH) {
    divide_by(*row_rms, from, norm + head * d, d, to);
  } else {
    copy_floats(from, d, to);
  }
  if (step.rotary_dim) rotate(step, step.cosine + token * step.rotary_dim, step.sine + token * step.rotary_dim, to);
}

// scores (S) = scale * keys (S, d) times query (d), -infinity where the mask hides a key.
void score_keys(const moesaic_attention_step& step, const float* query, const float* keys, const uint8_t* mask,
                float* scores) {
  const int64_t d = step.head_dim, S = step.num_keys;
  int64_t s = 0;
  if (d % Vector::width == 0) {
    for (; s + 4 <= S; s += 4) {  // four at a time: one sum alone waits for itself
      Vector sums[4] = {Vector::fill(0.0f), Vector::fill(0.0f), Vector::fill(0.0f), Vector::fill(0.0f)};
      for (int64_t j = 0; j < d; j += Vector::width) {
        const Vector part = Vector::load(query + j);
        for (int k = 0; k < 4; ++k) sums[k] = multiply_add(part, Vector::load(keys + (s + k) * d + j), sums[k]);
      }
      for (int k = 0; k < 4; ++k) scores[s + k] = sums[k].sum();
    }
  }
  for (; s < S; ++s) scores[s] = dot(query, keys + s * d, d);
  for (s = 0; s < S; ++s) scores[s] = mask[s] ? scores[s] * step.scale : -INFINITY;
}

float largest_of(const float* x, int64_t count, float most) {
  for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x (count) = exp(x - most); returns their sum. What is below e to the -87th of the largest counts
// as nothing, and so does a hidden key, which is -infinity.
float exponentials(float* x, int64_t count, float most) {
  const Vector shift = Vector::fill(most), least = Vector::fill(-87.0f);
  for_each_vector(count, [&](int64_t j, int some) {
    const Vector shifted = load(x + j, some) - shift;
    store(where_at_most(least, shifted, exponential(at_least(shifted, least))), x + j, some);
  });
  Vector sums = Vector::fill(0.0f);
  for_each_vector(count, [&](int64_t j, int some) { sums = sums + load(x + j, some); });
  return sums.sum();
}

// y (d) = sum over keys of weight (S) times values (S, d).
void weigh_values(const float* weights, const float* values, int64_t S, int64_t d, float* y) {
  constexpr int vectors = 8;
  for (int64_t start = 0; start < d; start += vectors * Vector::width) {
    const int64_t width = smaller<int64_t>(vectors * Vector::width, d - start);
    if (width < vectors * Vector::width) {
      for_each_vector(width, [&](int64_t j, int some) {
        Vector sum = Vector::fill(0.0f);
        for (int64_t s = 0; s < S; ++s) {
          sum = multiply_add(Vector::fill(weights[s]), load(values + s * d + start + j, some), sum);
        }
        store(sum, y + start + j, some);
      });
      return;
    }
    Vector sums[vectors];
    for (Vector& sum : sums) sum = Vector::fill(0.0f);
    for (int64_t s = 0; s < S; ++s) {
      const Vector weight = Vector::fill(weights[s]);
      for (int v = 0; v < vectors; ++v) {
        sums[v] = multiply_add(weight, Vector::load(values + s * d + start + v * Vector::width), sums[v]);
      }
    }
    for (int v = 0; v < vectors; ++v) sums[v].store(y + start + v * Vector::width);
  }
}

void attend(const moesaic_attention_step& step, int64_t b, int64_t g, const float* rms, float* scratch, float* y) {
  const int64_t d = step.head_dim, L = step.num_new, S = step.num_keys;
  const int64_t H = step.num_heads, G = step.num_key_value_heads, shared_by = H / G;
  float* const keys = step.keys + (b * G + g) * step.cache_capacity * d;
  float* const values = step.values + (b * G + g) * step.cache_capacity * d;
  for (int64_t l = 0; l < L; ++l) {
    const int64_t token = b * L + l, slot = S - L + l;
    place_head(step, step.key + token * G * d, rms + 2 * token + 1, g, step.key_norm, token, keys + slot * d);
    copy_floats(step.value + (token * G + g) * d, d, values + slot * d);
  }
  float* const query = scratch;
  float* const scores = query + d;
  for (int64_t l = 0; l < L; ++l) {
    const int64_t token = b * L + l;
    const uint8_t* const mask = step.mask + b * step.mask_stride + l * S;
    for (int64_t h = g * shared_by; h < (g + 1) * shared_by; ++h) {
      place_head(step, step.query + token * H * d, rms + 2 * token, h, step.query_norm, token, query);
      score_keys(step, query, keys, mask, scores);
      const float most = largest_of(scores, S, step.sinks ? step.sinks[h] : -INFINITY);
      float sum = exponentials(scores, S, most);
      if (step.sinks) sum += expf(step.sinks[h] - most);
      float* const out = y + (token * H + h) * d;
      weigh_values(scores, values, S, d, out);
      const Vector share = Vector::fill(1.0f / sum);
      for_each_vector(d, [&](int64_t j, int some) { store(load(out + j, some) * share, out + j, some); });
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

void route(const moesaic_router_step& step, int64_t first, int64_t last, float* selection, float* all_logits,
           int64_t* all_ids, float* all_weights) {
  const int64_t D = step.hidden_size, E = step.num_experts, K = step.top_k;
  for (int64_t t = first; t < last; ++t) {
    float *const logits = all_logits + t * E, *const weights = all_weights + t * K;
    for (int64_t e = 0; e < E; ++e) {
      logits[e] = dot(step.x + t * D, step.weight + e * D, D) + (step.bias ? step.bias[e] : 0.0f);
    }
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

constexpr StepKernels step_kernels{rms_norm, rms_of_rows, attend, route, top_k};

}  // namespace
