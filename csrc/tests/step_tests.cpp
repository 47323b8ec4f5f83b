// The small operators of every instruction set on arrays of exactly their sizes, to be built with sanitizers. Their numbers
// are held against torch elsewhere; here all instruction sets and numbers of threads must agree. The first argument seeds
// the random sizes and numbers. Prints what is wrong and exits with 1.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "random_sequences.h"
#include "random_tests.h"
#include "step.h"

namespace {

using Results = std::vector<std::vector<float>>;

// Calls compute(instruction set, threads) for all that this machine runs and compares what it returns; no results mean
// that the set is missing.
template <class Compute>
void agree(const std::string& what, double tolerance, const Compute& compute) {
  const Results expected = compute("portable", 1);
  for (const char* set : {"avx512f", "avx2", "portable"}) {
    const Results alone = compute(set, 1);
    if (alone.empty()) continue;
    bool close = true;
    for (size_t i = 0; i < expected.size(); ++i) {
      for (size_t j = 0; j < expected[i].size(); ++j) {
        close &= std::abs(double(alone[i][j]) - expected[i][j]) <= tolerance * (1 + std::abs(expected[i][j]));
      }
    }
    expect(close, what + " with " + set + ": other numbers");
    expect(compute(set, 3) == alone, what + " with " + set + ": the threads decide");
  }
}

void test_rms_norm() {
  const int64_t rows = below(2000), size = 1 + below(200);
  const std::vector<float> x = numbers(rows * size), weight = numbers(size);
  const bool weighted = below(2);
  agree("rms_norm", 1e-5, [&](const char* set, int threads) -> Results {
    std::vector<float> y(x.size());
    if (moesaic_rms_norm(x.data(), weighted ? weight.data() : nullptr, rows, size, 1e-5f, threads, set, y.data())) return {};
    return {y};
  });
}

// NaN stands wherever no sequence has written: a result that has one has read it.
void test_attend() {
  moesaic_attention_step step{};
  const Sequences sequences(4);
  sequences.describe_to(step);
  const int64_t T = sequences.num_tokens, G = 1 + below(3), H = G * (1 + below(3)), d = 1 + below(below(4) ? 40 : 150);
  step.num_heads = H, step.num_key_value_heads = G, step.head_dim = d, step.scale = 0.2f, step.norm_eps = 1e-6f;
  step.qk_norm = int32_t(below(3)), step.interleaved = int32_t(below(2)), step.rotary_dim = 2 * below(d / 2 + 1);
  const bool by_width = step.qk_norm == MOESAIC_QK_NORM_WIDTH;
  const auto query = numbers(T * H * d), key = numbers(T * G * d), value = numbers(T * G * d);
  const auto query_norm = numbers(by_width ? H * d : d), key_norm = numbers(by_width ? G * d : d);
  const auto cosine = numbers(T * step.rotary_dim), sine = numbers(T * step.rotary_dim), sinks = numbers(H);
  const auto keys = sequences.pool(G, d, true), values = sequences.pool(G, d, false);
  step.query = query.data(), step.key = key.data(), step.value = value.data();
  step.query_norm = query_norm.data(), step.key_norm = key_norm.data();
  step.cosine = cosine.data(), step.sine = sine.data();
  step.sinks = below(2) ? sinks.data() : nullptr;
  agree("attend", 1e-4, [&](const char* set, int threads) -> Results {
    std::vector<float> cached_keys = keys, cached_values = values, y(query.size());
    step.keys = cached_keys.data(), step.values = cached_values.data();
    if (moesaic_attend(&step, threads, set, y.data())) return {};
    return {y, without_nan(cached_keys), without_nan(cached_values)};
  });
}

void test_route() {
  moesaic_router_step step{};
  const int64_t T = below(20), D = 1 + below(600), E = 1 + below(100), K = 1 + below(E);
  const auto x = numbers(T * D), weight = numbers(E * D), bias = numbers(E);
  step.num_tokens = T, step.hidden_size = D, step.num_experts = E, step.top_k = K;
  step.scores = int32_t(below(2)), step.normalise = int32_t(below(2)), step.least_sum = 1e-9f, step.scaling = 2.0f;
  step.x = x.data(), step.weight = weight.data();
  step.bias = below(2) ? bias.data() : nullptr, step.selection_bias = below(2) ? bias.data() : nullptr;
  agree("route", 1e-3, [&](const char* set, int threads) -> Results {
    std::vector<float> logits(static_cast<size_t>(T * E)), weights(static_cast<size_t>(T * K));
    std::vector<int64_t> ids(weights.size());
    if (moesaic_route(&step, threads, set, logits.data(), ids.data(), weights.data())) return {};
    for (const int64_t id : ids) failures += id < 0 || id >= E;
    return {logits};  // near ties may order the experts otherwise
  });
}

void test_top_k() {
  const int64_t rows = below(300), size = 1 + below(200), k = 1 + below(std::min<int64_t>(size, 9));
  const auto values = numbers(rows * size);
  agree("top_k", 0, [&](const char* set, int threads) -> Results {
    std::vector<int64_t> ids(static_cast<size_t>(rows * k));
    if (moesaic_top_k(values.data(), rows, size, k, threads, set, ids.data())) return {};
    std::vector<float> highest(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) highest[i] = values[i / size_t(k) * size_t(size) + size_t(ids[i])];
    return {highest};
  });
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  for (int64_t i = arguments.get(2, 20); i > 0; --i) {
    test_rms_norm();
    test_attend();
    test_route();
    test_top_k();
  }
  return verdict();
}
