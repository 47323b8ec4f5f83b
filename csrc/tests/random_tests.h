// What the programs here share: random numbers, and counting what is wrong. To be included once by each.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

std::mt19937 random_bits;
int failures = 0;

int64_t below(int64_t count) { return int64_t(random_bits() % uint64_t(count)); }

double normal(double size) { return std::normal_distribution<double>(0.0, size)(random_bits); }

std::vector<float> numbers(int64_t count, double size = 1) {
  std::vector<float> drawn(static_cast<size_t>(count));
  for (float& one : drawn) one = float(normal(size));
  return drawn;
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

std::string numbered(const char* name, std::initializer_list<int64_t> sizes) {
  std::string text = name;
  for (int64_t size : sizes) text += " " + std::to_string(size);
  return text;
}

// The program's arguments, whole numbers: the first seeds the random numbers.
struct Arguments {
  int count;
  char** values;

  Arguments(int count_, char** values_) : count(count_), values(values_) { random_bits.seed(uint32_t(get(1, 0))); }

  int64_t get(int index, int64_t otherwise) const { return index < count ? std::atoll(values[index]) : otherwise; }
};

// What main() returns.
int verdict() {
  std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}

}  // namespace
