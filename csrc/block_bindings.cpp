// A block in one call, in the Python module moesaic._native.
#include "block.h"

#include "bindings.h"

namespace {

// A packed weight and the address of its bias.
moesaic_packed_layer layer(const nb::tuple& described) {
  return {packed(described[0]), at<const float>(described[1])};
}

int block(nb::tuple norms, nb::tuple projections, nb::tuple attention, nb::tuple router, nb::tuple experts, uintptr_t x,
          int threads, uintptr_t y) {
  moesaic_block_step step{};
  step.attention_norm = at<const float>(norms[0]), step.feed_forward_norm = at<const float>(norms[1]);
  step.norm_eps = nb::cast<float>(norms[2]), step.residual = nb::cast<float>(norms[3]);
  step.query = layer(projections[0]), step.key = layer(projections[1]);
  step.value = layer(projections[2]), step.output = layer(projections[3]);
  step.attention = attention_step(attention);
  step.router = router_step(router);
  step.experts = packed_experts(experts);
  nb::gil_scoped_release unlocked;
  return moesaic_block(&step, at<const float>(x), threads, at<float>(y));
}

}  // namespace

void bind_block(nb::module_& module) {
  module.def("block", &block, nb::arg("norms"), nb::arg("projections"), nb::arg("attention"), nb::arg("router"),
             nb::arg("experts"), nb::arg("x"), nb::arg("threads"), nb::arg("y"), "See moesaic_block in block.h.");
}
