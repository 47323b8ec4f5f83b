// Which kernels of one kind run on this machine. Internal to csrc/, and like work_memory.h only for files that are compiled
// for every machine.
#pragma once

#include <cstring>
#include <initializer_list>
#include <vector>

#include "cpu_features.h"

template <class Kernels>
class KernelChoice {
 public:
  struct Built {
    const char* instruction_set;
    const Kernels* (*kernels)();  // returns NULL where the compiler could not build them
    const char* name = instruction_set;
  };

  // `all` stand in the order of preference. None is asked for its kernels before the CPU is known to have its
  // instructions, for the function that returns them is compiled with these too.
  KernelChoice(std::initializer_list<Built> all) {
    for (const Built& one : all) {
      if (!moesaic_cpu_reaches(one.instruction_set)) continue;
      const Kernels* const kernels = one.kernels();
      if (!kernels) continue;
      kernels_.push_back(kernels);
      names_.push_back(one.name);
    }
    names_.push_back(nullptr);
  }

  // Those of this name, which is that of the instruction set; the best for NULL or "". NULL when this machine or build
  // lacks them.
  const Kernels* named(const char* name) const {
    for (size_t i = 0; i < kernels_.size(); ++i) {
      if (!name || !*name || !std::strcmp(names_[i], name)) return kernels_[i];
    }
    return nullptr;
  }

  // The best first, ended by NULL.
  const char* const* names() const { return names_.data(); }

 private:
  std::vector<const Kernels*> kernels_;
  std::vector<const char*> names_;
};

// Of kernels that are written in terms of a `Vector`.
template <class Kernels>
KernelChoice<Kernels> choice_of_vectors(const Kernels* (*avx512)(), const Kernels* (*avx2)(), const Kernels* (*portable)()) {
  return {{"avx512f", avx512}, {"avx2", avx2}, {"portable", portable}};
}
