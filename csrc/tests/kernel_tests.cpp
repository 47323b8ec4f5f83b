// The experts of every instruction set and element type against plain loops in double, and the threads. To be built
// with sanitizers: every array has exactly its size. The first argument seeds the random sizes and numbers, the second
// is the number of layers. Prints what is wrong and exits with 1.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "bfloat16.h"
#include "experts.h"
#include "linear.h"
#include "random_tests.h"
#include "thread_pool.h"

namespace {

using Numbers = std::vector<double>;

// An array of the layer's element type.
template <class Element>
std::vector<Element> as_elements(const Numbers& numbers) {
  std::vector<Element> elements(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    if constexpr (sizeof(Element) == 2) {
      elements[i] = rounded(float(numbers[i]));
    } else {
      elements[i] = float(numbers[i]);
    }
  }
  return elements;
}

// One layer: its sizes, inputs and routing. The inputs are exact in its element type, and in double here.
struct Layer {
  int64_t T, N, E, D, F;
  bool narrow, clamped, biased;
  Numbers x, row_weights, gate_up, down, gate_up_bias, down_bias, grad_y;
  std::vector<int64_t> token_ids, expert_ids;
  std::vector<int32_t> plan;

  Layer() {
    const int64_t widths[] = {1, 3, 15, 16, 17, 31, 32, 33, 40, 64, 70, 257};
    T = below(3) ? 1 + below(40) : below(2) ? 0 : 400;
    E = 1 + below(6), N = T ? T * (1 + below(2)) : 0;
    D = widths[below(12)], F = widths[below(12)];
    narrow = below(2), clamped = below(2), biased = below(2);
    const int64_t one_expert = below(3) ? -1 : below(E);
    for (int64_t n = 0; n < N; ++n) {
      token_ids.push_back(below(T));
      expert_ids.push_back(one_expert >= 0 ? one_expert : below(E));
    }
    const double of_x = 1 / std::sqrt(double(D)), of_hidden = 1 / std::sqrt(double(F));
    x = numbers(T * D, 1, 1 / 2.), grad_y = numbers(T * D, 1), row_weights = numbers(N, 1);
    for (double& one : row_weights) one = float(one / 3);  // float32 in every layer
    gate_up = numbers(E * 2 * F * D, of_x, 1 / 4.), down = numbers(E * D * F, of_hidden);
    gate_up_bias = numbers(E * 2 * F, 1, 1 / 8.), down_bias = numbers(E * D, 1);
    plan.resize(size_t(moesaic_plan_size(T, N, E)));
    expect(moesaic_make_plan(token_ids.data(), expert_ids.data(), T, N, E, plan.data()) == -1, "plan refused");
  }

  // A clamp's slope jumps, so rounding must not carry a pre-activation across the limit: where there is one, the numbers
  // that make them are multiples of `step`, and the limit is none of their sums.
  Numbers numbers(int64_t count, double size, double step = 0) const {
    std::normal_distribution<double> normal(0.0, size);
    Numbers drawn(static_cast<size_t>(count));
    for (double& one : drawn) {
      one = normal(random_bits);
      if (clamped && step > 0) one = std::round(one / step) * step;
      one = narrow ? double(widened(rounded(float(one)))) : double(float(one));
    }
    return drawn;
  }

  std::string name() const {
    return std::string(narrow ? "bfloat16" : "float32") + ", T " + std::to_string(T) + " N " + std::to_string(N) + " E " +
           std::to_string(E) + " D " + std::to_string(D) + " F " + std::to_string(F) + ": ";
  }
};

constexpr double limit = 17 / 16., alpha_of_clamped = 1.3f;

// What a pass computes.
template <class Element, class Weight = Element>
struct Results {
  std::vector<Element> y, grad_x;
  std::vector<Weight> grad_row_weights;
  std::vector<Element> grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias;

  explicit Results(const Layer& l)
      : y(size_t(l.T * l.D)),
        grad_x(size_t(l.T * l.D)),
        grad_row_weights(size_t(l.N)),
        grad_gate_up(size_t(l.E * 2 * l.F * l.D)),
        grad_down(size_t(l.E * l.D * l.F)),
        grad_gate_up_bias(size_t(l.biased ? l.E * 2 * l.F : 0)),
        grad_down_bias(size_t(l.biased ? l.E * l.D : 0)) {}
};

template <class Element>
Results<Element, float> computed(const Layer& l, int threads, const char* instruction_set) {
  const auto x = as_elements<Element>(l.x), gate_up = as_elements<Element>(l.gate_up);
  const auto down = as_elements<Element>(l.down), grad_y = as_elements<Element>(l.grad_y);
  const auto gate_up_bias = as_elements<Element>(l.gate_up_bias), down_bias = as_elements<Element>(l.down_bias);
  const auto row_weights = as_elements<float>(l.row_weights);
  moesaic_experts experts{};
  experts.num_tokens = l.T, experts.num_rows = l.N, experts.num_experts = l.E;
  experts.hidden_size = l.D, experts.intermediate_size = l.F;
  experts.element = sizeof(Element) == 2 ? MOESAIC_BFLOAT16 : MOESAIC_FLOAT32;
  experts.activation = l.clamped ? MOESAIC_CLAMPED_SWIGLU : MOESAIC_SWIGLU;
  experts.limit = float(limit), experts.alpha = float(alpha_of_clamped);
  experts.plan = moesaic_plan_view(l.plan.data(), l.T, l.N, l.E);
  experts.x = x.data(), experts.row_weights = row_weights.data();
  experts.gate_up = gate_up.data(), experts.down = down.data();
  if (l.biased) experts.gate_up_bias = gate_up_bias.data(), experts.down_bias = down_bias.data();

  Results<Element, float> r(l);
  std::vector<Element> pre_activations(size_t(l.N * 2 * l.F));
  expect(moesaic_experts_forward(&experts, threads, instruction_set, pre_activations.data(), r.y.data()) == 0, "forward");
  moesaic_expert_gradients gradients{r.grad_x.data(),
                                     r.grad_row_weights.data(),
                                     r.grad_gate_up.data(),
                                     r.grad_down.data(),
                                     l.biased ? r.grad_gate_up_bias.data() : nullptr,
                                     l.biased ? r.grad_down_bias.data() : nullptr};
  expect(moesaic_experts_backward(&experts, threads, instruction_set, pre_activations.data(), grad_y.data(),
                                  &gradients) == 0,
         "backward");
  return r;
}

struct Unit {
  double value, gate_slope, up_slope;
};

Unit activated(bool clamped, double gate, double up) {
  const double alpha = clamped ? alpha_of_clamped : 1.0;
  const double g = clamped ? std::fmin(gate, limit) : gate;
  const double u = clamped ? std::fmax(std::fmin(up, limit), -limit) + 1 : up;
  const double s = 1 / (1 + std::exp(-alpha * g));
  const double gate_slope = u * (s + alpha * g * s * (1 - s));
  return {u * g * s, clamped && gate > limit ? 0 : gate_slope, clamped && std::fabs(up) > limit ? 0 : g * s};
}

// An upper bound of it, up to a factor near 1.
Unit activated_at_most(bool clamped, double gate, double up) {
  const double u = clamped ? up + 1 : up;
  return {u * gate, u, gate};
}

// One row of expert e, there and back.
template <class Activation>
void add_row(const Layer& l, int64_t n, Activation activation, Results<double>& r) {
  const int64_t D = l.D, F = l.F, t = l.token_ids[size_t(n)], e = l.expert_ids[size_t(n)];
  const double* const x = l.x.data() + t * D;
  const double* const grad_y = l.grad_y.data() + t * D;
  const double weight = l.row_weights[size_t(n)];
  std::vector<double> pre(size_t(2 * F)), grad_pre(size_t(2 * F));
  for (int64_t f = 0; f < 2 * F; ++f) {
    double sum = l.biased ? l.gate_up_bias[size_t(e * 2 * F + f)] : 0;
    for (int64_t d = 0; d < D; ++d) sum += l.gate_up[size_t((e * 2 * F + f) * D + d)] * x[d];
    pre[size_t(f)] = sum;
  }
  double grad_weight = 0;
  for (int64_t f = 0; f < F; ++f) {
    const Unit unit = activation(l.clamped, pre[size_t(f)], pre[size_t(F + f)]);
    double grad = 0;
    for (int64_t d = 0; d < D; ++d) {
      const size_t at = size_t((e * D + d) * F + f);
      r.y[size_t(t * D + d)] += weight * l.down[at] * unit.value;
      r.grad_down[at] += weight * grad_y[d] * unit.value;
      grad += l.down[at] * grad_y[d];
    }
    grad_weight += grad * unit.value;
    grad_pre[size_t(f)] = weight * grad * unit.gate_slope;
    grad_pre[size_t(F + f)] = weight * grad * unit.up_slope;
  }
  for (int64_t d = 0; d < D && l.biased; ++d) {
    r.y[size_t(t * D + d)] += weight * l.down_bias[size_t(e * D + d)];
    r.grad_down_bias[size_t(e * D + d)] += weight * grad_y[d];
    grad_weight += l.down_bias[size_t(e * D + d)] * grad_y[d];
  }
  r.grad_row_weights[size_t(n)] = grad_weight;
  for (int64_t f = 0; f < 2 * F; ++f) {
    for (int64_t d = 0; d < D; ++d) {
      const size_t at = size_t((e * 2 * F + f) * D + d);
      r.grad_gate_up[at] += grad_pre[size_t(f)] * x[d];
      r.grad_x[size_t(t * D + d)] += grad_pre[size_t(f)] * l.gate_up[at];
    }
    if (l.biased) r.grad_gate_up_bias[size_t(e * 2 * F + f)] += grad_pre[size_t(f)];
  }
}

template <class Activation>
Results<double> in_double(const Layer& l, Activation activation) {
  Results<double> r(l);
  for (int64_t n = 0; n < l.N; ++n) add_row(l, n, activation, r);
  return r;
}

// Each result is a sum of products of the inputs, but for the activation. The same sums of the inputs' squares are the
// squared sizes of its terms, and the error of a sum of rounded terms grows like their root.
Results<double> squared_sizes(Layer l) {
  for (Numbers* some : {&l.x, &l.row_weights, &l.gate_up, &l.down, &l.gate_up_bias, &l.down_bias, &l.grad_y}) {
    for (double& one : *some) one *= one;
  }
  return in_double(l, activated_at_most);
}

template <class Element>
void expect_equal(const std::vector<Element>& ours, const Numbers& oracle, const Numbers& squared_sizes,
                  double tolerance, const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < oracle.size(); ++i) {
    const double allowed = tolerance * (std::fabs(oracle[i]) + std::sqrt(squared_sizes[i]));
    const double excess = std::fabs(double(widened(ours[i])) - oracle[i]) - allowed;
    worst = excess > worst || std::isnan(excess) ? excess : worst;
  }
  expect(worst == 0, what + " differs by " + std::to_string(worst) + " more than it may");
}

template <class Element>
void expect_right(const Layer& l, const Results<double>& oracle, const Results<double>& sizes) {
  // In units of the type's epsilon: float32 rounds every partial sum, bfloat16 only what is stored.
  const double epsilons = l.narrow ? 10 / 128. : 20 / 8388608.;
  const double longest_sum = double(std::max({l.T, l.D, 2 * l.F}));
  const double tolerance = epsilons * std::sqrt(std::fmax(1, longest_sum / 64));
  const int32_t element = l.narrow ? MOESAIC_BFLOAT16 : MOESAIC_FLOAT32;
  for (const char* const* name = moesaic_expert_kernels(element); *name; ++name) {
    const auto ours = computed<Element>(l, 1 + int(below(4)), *name);
    const std::string where = std::string(*name) + ", " + l.name();
    const auto compare = [&](const auto& one, const Numbers& expected, const Numbers& squared, const char* what) {
      expect_equal(one, expected, squared, tolerance, where + what);
    };
    compare(ours.y, oracle.y, sizes.y, "y");
    compare(ours.grad_x, oracle.grad_x, sizes.grad_x, "grad_x");
    compare(ours.grad_row_weights, oracle.grad_row_weights, sizes.grad_row_weights, "grad_row_weights");
    compare(ours.grad_gate_up, oracle.grad_gate_up, sizes.grad_gate_up, "grad_gate_up");
    compare(ours.grad_down, oracle.grad_down, sizes.grad_down, "grad_down");
    compare(ours.grad_gate_up_bias, oracle.grad_gate_up_bias, sizes.grad_gate_up_bias, "grad_gate_up_bias");
    compare(ours.grad_down_bias, oracle.grad_down_bias, sizes.grad_down_bias, "grad_down_bias");
  }
}

void test_layer() {
  const Layer layer;
  const Results<double> oracle = in_double(layer, activated), sizes = squared_sizes(layer);
  if (layer.narrow) {
    expect_right<BFloat16>(layer, oracle, sizes);
  } else {
    expect_right<float>(layer, oracle, sizes);
  }
}

// A linear layer in bfloat16 with every instruction set.
void test_linear() {
  const int64_t T = below(3) ? 1 + below(12) : 1 + below(400), N = 1 + below(150), K = 1 + below(300);
  const auto drawn = [](int64_t count) {
    std::normal_distribution<double> normal;
    Numbers numbers(static_cast<size_t>(count));
    for (double& one : numbers) one = double(widened(rounded(float(normal(random_bits)))));
    return numbers;
  };
  const Numbers x = drawn(T * K), weight = drawn(N * K), bias = drawn(N);
  const auto narrow_x = as_elements<BFloat16>(x), narrow_weight = as_elements<BFloat16>(weight);
  const auto narrow_bias = as_elements<BFloat16>(bias);
  const bool biased = below(2);
  Numbers oracle, sizes;
  for (int64_t i = 0; i < T * N; ++i) {
    double sum = biased ? bias[size_t(i % N)] : 0, size = sum * sum;
    for (int64_t k = 0; k < K; ++k) {
      const double term = x[size_t(i / N * K + k)] * weight[size_t(i % N * K + k)];
      sum += term, size += term * term;
    }
    oracle.push_back(sum), sizes.push_back(size);
  }
  const moesaic_linear_layer layer{N, K, narrow_weight.data(), biased ? narrow_bias.data() : nullptr};
  for (const char* const* name = moesaic_expert_kernels(MOESAIC_FLOAT32); *name; ++name) {
    std::vector<BFloat16> y(size_t(T * N));
    expect(moesaic_linear(&layer, narrow_x.data(), T, 1 + int(below(4)), *name, y.data()) == 0, "linear");
    expect_equal(y, oracle, sizes, 1 / 200., std::string(*name) + ", linear");
  }
}

void test_a_wrong_routing_is_refused() {
  const int64_t tokens[] = {0, 1, 2}, experts[] = {0, 4, 1};
  std::vector<int32_t> plan(size_t(moesaic_plan_size(2, 3, 4)));
  expect(moesaic_make_plan(tokens, experts, 2, 3, 4, plan.data()) == 1, "expert 4 of 4");
  expect(moesaic_make_plan(tokens, experts, 2, 3, 5, plan.data()) == 2, "token 2 of 2");
}

// Every index once, whoever else is at work, also from inside a task, where the thread has no others to help it.
void test_threads_run_every_task_once() {
  struct Counts {
    std::vector<std::atomic<int>> times;
    int threads;
  };
  const auto calls = [] {
    for (int call = 0; call < 200; ++call) {
      const int64_t num_tasks = call % 17;
      Counts counts{std::vector<std::atomic<int>>(size_t(num_tasks)), 1 + call % 5};
      const auto task = [](void* data, int64_t index, int worker) {
        Counts& counted = *static_cast<Counts*>(data);
        if (worker >= counted.threads) std::abort();
        counted.times[size_t(index)] += 1;
        const auto inner_task = [](void* times, int64_t, int inner_worker) {
          if (inner_worker != 0) std::abort();
          ++*static_cast<std::atomic<int>*>(times);
        };
        moesaic_parallel(4, 3, inner_task, &counted.times[size_t(index)]);
      };
      moesaic_parallel(counts.threads, num_tasks, task, &counts);
      for (const std::atomic<int>& times : counts.times) {
        if (times != 4) std::abort();
      }
      if (call % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the pool fall asleep
    }
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(calls);
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  test_threads_run_every_task_once();
  test_a_wrong_routing_is_refused();
  for (int64_t i = arguments.get(2, 40); i > 0; --i) test_layer(), test_linear();
  return verdict();
}
