// The Python module moesaic._native: thin wrappers around the C-level interface of the other files here.
#include "bindings.h"

#include "cpu_features.h"
#include "experts.h"

namespace {

// As ops/native.py builds it: sizes (T, N, E, D, F), element type, activation (number, limit, alpha), and the inputs'
// addresses.
struct Experts {
  moesaic_experts value{};

  Experts(nb::tuple sizes, int32_t element, nb::tuple activation, uintptr_t plan, nb::tuple inputs) {
    const auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
    value.num_tokens = size(0), value.num_rows = size(1), value.num_experts = size(2);
    value.hidden_size = size(3), value.intermediate_size = size(4);
    value.element = element;
    value.activation = nb::cast<int32_t>(activation[0]);
    value.limit = nb::cast<float>(activation[1]), value.alpha = nb::cast<float>(activation[2]);
    value.plan = moesaic_plan_view(at<const int32_t>(plan), size(0), size(1), size(2));
    value.x = at<const void>(inputs[0]), value.row_weights = at<const float>(inputs[1]);
    value.gate_up = at<const void>(inputs[2]), value.down = at<const void>(inputs[3]);
    value.gate_up_bias = at<const void>(inputs[4]), value.down_bias = at<const void>(inputs[5]);
  }
};

int experts_forward(const Experts& experts, int threads, const char* instruction_set, uintptr_t pre_activations,
                    uintptr_t y) {
  nb::gil_scoped_release unlocked;
  return moesaic_experts_forward(&experts.value, threads, instruction_set, at<void>(pre_activations), at<void>(y));
}

int experts_backward(const Experts& experts, int threads, const char* instruction_set, uintptr_t pre_activations,
                     uintptr_t grad_y, nb::tuple gradients) {
  moesaic_expert_gradients all{at<void>(gradients[0]), at<float>(gradients[1]), at<void>(gradients[2]),
                               at<void>(gradients[3]), at<void>(gradients[4]), at<void>(gradients[5])};
  nb::gil_scoped_release unlocked;
  return moesaic_experts_backward(&experts.value, threads, instruction_set, at<const void>(pre_activations),
                                  at<const void>(grad_y), &all);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "C++ CPU kernels of moesaic.";
  module.attr("interface") = 9;  // rises when a function or its arguments change, and with it ops/instruction_set.py

  module.def(
      "instruction_set", [] { return moesaic_instruction_set(); }, "Best instruction-set level of this machine.");

  module.def(
      "cpu_features",
      [] {
        nb::dict features;
        for (const moesaic_cpu_feature* f = moesaic_cpu_features(); f->name; ++f) features[f->name] = bool(f->present);
        return features;
      },
      "Feature name, spelled as in /proc/cpuinfo, to whether CPU and operating system support it.");

  module.def(
      "expert_kernels",
      [] {
        nb::dict by_element;
        by_element["float32"] = list_of(moesaic_expert_kernels(MOESAIC_FLOAT32));
        by_element["bfloat16"] = list_of(moesaic_expert_kernels(MOESAIC_BFLOAT16));
        return by_element;
      },
      "Type of the numbers to the instruction sets whose expert kernels for it run here, the best first.");
  module.def("plan_size", &moesaic_plan_size, nb::arg("num_tokens"), nb::arg("num_rows"), nb::arg("num_experts"));
  module.def(
      "make_plan",
      [](uintptr_t token_ids, uintptr_t expert_ids, int64_t num_tokens, int64_t num_rows, int64_t num_experts,
         uintptr_t plan) {
        nb::gil_scoped_release unlocked;
        return moesaic_make_plan(at<const int64_t>(token_ids), at<const int64_t>(expert_ids), num_tokens, num_rows,
                                 num_experts, at<int32_t>(plan));
      },
      nb::arg("token_ids"), nb::arg("expert_ids"), nb::arg("num_tokens"), nb::arg("num_rows"), nb::arg("num_experts"),
      nb::arg("plan"), "See moesaic_make_plan in experts.h.");
  nb::class_<Experts>(module, "Experts", "The inputs of the experts of one layer; see moesaic_experts in experts.h.")
      .def(nb::init<nb::tuple, int32_t, nb::tuple, uintptr_t, nb::tuple>(), nb::arg("sizes"), nb::arg("element"),
           nb::arg("activation"), nb::arg("plan"), nb::arg("inputs"));
  module.def("experts_forward", &experts_forward, nb::arg("experts"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("pre_activations"), nb::arg("y"),
             "See moesaic_experts_forward in experts.h.");
  module.def("experts_backward", &experts_backward, nb::arg("experts"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("pre_activations"), nb::arg("grad_y"), nb::arg("gradients"),
             "See moesaic_experts_backward in experts.h.");
  bind_block(module);
  bind_linear(module);
  bind_muon(module);
  bind_packed(module);
  bind_step(module);
}
