// A block in one call. To be built with sanitizers: every array has exactly its size. The first argument seeds the random
// sizes and numbers. Prints what is wrong and exits with 1.
#include <string>
#include <vector>

#include "block.h"
#include "packed_matrices.h"

namespace {

std::vector<float> in_steps(const moesaic_block_step& block, const std::vector<float>& x, int threads) {
  const int64_t T = block.attention.batch_size * block.attention.num_new, D = block.router.hidden_size;
  const int64_t E = block.router.num_experts, N = T * block.router.top_k;
  std::vector<float> y(x.size()), normed(x.size()), update(x.size());
  std::vector<float> logits(size_t(T * E)), weights(static_cast<size_t>(N)), rows(size_t(N * D));
  std::vector<int64_t> expert_ids(static_cast<size_t>(N));
  std::vector<int32_t> plan(size_t(moesaic_plan_size(T, N, E)));
  expect(moesaic_block_attend(&block, x.data(), threads, y.data(), normed.data()) == 0, "attend");
  expect(moesaic_block_route(&block, normed.data(), threads, logits.data(), expert_ids.data(), weights.data(),
                             plan.data()) == 0, "route");
  moesaic_packed_experts experts = block.experts;
  experts.num_tokens = T, experts.num_rows = N, experts.x = normed.data();
  experts.plan = moesaic_plan_view(plan.data(), T, N, E);
  expect(moesaic_packed_experts_rows(&experts, threads, "", rows.data()) == 0, "rows");
  expect(moesaic_block_finish(&block, plan.data(), rows.data(), weights.data(), threads, update.data(), y.data()) == 0,
         "finish");
  return y;
}

// Its parts are tested by themselves: here, that it stays within its arrays, does not depend on threads, and is the same in
// steps.
void test_block() {
  const int64_t B = 1 + below(3), L = 1 + below(3), S = L + below(40), G = 1 + below(2), H = G * (1 + below(3));
  const int64_t d = 2 * (1 + below(20)), D = 1 + below(150), F = 1 + below(90), E = 1 + below(6);
  const Packed query(1, H * d, D), key(1, G * d, D), value(1, G * d, D), output(1, D, H * d);
  const Packed gate_up(E, 2 * F, D), down(E, D, F);
  const auto norm = numbers(D), bias = numbers(H * d), router = numbers(E * D), x = numbers(B * L * D);
  const auto cosine = numbers(B * L * d), sine = numbers(B * L * d), cache = numbers(B * G * S * d);
  const std::vector<uint8_t> mask(static_cast<size_t>(L * S), 1);
  moesaic_block_step block{};
  block.attention_norm = block.feed_forward_norm = norm.data(), block.norm_eps = 1e-6f, block.residual = 0.5f;
  block.query = {query.view(), bias.data()}, block.key = {key.view(), nullptr};
  block.value = {value.view(), nullptr}, block.output = {output.view(), nullptr};
  moesaic_attention_step& attention = block.attention;
  attention.batch_size = B, attention.num_new = L, attention.num_keys = attention.cache_capacity = S;
  attention.num_heads = H, attention.num_key_value_heads = G, attention.head_dim = attention.rotary_dim = d;
  attention.cosine = cosine.data(), attention.sine = sine.data(), attention.mask = mask.data(), attention.scale = 0.2f;
  block.router.hidden_size = D, block.router.num_experts = E, block.router.top_k = 1 + below(E);
  block.router.scaling = 1, block.router.weight = router.data();
  block.experts.num_experts = E, block.experts.hidden_size = D, block.experts.intermediate_size = F;
  block.experts.gate_up = gate_up.view(), block.experts.down = down.view();
  std::vector<float> results[2];
  for (int i = 0; i < 2; ++i) {
    std::vector<float> keys = cache, values = cache;
    attention.keys = keys.data(), attention.values = values.data();
    results[i].resize(x.size());
    expect(moesaic_block(&block, x.data(), i ? 3 : 1, results[i].data()) == 0, "block");
    expect(in_steps(block, x, i ? 1 : 3) == results[i], "block in steps");
  }
  expect(results[0] == results[1], "block: the number of threads changes it");
  for (const float each : results[0]) expect(std::isfinite(each), "block: not finite");
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  for (int64_t i = arguments.get(2, 40); i > 0; --i) test_block();
  return verdict();
}
