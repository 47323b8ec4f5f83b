// The linear layer of linear.h in the Python module moesaic._native.
#include "bindings.h"
#include "linear.h"

namespace {

int linear(nb::tuple sizes, uintptr_t weight, uintptr_t bias, uintptr_t x, int threads, const char* instruction_set,
           uintptr_t y) {
  const moesaic_linear_layer layer{nb::cast<int64_t>(sizes[1]), nb::cast<int64_t>(sizes[2]), at<const void>(weight),
                                   at<const void>(bias)};
  const int64_t num_tokens = nb::cast<int64_t>(sizes[0]);
  nb::gil_scoped_release unlocked;
  return moesaic_linear(&layer, at<const void>(x), num_tokens, threads, instruction_set, at<void>(y));
}

}  // namespace

void bind_linear(nb::module_& module) {
  module.def("linear", &linear, nb::arg("sizes"), nb::arg("weight"), nb::arg("bias"), nb::arg("x"), nb::arg("threads"),
             nb::arg("instruction_set"), nb::arg("y"), "See moesaic_linear in linear.h; sizes are T, N and K.");
}
