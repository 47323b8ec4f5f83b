// The experts of every instruction set against plain loops in double, and the threads. To be built with sanitizers: every
// array has exactly its size. The first argument seeds the random sizes and numbers. Prints what is wrong and exits with 1.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "experts.h"
#include "thread_pool.h"

namespace {

std::mt19937 random_bits;
int failures = 0;

int64_t below(int64_t count) { return int64_t(random_bits() % uint64_t(count)); }

std::vector<float> numbers(int64_t count, double size) {
  std::normal_distribution<double> normal(0.0, size);
  std::vector<float> drawn(static_cast<size_t>(count));
  for (float& one : drawn) one = float(normal(random_bits));
  return drawn;
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("wrong: %s\n", what.c_str());
}

// One layer: its sizes, inputs and routing.
struct Layer {
  int64_t T, N, E, D, F;
  bool clamped, biased;
  std::vector<float> x, row_weights, gate_up, down, gate_up_bias, down_bias, grad_y;
  std::vector<int64_t> token_ids, expert_ids;
  std::vector<int32_t> plan;

  Layer() {
    const int64_t widths[] = {1, 3, 15, 16, 17, 31, 32, 33, 40, 64, 70, 257};
    T = below(3) ? 1 + below(40) : below(2) ? 0 : 400;
    E = 1 + below(6), N = T ? T * (1 + below(2)) : 0;
    D = widths[below(12)], F = widths[below(12)];
    clamped = below(2), biased = below(2);
    const int64_t one_expert = below(3) ? -1 : below(E);
    for (int64_t n = 0; n < N; ++n) {
      token_ids.push_back(below(T));
      expert_ids.push_back(one_expert >= 0 ? one_expert : below(E));
    }
    x = numbers(T * D, 1), grad_y = numbers(T * D, 1), row_weights = numbers(N, 1);
    gate_up = numbers(E * 2 * F * D, 1 / std::sqrt(double(D))), down = numbers(E * D * F, 1 / std::sqrt(double(F)));
    gate_up_bias = numbers(E * 2 * F, 1), down_bias = numbers(E * D, 1);
    plan.resize(size_t(moesaic_plan_size(T, N, E)));
    expect(moesaic_make_plan(token_ids.data(), expert_ids.data(), T, N, E, plan.data()) == -1, "plan refused");
  }

  moesaic_experts view() const {
    const moesaic_plan rows = moesaic_plan_view(plan.data(), T, N, E);
    return {T,        N,        E,
            D,        F,        clamped ? MOESAIC_CLAMPED_SWIGLU : MOESAIC_SWIGLU,
            1.5f,     1.3f,     rows,
            x.data(), row_weights.data(), gate_up.data(),
            down.data(), biased ? gate_up_bias.data() : nullptr, biased ? down_bias.data() : nullptr};
  }
};

// What a pass computes; of the oracle in double.
template <class Number>
struct Results {
  std::vector<Number> y, grad_x, grad_row_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias;

  explicit Results(const Layer& l)
      : y(size_t(l.T * l.D)),
        grad_x(size_t(l.T * l.D)),
        grad_row_weights(size_t(l.N)),
        grad_gate_up(size_t(l.E * 2 * l.F * l.D)),
        grad_down(size_t(l.E * l.D * l.F)),
        grad_gate_up_bias(size_t(l.biased ? l.E * 2 * l.F : 0)),
        grad_down_bias(size_t(l.biased ? l.E * l.D : 0)) {}
};

Results<float> computed(const Layer& l, int threads, const char* instruction_set) {
  Results<float> r(l);
  std::vector<float> pre_activations(size_t(l.N * 2 * l.F));
  const moesaic_experts experts = l.view();
  expect(moesaic_experts_forward(&experts, threads, instruction_set, pre_activations.data(), r.y.data()) == 0, "forward");
  moesaic_expert_gradients gradients{r.grad_x.data(),
                                     r.grad_row_weights.data(),
                                     r.grad_gate_up.data(),
                                     r.grad_down.data(),
                                     l.biased ? r.grad_gate_up_bias.data() : nullptr,
                                     l.biased ? r.grad_down_bias.data() : nullptr};
  expect(moesaic_experts_backward(&experts, threads, instruction_set, pre_activations.data(), l.grad_y.data(),
                                  &gradients) == 0,
         "backward");
  return r;
}

struct Unit {
  double value, gate_slope, up_slope;
};

Unit activated(bool clamped, double gate, double up) {
  const double limit = 1.5, alpha = clamped ? double(1.3f) : 1.0;
  const double g = clamped ? std::fmin(gate, limit) : gate;
  const double u = clamped ? std::fmax(std::fmin(up, limit), -limit) + 1 : up;
  const double s = 1 / (1 + std::exp(-alpha * g));
  const double gate_slope = u * (s + alpha * g * s * (1 - s));
  return {u * g * s, clamped && gate > limit ? 0 : gate_slope, clamped && std::fabs(up) > limit ? 0 : g * s};
}

// One row of expert e, there and back.
void add_row(const Layer& l, int64_t n, Results<double>& r) {
  const int64_t D = l.D, F = l.F, t = l.token_ids[size_t(n)], e = l.expert_ids[size_t(n)];
  const float* const x = l.x.data() + t * D;
  const float* const grad_y = l.grad_y.data() + t * D;
  const double weight = l.row_weights[size_t(n)];
  std::vector<double> pre(size_t(2 * F)), grad_pre(size_t(2 * F));
  for (int64_t f = 0; f < 2 * F; ++f) {
    double sum = l.biased ? l.gate_up_bias[size_t(e * 2 * F + f)] : 0;
    for (int64_t d = 0; d < D; ++d) sum += double(l.gate_up[size_t((e * 2 * F + f) * D + d)]) * x[d];
    pre[size_t(f)] = sum;
  }
  double grad_weight = 0;
  for (int64_t f = 0; f < F; ++f) {
    const Unit unit = activated(l.clamped, pre[size_t(f)], pre[size_t(F + f)]);
    double grad = 0;
    for (int64_t d = 0; d < D; ++d) {
      const size_t at = size_t((e * D + d) * F + f);
      r.y[size_t(t * D + d)] += weight * l.down[at] * unit.value;
      r.grad_down[at] += weight * grad_y[d] * unit.value;
      grad += double(l.down[at]) * grad_y[d];
    }
    grad_weight += grad * unit.value;
    grad_pre[size_t(f)] = weight * grad * unit.gate_slope;
    grad_pre[size_t(F + f)] = weight * grad * unit.up_slope;
  }
  for (int64_t d = 0; d < D && l.biased; ++d) {
    r.y[size_t(t * D + d)] += weight * l.down_bias[size_t(e * D + d)];
    r.grad_down_bias[size_t(e * D + d)] += weight * grad_y[d];
    grad_weight += double(l.down_bias[size_t(e * D + d)]) * grad_y[d];
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

// Whether a pre-activation is so near a limit that rounding may carry it across, where the slope jumps.
bool near_a_limit(const Layer& l) {
  if (!l.clamped) return false;
  for (int64_t n = 0; n < l.N; ++n) {
    const int64_t t = l.token_ids[size_t(n)], e = l.expert_ids[size_t(n)];
    for (int64_t f = 0; f < 2 * l.F; ++f) {
      double sum = l.biased ? l.gate_up_bias[size_t(e * 2 * l.F + f)] : 0;
      for (int64_t d = 0; d < l.D; ++d) {
        sum += double(l.gate_up[size_t((e * 2 * l.F + f) * l.D + d)]) * l.x[size_t(t * l.D + d)];
      }
      if (std::fabs(std::fabs(sum) - 1.5) < 1e-5) return true;
    }
  }
  return false;
}

void expect_equal(const std::vector<float>& ours, const std::vector<double>& oracle, const std::string& what) {
  double size = 0, worst = 0;
  for (double one : oracle) size += one * one;
  size = std::sqrt(size / double(oracle.size() + 1)) + 1e-3;
  for (size_t i = 0; i < oracle.size(); ++i) {
    const double error = std::fabs(ours[i] - oracle[i]) / (size + std::fabs(oracle[i]));
    worst = error > worst || std::isnan(error) ? error : worst;
  }
  expect(worst < 1e-4, what + " differs by " + std::to_string(worst));
}

void test_layer() {
  const Layer layer;
  if (near_a_limit(layer)) return;
  Results<double> oracle(layer);
  for (int64_t n = 0; n < layer.N; ++n) add_row(layer, n, oracle);
  for (const char* const* name = moesaic_expert_kernels(); *name; ++name) {
    const Results<float> ours = computed(layer, 1 + int(below(4)), *name);
    const std::string where = std::string(*name) + ", T " + std::to_string(layer.T) + " N " + std::to_string(layer.N) +
                              " E " + std::to_string(layer.E) + " D " + std::to_string(layer.D) + " F " +
                              std::to_string(layer.F) + ": ";
    expect_equal(ours.y, oracle.y, where + "y");
    expect_equal(ours.grad_x, oracle.grad_x, where + "grad_x");
    expect_equal(ours.grad_row_weights, oracle.grad_row_weights, where + "grad_row_weights");
    expect_equal(ours.grad_gate_up, oracle.grad_gate_up, where + "grad_gate_up");
    expect_equal(ours.grad_down, oracle.grad_down, where + "grad_down");
    expect_equal(ours.grad_gate_up_bias, oracle.grad_gate_up_bias, where + "grad_gate_up_bias");
    expect_equal(ours.grad_down_bias, oracle.grad_down_bias, where + "grad_down_bias");
  }
}

void test_a_wrong_routing_is_refused() {
  const int64_t tokens[] = {0, 1, 2}, experts[] = {0, 4, 1};
  std::vector<int32_t> plan(size_t(moesaic_plan_size(2, 3, 4)));
  expect(moesaic_make_plan(tokens, experts, 2, 3, 4, plan.data()) == 1, "expert 4 of 4");
  expect(moesaic_make_plan(tokens, experts, 2, 3, 5, plan.data()) == 2, "token 2 of 2");
}

// Every index once, whoever else is at work, also from inside a task.
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
        moesaic_parallel(4, 3, [](void* inner, int64_t, int) { ++*static_cast<std::atomic<int>*>(inner); },
                         &counted.times[size_t(index)]);
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
  random_bits.seed(argc > 1 ? unsigned(std::atoll(argv[1])) : 0);
  const int layers = argc > 2 ? std::atoi(argv[2]) : 40;
  test_threads_run_every_task_once();
  test_a_wrong_routing_is_refused();
  for (int i = 0; i < layers; ++i) test_layer();
  std::printf("%d wrong\n", failures);
  return failures ? 1 : 0;
}
