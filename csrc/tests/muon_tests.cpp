// Muon's step of every instruction set on arrays of exactly their sizes, to be built with sanitizers. Its numbers are held
// against torch elsewhere; here all instruction sets and numbers of threads must agree. The first argument seeds the random
// sizes and numbers, the second says how many calls. Prints what is wrong and exits with 1.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "muon.h"
#include "random_tests.h"

namespace {

struct Stack {
  int64_t number, rows, columns;
  std::vector<float> parameters, gradients, momenta;

  Stack() : number(below(4)), rows(1 + below(80)), columns(1 + below(below(4) ? 80 : 600)) {
    if (below(2)) std::swap(rows, columns);
    const int64_t count = number * rows * columns;
    parameters = numbers(count), gradients = numbers(count), momenta = numbers(count);
    if (number > 0 && below(2)) std::fill(gradients.begin(), gradients.begin() + rows * columns, 0.0f);
  }
};

// All parameters and momenta after the step; none when this machine lacks the set.
std::vector<float> stepped(std::vector<Stack> stacks, const char* set, int threads) {
  const std::vector<float> coefficients{3.4f, -4.7f, 2.0f, 1.9f, -1.3f, 0.4f};
  std::vector<moesaic_matrix_stack> described;
  for (Stack& stack : stacks) {
    described.push_back({stack.number, stack.rows, stack.columns, stack.parameters.data(), stack.gradients.data(),
                         stack.momenta.data(), 0.95f, 0.1f, 2, coefficients.data()});
  }
  if (moesaic_muon_step(described.data(), int64_t(described.size()), 0.9f, threads, set)) return {};
  std::vector<float> all;
  for (const Stack& stack : stacks) {
    all.insert(all.end(), stack.parameters.begin(), stack.parameters.end());
    all.insert(all.end(), stack.momenta.begin(), stack.momenta.end());
  }
  return all;
}

}  // namespace

int main(int count, char** values) {
  const Arguments arguments(count, values);
  for (int64_t call = 0; call < arguments.get(2, 10); ++call) {
    const std::vector<Stack> stacks(size_t(1 + below(3)));
    const std::vector<float> expected = stepped(stacks, "portable", 1);
    for (const std::string set : {"avx512f", "avx2", "portable"}) {
      const std::vector<float> alone = stepped(stacks, set.c_str(), 1);
      if (alone.empty()) continue;
      bool close = alone.size() == expected.size();
      for (size_t i = 0; close && i < alone.size(); ++i) close = std::abs(alone[i] - expected[i]) < 1e-4f;
      expect(close, set + ": other numbers");
      expect(stepped(stacks, set.c_str(), 3) == alone, set + ": the threads decide");
    }
  }
  return verdict();
}
