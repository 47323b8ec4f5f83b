// A block in one call. To be built with sanitizers: every array has exactly its size. The first argument seeds the random
// sizes and numbers. Prints what is wrong and exits with 1.
#include <cmath>
#include <string>
#include <vector>

#include "block.h"
#include "packed_matrices.h"
#include "random_sequences.h"

namespace {

// Everything that a block gives.
struct Given {
  std::vector<float> y, logits, weights, keys, values;
  std::vector<int64_t> expert_ids;

  bool operator==(const Given& other) const {
    return y == other.y && logits == other.logits && weights == other.weights && keys == other.keys &&
           values == other.values && expert_ids == other.expert_ids;
  }
};

template <class Number>
std::vector<Number> rows_of(const std::vector<Number>& all, int64_t width, const std::vector<int64_t>& rows) {
  std::vector<Number> some;
  for (const int64_t row : rows) some.insert(some.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
  return some;
}

// What a block reads, on arrays of exactly their sizes.
struct Sample {
  const Sequences sequences{3};
  const int64_t T = sequences.num_tokens, G = 1 + below(2), H = G * (1 + below(3));
  const int64_t d = 2 * (1 + below(20)), D = 1 + below(150), F = 1 + below(90), E = 1 + below(6), K = 1 + below(E);
  const Packed query{1, H * d, D}, key{1, G * d, D}, value{1, G * d, D}, output{1, D, H * d};
  const Packed gate_up{E, 2 * F, D}, down{E, D, F};
  const std::vector<float> norm = numbers(D), bias = numbers(H * d), router = numbers(E * D), x = numbers(T * D);
  const std::vector<float> cosine = numbers(T * d), sine = numbers(T * d);
  const std::vector<float> keys = sequences.pool(G, d, true), values = sequences.pool(G, d, false);

  // With room for what it gives of the tokens that are kept, all of them if that is NULL.
  moesaic_block_step block(const std::vector<int64_t>* kept) const {
    moesaic_block_step block{};
    block.kept = kept ? kept->data() : nullptr, block.num_kept = kept ? int64_t(kept->size()) : -1;
    block.attention_norm = block.feed_forward_norm = norm.data(), block.norm_eps = 1e-6f, block.residual = 0.5f;
    block.query = {query.view(), bias.data()}, block.key = {key.view(), nullptr};
    block.value = {value.view(), nullptr}, block.output = {output.view(), nullptr};
    moesaic_attention_step& attention = block.attention;
    sequences.describe_to(attention);
    attention.num_heads = H, attention.num_key_value_heads = G, attention.head_dim = attention.rotary_dim = d;
    attention.cosine = cosine.data(), attention.sine = sine.data(), attention.scale = 0.2f;
    block.router.hidden_size = D, block.router.num_experts = E, block.router.top_k = K;
    block.router.scaling = 1, block.router.weight = router.data();
    block.experts.num_experts = E, block.experts.hidden_size = D, block.experts.intermediate_size = F;
    block.experts.gate_up = gate_up.view(), block.experts.down = down.view();
    return block;
  }

  Given room(int64_t R) const {
    const size_t N = size_t(R * K);
    return {std::vector<float>(size_t(R * D)), std::vector<float>(size_t(R * E)), std::vector<float>(N), keys, values,
            std::vector<int64_t>(N)};
  }
};

Given in_one_call(const Sample& sample, int threads, const std::vector<int64_t>* kept) {
  moesaic_block_step block = sample.block(kept);
  Given given = sample.room(kept ? block.num_kept : sample.T);
  block.attention.keys = given.keys.data(), block.attention.values = given.values.data();
  expect(moesaic_block(&block, sample.x.data(), threads, given.y.data(), given.logits.data(), given.expert_ids.data(),
                       given.weights.data()) == 0, "block");
  return given;
}

Given in_steps(const Sample& sample, int threads, const std::vector<int64_t>* kept) {
  moesaic_block_step block = sample.block(kept);
  const int64_t R = kept ? block.num_kept : sample.T;
  Given given = sample.room(R);
  block.attention.keys = given.keys.data(), block.attention.values = given.values.data();
  const int64_t D = sample.D, E = sample.E, N = R * sample.K;
  std::vector<float> normed(size_t(R * D)), update(size_t(R * D)), rows(size_t(N * D));
  std::vector<int32_t> plan(size_t(moesaic_plan_size(R, N, E)));
  expect(moesaic_block_attend(&block, sample.x.data(), threads, given.y.data(), normed.data()) == 0, "attend");
  expect(moesaic_block_route(&block, normed.data(), threads, given.logits.data(), given.expert_ids.data(),
                             given.weights.data(), plan.data()) == 0, "route");
  moesaic_packed_experts experts = block.experts;
  experts.num_tokens = R, experts.num_rows = N, experts.x = normed.data();
  experts.plan = moesaic_plan_view(plan.data(), R, N, E);
  expect(moesaic_packed_experts_rows(&experts, threads, "", rows.data()) == 0, "rows");
  expect(moesaic_block_finish(&block, plan.data(), rows.data(), given.weights.data(), threads, update.data(),
                              given.y.data()) == 0, "finish");
  return given;
}

// Its parts are tested by themselves: here, that it stays within its arrays, does not depend on threads, and is the same in
// steps.
void test_block() {
  const Sample sample;
  Given given = in_one_call(sample, 1, nullptr);
  for (const float each : given.y) expect(std::isfinite(each), "block: not finite");
  for (const int64_t id : given.expert_ids) expect(id >= 0 && id < sample.E, "block: no such expert");
  const auto comparable = [](Given some) {
    some.keys = without_nan(some.keys), some.values = without_nan(some.values);
    return some;
  };
  given = comparable(given);
  expect(comparable(in_one_call(sample, 3, nullptr)) == given, "block: the number of threads changes it");
  for (const int threads : {1, 3}) expect(comparable(in_steps(sample, threads, nullptr)) == given, "block in steps");

  std::vector<int64_t> kept(size_t(below(sample.T + 1)));
  for (int64_t& token : kept) token = below(sample.T);
  const Given some = {rows_of(given.y, sample.D, kept), rows_of(given.logits, sample.E, kept),
                      rows_of(given.weights, sample.K, kept), given.keys, given.values,
                      rows_of(given.expert_ids, sample.K, kept)};
  for (const int threads : {1, 3}) {
    expect(comparable(in_one_call(sample, threads, &kept)) == some, "block of kept tokens");
    expect(comparable(in_steps(sample, threads, &kept)) == some, "block of kept tokens in steps");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  for (int64_t i = arguments.get(2, 40); i > 0; --i) test_block();
  return verdict();
}
