// What the files that bind functions to Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "packed.h"
#include "step.h"

namespace nb = nanobind;

// Arrays come as addresses, 0 for none: what a tensor's data_ptr() is.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
template <class T>
T* at(nb::handle address) {
  return at<T>(nb::cast<uintptr_t>(address));
}

// The list of these names, ended by NULL.
inline nb::list list_of(const char* const* names) {
  nb::list all;
  for (; *names; ++names) all.append(*names);
  return all;
}

// From what the Python side calls `described`; what differs from call to call is left out.
moesaic_packed packed(const nb::tuple& weight);
moesaic_packed_experts packed_experts(const nb::tuple& described);
moesaic_attention_step attention_step(const nb::tuple& described);
moesaic_router_step router_step(const nb::tuple& described);

void bind_block(nb::module_& module);   // in block_bindings.cpp
void bind_linear(nb::module_& module);  // in linear_bindings.cpp
void bind_muon(nb::module_& module);    // in muon_bindings.cpp
void bind_packed(nb::module_& module);  // in packed_bindings.cpp
void bind_step(nb::module_& module);    // in step_bindings.cpp
