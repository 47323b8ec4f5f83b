// A block in one call, in the Python module moesaic._native.
#include "block.h"

#include "bindings.h"

namespace {

// A packed weight and the address of its bias.
moesaic_packed_layer layer(const nb::tuple& described) {
  return {packed(described[0]), at<const float>(described[1])};
}

// As ops/native_block.py builds it; without experts.
moesaic_block_step block_step(const nb::tuple& described) {
  const nb::tuple norms = described[0], projections = described[1];
  moesaic_block_step step{};
  step.attention_norm = at<const float>(norms[0]), step.feed_forward_norm = at<const float>(norms[1]);
  step.norm_eps = nb::cast<float>(norms[2]), step.residual = nb::cast<float>(norms[3]);
  step.query = layer(projections[0]), step.key = layer(projections[1]);
  step.value = layer(projections[2]), step.output = layer(projections[3]);
  step.attention = attention_step(described[2]);
  step.router = router_step(described[3]);
  const nb::tuple kept = described[4];
  step.kept = at<const int64_t>(kept[0]), step.num_kept = nb::cast<int64_t>(kept[1]);
  return step;
}

int block(nb::tuple described, nb::tuple experts, uintptr_t x, int threads, nb::tuple outputs) {
  moesaic_block_step step = block_step(described);
  step.experts = packed_experts(experts);
  auto *const y = at<float>(outputs[0]), *const logits = at<float>(outputs[1]), *const weights = at<float>(outputs[3]);
  auto* const expert_ids = at<int64_t>(outputs[2]);
  nb::gil_scoped_release unlocked;
  return moesaic_block(&step, at<const float>(x), threads, y, logits, expert_ids, weights);
}

// Attention and router: what stands before the experts.
int block_route(nb::tuple described, uintptr_t x, int threads, nb::tuple outputs) {
  const moesaic_block_step step = block_step(described);
  auto *const y = at<float>(outputs[0]), *const normed = at<float>(outputs[1]), *const logits = at<float>(outputs[2]);
  auto* const expert_ids = at<int64_t>(outputs[3]);
  auto* const weights = at<float>(outputs[4]);
  auto* const plan = at<int32_t>(outputs[5]);
  nb::gil_scoped_release unlocked;
  const int status = moesaic_block_attend(&step, at<const float>(x), threads, y, normed);
  return status ? status : moesaic_block_route(&step, normed, threads, logits, expert_ids, weights, plan);
}

int block_finish(nb::tuple described, uintptr_t plan, uintptr_t rows, uintptr_t weights, int threads, uintptr_t update,
                 uintptr_t y) {
  const moesaic_block_step step = block_step(described);
  nb::gil_scoped_release unlocked;
  return moesaic_block_finish(&step, at<const int32_t>(plan), at<const float>(rows), at<const float>(weights), threads,
                              at<float>(update), at<float>(y));
}

}  // namespace

void bind_block(nb::module_& module) {
  module.def("block", &block, nb::arg("step"), nb::arg("experts"), nb::arg("x"), nb::arg("threads"),
             nb::arg("outputs"), "See moesaic_block in block.h.");
  module.def("block_route", &block_route, nb::arg("step"), nb::arg("x"), nb::arg("threads"), nb::arg("outputs"),
             "See moesaic_block_attend and moesaic_block_route in block.h.");
  module.def("block_finish", &block_finish, nb::arg("step"), nb::arg("plan"), nb::arg("rows"), nb::arg("weights"),
             nb::arg("threads"), nb::arg("update"), nb::arg("y"), "See moesaic_block_finish in block.h.");
}
