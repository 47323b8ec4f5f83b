// The operator of muon.h in the Python module moesaic._native.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings.h"
#include "muon.h"

namespace {

// `stacks` holds (number, rows, columns, parameters, gradients, momenta, keep, step size, coefficients) of each, with three
// coefficients of each iteration in a row.
int muon_step(nb::list stacks, float momentum, int threads, const char* instruction_set) {
  std::vector<moesaic_matrix_stack> all;
  std::vector<std::vector<float>> coefficients;  // which keeps what `all` points to
  all.reserve(stacks.size()), coefficients.reserve(stacks.size());
  for (const auto& each : stacks) {
    const nb::tuple stack = nb::cast<nb::tuple>(each);
    const auto size = [&](int i) { return nb::cast<int64_t>(stack[i]); };
    coefficients.push_back(nb::cast<std::vector<float>>(stack[8]));
    all.push_back({size(0), size(1), size(2), at<float>(stack[3]), at<const float>(stack[4]), at<float>(stack[5]),
                   nb::cast<float>(stack[6]), nb::cast<float>(stack[7]), int64_t(coefficients.back().size() / 3),
                   coefficients.back().data()});
  }
  nb::gil_scoped_release unlocked;
  return moesaic_muon_step(all.data(), int64_t(all.size()), momentum, threads, instruction_set);
}

}  // namespace

void bind_muon(nb::module_& module) {
  module.def("muon_largest_side", &moesaic_muon_largest_side);
  module.def("muon_step", &muon_step, nb::arg("stacks"), nb::arg("momentum"), nb::arg("threads"), nb::arg("instruction_set"),
             "See moesaic_muon_step in muon.h.");
}
