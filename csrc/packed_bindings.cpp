// Packed weights in the Python module moesaic._native.
#include <nanobind/nanobind.h>

#include "packed.h"

namespace nb = nanobind;

namespace {

// Addresses are what a tensor's data_ptr() is, 0 for none.
const float* floats_at(nb::handle address) { return reinterpret_cast<const float*>(nb::cast<uintptr_t>(address)); }

// (rows, columns, group_size, bits, table, address); the table is 16 bytes, or b"" for 8 bits, and must outlive the result.
moesaic_packed packed(const nb::tuple& weight) {
  const nb::bytes table = nb::cast<nb::bytes>(weight[4]);
  if (table.size() != 0 && table.size() != 16) throw nb::value_error("the table of a packed weight has 16 entries");
  return {nb::cast<int64_t>(weight[0]),
          nb::cast<int64_t>(weight[1]),
          nb::cast<int32_t>(weight[2]),
          nb::cast<int32_t>(weight[3]),
          table.size() ? reinterpret_cast<const int8_t*>(table.c_str()) : nullptr,
          reinterpret_cast<const uint8_t*>(nb::cast<uintptr_t>(weight[5]))};
}

int packed_linear(nb::tuple weight, uintptr_t bias, uintptr_t x, int64_t num_tokens, int threads,
                  const char* instruction_set, uintptr_t y) {
  const moesaic_packed matrix = packed(weight);
  nb::gil_scoped_release unlocked;
  return moesaic_packed_linear(&matrix, reinterpret_cast<const float*>(bias), reinterpret_cast<const float*>(x),
                               num_tokens, threads, instruction_set, reinterpret_cast<float*>(y));
}

int packed_experts_forward(nb::tuple sizes, nb::tuple activation, uintptr_t plan, nb::tuple inputs, nb::tuple gate_up,
                           nb::tuple down, int threads, const char* instruction_set, uintptr_t y) {
  const auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
  moesaic_packed_experts experts{};
  experts.num_tokens = size(0), experts.num_rows = size(1), experts.num_experts = size(2);
  experts.hidden_size = size(3), experts.intermediate_size = size(4);
  experts.activation = nb::cast<int32_t>(activation[0]);
  experts.limit = nb::cast<float>(activation[1]), experts.alpha = nb::cast<float>(activation[2]);
  experts.plan = moesaic_plan_view(reinterpret_cast<const int32_t*>(plan), size(0), size(1), size(2));
  experts.x = floats_at(inputs[0]), experts.row_weights = floats_at(inputs[1]);
  experts.gate_up_bias = floats_at(inputs[2]), experts.down_bias = floats_at(inputs[3]);
  experts.gate_up = packed(gate_up), experts.down = packed(down);
  nb::gil_scoped_release unlocked;
  return moesaic_packed_experts_forward(&experts, threads, instruction_set, reinterpret_cast<float*>(y));
}

}  // namespace

void bind_packed(nb::module_& module) {
  module.def(
      "packed_kernels",
      [] {
        nb::list names;
        for (const char* const* name = moesaic_packed_kernels(); *name; ++name) names.append(*name);
        return names;
      },
      "Instruction sets whose packed kernels run here, the best first.");
  module.def("packed_bytes", &moesaic_packed_bytes, nb::arg("rows"), nb::arg("columns"), nb::arg("group_size"),
             nb::arg("bits"), "Bytes of one packed matrix.");
  module.def("packed_linear", &packed_linear, nb::arg("weight"), nb::arg("bias"), nb::arg("x"), nb::arg("num_tokens"),
             nb::arg("threads"), nb::arg("instruction_set"), nb::arg("y"), "See moesaic_packed_linear in packed.h.");
  module.def("packed_experts_forward", &packed_experts_forward, nb::arg("sizes"), nb::arg("activation"), nb::arg("plan"),
             nb::arg("inputs"), nb::arg("gate_up"), nb::arg("down"), nb::arg("threads"), nb::arg("instruction_set"),
             nb::arg("y"), "See moesaic_packed_experts_forward in packed.h.");
}
