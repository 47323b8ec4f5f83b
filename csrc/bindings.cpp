// The Python module moesaic._native: thin wrappers around the C-level interface of the other files here.
#include <nanobind/nanobind.h>

#include "cpu_features.h"

namespace nb = nanobind;

NB_MODULE(_native, module) {
  module.doc() = "C++ CPU kernels of moesaic.";

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
}
