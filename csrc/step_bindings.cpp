// The operators of step.h in the Python module moesaic._native.
#include "bindings.h"

namespace {

int rms_norm(uintptr_t x, uintptr_t weight, int64_t num_rows, int64_t size, float eps, int threads,
             const char* instruction_set, uintptr_t y) {
  nb::gil_scoped_release unlocked;
  return moesaic_rms_norm(at<const float>(x), at<const float>(weight), num_rows, size, eps, threads, instruction_set,
                          at<float>(y));
}

int attend(nb::tuple described, nb::tuple inputs, int threads, const char* instruction_set, uintptr_t y) {
  moesaic_attention_step step = attention_step(described);
  step.query = at<const float>(inputs[0]), step.key = at<const float>(inputs[1]), step.value = at<const float>(inputs[2]);
  nb::gil_scoped_release unlocked;
  return moesaic_attend(&step, threads, instruction_set, at<float>(y));
}

int route(nb::tuple described, int64_t num_tokens, uintptr_t x, int threads, const char* instruction_set,
          nb::tuple outputs) {
  moesaic_router_step step = router_step(described);
  step.num_tokens = num_tokens;
  step.x = at<const float>(x);
  auto* const logits = at<float>(outputs[0]);
  auto* const expert_ids = at<int64_t>(outputs[1]);
  auto* const weights = at<float>(outputs[2]);
  nb::gil_scoped_release unlocked;
  return moesaic_route(&step, threads, instruction_set, logits, expert_ids, weights);
}

int top_k(uintptr_t values, int64_t num_rows, int64_t size, int64_t k, int threads, const char* instruction_set,
          uintptr_t ids) {
  nb::gil_scoped_release unlocked;
  return moesaic_top_k(at<const float>(values), num_rows, size, k, threads, instruction_set, at<int64_t>(ids));
}

}  // namespace

moesaic_attention_step attention_step(const nb::tuple& described) {
  const nb::tuple sizes = described[0], norms = described[1], rotary = described[2], sequences = described[3];
  const nb::tuple cache = described[4];
  const auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
  moesaic_attention_step step{};
  step.num_tokens = size(0), step.num_sequences = size(1);
  step.num_heads = size(2), step.num_key_value_heads = size(3), step.head_dim = size(4);
  step.qk_norm = nb::cast<int32_t>(norms[0]), step.norm_eps = nb::cast<float>(norms[1]);
  step.query_norm = at<const float>(norms[2]), step.key_norm = at<const float>(norms[3]);
  step.rotary_dim = nb::cast<int64_t>(rotary[0]), step.interleaved = nb::cast<int32_t>(rotary[1]);
  step.cosine = at<const float>(rotary[2]), step.sine = at<const float>(rotary[3]);
  step.first_tokens = at<const int64_t>(sequences[0]), step.num_keys = at<const int64_t>(sequences[1]);
  step.block_tables = at<const int64_t>(sequences[2]), step.table_size = nb::cast<int64_t>(sequences[3]);
  step.first_keys = at<const int64_t>(sequences[4]);
  step.keys = at<float>(cache[0]), step.values = at<float>(cache[1]);
  step.sinks = at<const float>(described[5]);
  step.scale = nb::cast<float>(described[6]);
  return step;
}

moesaic_router_step router_step(const nb::tuple& described) {
  const nb::tuple sizes = described[0], scores = described[1], arrays = described[2];
  moesaic_router_step step{};
  step.hidden_size = nb::cast<int64_t>(sizes[0]), step.num_experts = nb::cast<int64_t>(sizes[1]);
  step.top_k = nb::cast<int64_t>(sizes[2]);
  step.scores = nb::cast<int32_t>(scores[0]), step.normalise = nb::cast<int32_t>(scores[1]);
  step.least_sum = nb::cast<float>(scores[2]), step.scaling = nb::cast<float>(scores[3]);
  step.weight = at<const float>(arrays[0]);
  step.bias = at<const float>(arrays[1]), step.selection_bias = at<const float>(arrays[2]);
  return step;
}

void bind_step(nb::module_& module) {
  module.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("num_rows"), nb::arg("size"),
             nb::arg("eps"), nb::arg("threads"), nb::arg("instruction_set"), nb::arg("y"),
             "See moesaic_rms_norm in step.h.");
  module.def("attend", &attend, nb::arg("step"), nb::arg("inputs"), nb::arg("threads"), nb::arg("instruction_set"),
             nb::arg("y"), "See moesaic_attend in step.h.");
  module.def("route", &route, nb::arg("step"), nb::arg("num_tokens"), nb::arg("x"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("outputs"), "See moesaic_route in step.h.");
  module.def("top_k", &top_k, nb::arg("values"), nb::arg("num_rows"), nb::arg("size"), nb::arg("k"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("ids"), "See moesaic_top_k in step.h.");
}
