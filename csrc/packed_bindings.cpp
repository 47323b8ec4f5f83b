// Packed weights in the Python module moesaic._native.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings.h"
#include "pack.h"

// (rows, columns, group_size, bits, table, address); the table is 16 bytes, or b"" for 8 bits, and must outlive the result.
moesaic_packed packed(const nb::tuple& weight) {
  const nb::bytes table = nb::cast<nb::bytes>(weight[4]);
  if (table.size() != 0 && table.size() != 16) throw nb::value_error("the table of a packed weight has 16 entries");
  return {nb::cast<int64_t>(weight[0]),
          nb::cast<int64_t>(weight[1]),
          nb::cast<int32_t>(weight[2]),
          nb::cast<int32_t>(weight[3]),
          table.size() ? reinterpret_cast<const int8_t*>(table.c_str()) : nullptr,
          at<const uint8_t>(weight[5])};
}

moesaic_packed_experts packed_experts(const nb::tuple& described) {
  const nb::tuple sizes = described[0], activation = described[1], biases = described[2];
  moesaic_packed_experts experts{};
  experts.num_experts = nb::cast<int64_t>(sizes[0]), experts.hidden_size = nb::cast<int64_t>(sizes[1]);
  experts.intermediate_size = nb::cast<int64_t>(sizes[2]);
  experts.activation = nb::cast<int32_t>(activation[0]);
  experts.limit = nb::cast<float>(activation[1]), experts.alpha = nb::cast<float>(activation[2]);
  experts.gate_up_bias = at<const float>(biases[0]), experts.down_bias = at<const float>(biases[1]);
  experts.gate_up = packed(described[3]), experts.down = packed(described[4]);
  experts.slots = at<const int32_t>(described[5]);
  return experts;
}

namespace {

int packed_linear(nb::tuple weight, uintptr_t bias, uintptr_t x, int64_t num_tokens, int threads,
                  const char* instruction_set, uintptr_t y) {
  const moesaic_packed_layer layer{packed(weight), at<const float>(bias)};
  float* const to = at<float>(y);
  nb::gil_scoped_release unlocked;
  return moesaic_packed_linear(&layer, 1, at<const float>(x), num_tokens, threads, instruction_set, &to);
}

using Forward = int (*)(const moesaic_packed_experts*, int, const char*, float*);

// moesaic_packed_experts_forward or moesaic_packed_experts_rows.
template <Forward forward>
int packed_experts_with(nb::tuple described, int64_t num_tokens, int64_t num_rows, uintptr_t plan, uintptr_t x,
                        uintptr_t row_weights, int threads, const char* instruction_set, uintptr_t y) {
  moesaic_packed_experts experts = packed_experts(described);
  experts.num_tokens = num_tokens, experts.num_rows = num_rows;
  experts.plan = moesaic_plan_view(at<const int32_t>(plan), num_tokens, num_rows, experts.num_experts);
  experts.x = at<const float>(x), experts.row_weights = at<const float>(row_weights);
  nb::gil_scoped_release unlocked;
  return forward(&experts, threads, instruction_set, at<float>(y));
}

int sum_rows(uintptr_t plan, nb::tuple sizes, uintptr_t rows, uintptr_t row_weights, int threads,
             const char* instruction_set, uintptr_t y) {
  const auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
  const int64_t num_tokens = size(0), num_rows = size(1), num_experts = size(2), hidden_size = size(3);
  const moesaic_plan view = moesaic_plan_view(at<const int32_t>(plan), num_tokens, num_rows, num_experts);
  nb::gil_scoped_release unlocked;
  return moesaic_sum_rows(&view, num_tokens, num_rows, hidden_size, at<const float>(rows), at<const float>(row_weights),
                          threads, instruction_set, at<float>(y));
}

int pack(nb::tuple sizes, uintptr_t weight, nb::bytes table, std::vector<float> ends, int threads,
         const char* instruction_set, uintptr_t data) {
  const auto size = [&](int i) { return nb::cast<int64_t>(sizes[i]); };
  const moesaic_packing packing{size(0), size(1), int32_t(size(2)), int32_t(size(3)), int32_t(size(4)),
                                at<const void>(weight),
                                table.size() == 16 ? reinterpret_cast<const int8_t*>(table.c_str()) : nullptr,
                                ends.data(), int64_t(ends.size())};
  nb::gil_scoped_release unlocked;
  return moesaic_pack(&packing, threads, instruction_set, at<uint8_t>(data));
}

}  // namespace

void bind_packed(nb::module_& module) {
  module.def("packed_kernels", [] { return list_of(moesaic_packed_kernels()); },
             "Instruction sets whose packed kernels run here, the best first.");
  module.def("packed_bytes", &moesaic_packed_bytes, nb::arg("rows"), nb::arg("columns"), nb::arg("group_size"),
             nb::arg("bits"), "Bytes of one packed matrix.");
  module.def("pack", &pack, nb::arg("sizes"), nb::arg("weight"), nb::arg("table"), nb::arg("ends"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("data"),
             "See moesaic_pack in pack.h; sizes are rows, columns, group size, bits and element.");
  module.def("packed_linear", &packed_linear, nb::arg("weight"), nb::arg("bias"), nb::arg("x"), nb::arg("num_tokens"),
             nb::arg("threads"), nb::arg("instruction_set"), nb::arg("y"), "See moesaic_packed_linear in packed.h.");
  module.def("packed_experts_forward", &packed_experts_with<moesaic_packed_experts_forward>, nb::arg("experts"),
             nb::arg("num_tokens"), nb::arg("num_rows"), nb::arg("plan"), nb::arg("x"), nb::arg("row_weights"),
             nb::arg("threads"), nb::arg("instruction_set"), nb::arg("y"),
             "See moesaic_packed_experts_forward in packed.h.");
  module.def("packed_experts_rows", &packed_experts_with<moesaic_packed_experts_rows>, nb::arg("experts"),
             nb::arg("num_tokens"), nb::arg("num_rows"), nb::arg("plan"), nb::arg("x"), nb::arg("row_weights"),
             nb::arg("threads"), nb::arg("instruction_set"), nb::arg("rows"),
             "See moesaic_packed_experts_rows in packed.h, which needs no row_weights.");
  module.def("sum_rows", &sum_rows, nb::arg("plan"), nb::arg("sizes"), nb::arg("rows"), nb::arg("row_weights"),
             nb::arg("threads"), nb::arg("instruction_set"), nb::arg("y"), "See moesaic_sum_rows in packed.h.");
}
