// Packed linear layers and experts of every instruction set against plain loops in double. To be built with sanitizers:
// every array has exactly its size. The first argument seeds the random sizes and numbers. Prints what is wrong and exits
// with 1.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "packed_matrices.h"

namespace {

int linear(const moesaic_packed& weight, const float* bias, const float* x, int64_t T, int threads, const char* name,
           float* y) {
  const moesaic_packed_layer layer{weight, bias};
  return moesaic_packed_linear(&layer, 1, x, T, threads, name, &y);
}

// A row in whole multiples of each group's scale, and how far the computed one may be from it.
struct Rounded {
  std::vector<double> values, scales, errors;  // (K)
};

// As the kernels do it in float32, where `scales` and `values` are exactly theirs.
Rounded rounded_as_floats(const std::vector<double>& x, int64_t G) {
  Rounded r;
  for (size_t k = 0; k < x.size(); k += size_t(G)) {
    const size_t end = std::min(x.size(), k + size_t(G));
    float largest = 0;
    for (size_t i = k; i < end; ++i) largest = std::fmax(largest, std::fabs(float(x[i])));
    float scale = largest < 1e-30f ? 0.0f : largest / 127.0f;
    uint32_t scale_bits;
    std::memcpy(&scale_bits, &scale, 4);
    scale_bits &= ~3u;
    std::memcpy(&scale, &scale_bits, 4);
    for (size_t i = k; i < end; ++i) {
      const float ratio = scale == 0.0f ? 0.0f : float(x[i]) * (1.0f / scale);
      r.values.push_back(double(std::nearbyint(ratio)) * double(scale));
      r.scales.push_back(scale), r.errors.push_back(0);
    }
  }
  return r;
}

// Of numbers that are known up to `errors`: some may be rounded to the next multiple, and the scale may differ.
Rounded rounded_about(const std::vector<double>& x, const std::vector<double>& errors, int64_t G) {
  Rounded r;
  for (size_t k = 0; k < x.size(); k += size_t(G)) {
    const size_t end = std::min(x.size(), k + size_t(G));
    double largest = 0, error = 0;
    for (size_t i = k; i < end; ++i) {
      largest = std::fmax(largest, std::fabs(x[i])), error = std::fmax(error, errors[i]);
    }
    const double scale = largest / 127, doubt = scale > 0 ? 3 * error / scale + 1e-3 : 1;
    for (size_t i = k; i < end; ++i) {
      const double ratio = scale > 0 ? x[i] / scale : 0, whole = std::nearbyint(ratio);
      const bool doubtful = std::fabs(std::fabs(ratio - whole) - 0.5) < doubt;
      r.values.push_back(whole * scale), r.scales.push_back(scale);
      r.errors.push_back(error + (doubtful ? scale + 3 * error : 0));
    }
  }
  return r;
}

// A number and how far from it the computed one may be.
struct Result {
  double value = 0, tolerance = 1e-30;
};

// sum over k of w[k] x[k], up to the order of summation.
Result dot(const double* w, const Rounded& x) {
  Result result;
  for (size_t k = 0; k < x.values.size(); ++k) {
    result.value += w[k] * x.values[k];
    result.tolerance += std::fabs(w[k]) * (2e-6 * std::fabs(x.values[k]) + x.errors[k]);
  }
  return result;
}

std::vector<double> row(const std::vector<float>& x, int64_t at, int64_t columns) {
  return std::vector<double>(x.begin() + at * columns, x.begin() + (at + 1) * columns);
}

bool close(float ours, const Result& oracle) { return std::fabs(ours - oracle.value) <= oracle.tolerance; }

const int64_t widths[] = {1, 3, 15, 16, 17, 31, 32, 33, 40, 64, 70, 128, 257, 600, 1060};  // the last for inputs alone

void test_linear(int64_t most_rows) {
  const int64_t T = below(6) ? below(20) : below(most_rows);
  const Packed packed(1, widths[below(14)], below(4) ? widths[below(14)] : widths[14]);
  const int64_t N = packed.N, K = packed.K;
  std::vector<float> x = numbers(T * K, below(2) ? 1 : 1e-12);
  for (int64_t i = 0; i < T * K && below(4) == 0; i += 1 + below(70)) x[size_t(i)] = below(2) ? 0.0f : x[size_t(i)] * 50;
  if (T && below(4) == 0) std::fill(x.begin(), x.begin() + K, 0.0f);
  const std::vector<float> bias = numbers(N, 1);
  const bool biased = below(2);
  const moesaic_packed weight = packed.view();
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    std::vector<float> y(size_t(T * N)), again(size_t(T * N));
    const auto run = [&](int threads, std::vector<float>& out) {
      return linear(weight, biased ? bias.data() : nullptr, x.data(), T, threads, *name, out.data());
    };
    expect(run(1, y) == 0, "linear");
    expect(run(2 + int(below(2)), again) == 0, "linear on threads");
    const std::string where = *name + numbered(", linear T N K G bits", {T, N, K, packed.G, packed.bits});
    expect(y.empty() || !std::memcmp(y.data(), again.data(), y.size() * sizeof(float)), where + ": threads");
    int64_t wrong = 0, far = 0;
    for (int64_t t = 0; t < T; ++t) {
      const std::vector<double> x_row = row(x, t, K);
      const Rounded x_rounded = rounded_as_floats(x_row, packed.G);
      for (int64_t n = 0; n < N; ++n) {
        const double* const w = packed.weights.data() + n * K;
        const double added = biased ? bias[size_t(n)] : 0;
        Result tight = dot(w, x_rounded), loose;
        tight.value += added, tight.tolerance += 1e-6 * std::fabs(added);
        loose = tight, loose.value = added;
        for (int64_t k = 0; k < K; ++k) {
          loose.value += w[k] * x_row[size_t(k)];
          loose.tolerance += 0.5001 * std::fabs(w[k]) * x_rounded.scales[size_t(k)];
        }
        const float ours = y[size_t(t * N + n)];
        wrong += !close(ours, tight), far += !close(ours, loose);
      }
    }
    expect(wrong == 0, where + ": " + std::to_string(wrong) + " numbers");
    expect(far == 0, where + ": " + std::to_string(far) + " numbers too far from those of x as it is");
  }
}

// One layer: its sizes, inputs and routing.
struct Layer {
  int64_t T, N, E, D, F;
  bool clamped, biased;
  Packed gate_up, down;
  std::vector<float> x, row_weights, gate_up_bias, down_bias;
  std::vector<int64_t> token_ids, expert_ids;
  std::vector<int32_t> plan;

  Layer(int64_t most_rows, int64_t D_, int64_t F_)
      : T(below(4) ? below(20) : below(most_rows)),
        E(1 + below(6)),
        D(D_),
        F(F_),
        clamped(below(2)),
        biased(below(2)),
        gate_up(E, 2 * F, D),
        down(E, D, F) {
    N = T * (1 + below(3));
    const int64_t one_expert = below(3) ? -1 : below(E);
    for (int64_t n = 0; n < N; ++n) {
      token_ids.push_back(below(T));
      expert_ids.push_back(one_expert >= 0 ? one_expert : below(E));
    }
    x = numbers(T * D, 1), row_weights = numbers(N, 1);
    gate_up_bias = numbers(E * 2 * F, 1), down_bias = numbers(E * D, 1);
    plan.resize(size_t(moesaic_plan_size(T, N, E)));
    expect(moesaic_make_plan(token_ids.data(), expert_ids.data(), T, N, E, plan.data()) == -1, "plan refused");
  }

  moesaic_packed_experts view() const {
    moesaic_packed_experts experts{};
    experts.num_tokens = T, experts.num_rows = N, experts.num_experts = E;
    experts.hidden_size = D, experts.intermediate_size = F;
    experts.activation = clamped ? MOESAIC_CLAMPED_SWIGLU : MOESAIC_SWIGLU, experts.limit = 1.5f, experts.alpha = 1.3f;
    experts.plan = moesaic_plan_view(plan.data(), T, N, E);
    experts.x = x.data(), experts.row_weights = row_weights.data();
    experts.gate_up = gate_up.view(), experts.down = down.view();
    experts.gate_up_bias = biased ? gate_up_bias.data() : nullptr;
    experts.down_bias = biased ? down_bias.data() : nullptr;
    return experts;
  }
};

// Hidden units and how far the computed ones may be from them.
struct Hidden {
  std::vector<double> values, errors;

  // Of expert e, with pre-activations that are off by 2e-6 of the size of their terms.
  Hidden(const Layer& l, const std::vector<double>& x, int64_t e) {
    for (int64_t f = 0; f < l.F; ++f) {
      const Result gate = pre_activation(l, x, e, f), up = pre_activation(l, x, e, l.F + f);
      const double limit = 1.5, alpha = l.clamped ? double(1.3f) : 1.0;
      const double g = l.clamped ? std::fmin(gate.value, limit) : gate.value;
      const double u = l.clamped ? std::fmax(std::fmin(up.value, limit), -limit) + 1 : up.value;
      const double glu = g / (1 + std::exp(-alpha * g));
      values.push_back(u * glu);
      // The slope of g sigmoid(alpha g) is below 1.1.
      errors.push_back(1e-6 * std::fabs(u * glu) + 1.1 * std::fabs(u) * (gate.tolerance + 1e-6 * std::fabs(g)) +
                       std::fabs(glu) * (up.tolerance + 1e-6));
    }
  }

 private:
  static Result pre_activation(const Layer& l, const std::vector<double>& x, int64_t e, int64_t output) {
    const double* const w = l.gate_up.weights.data() + (e * 2 * l.F + output) * l.D;
    Result sum;
    sum.value = l.biased ? l.gate_up_bias[size_t(e * 2 * l.F + output)] : 0;
    sum.tolerance += 2e-6 * std::fabs(sum.value);
    for (int64_t d = 0; d < l.D; ++d) {
      sum.value += w[d] * x[size_t(d)], sum.tolerance += 2e-6 * std::fabs(w[d] * x[size_t(d)]);
    }
    return sum;
  }
};

// y (T, D) of inputs and hidden units that are rounded, and of such that are not.
struct Oracle {
  std::vector<Result> tight;
  std::vector<double> exact;

  explicit Oracle(const Layer& l) : tight(size_t(l.T * l.D)), exact(size_t(l.T * l.D)) {
    for (int64_t n = 0; n < l.N; ++n) add(l, l.token_ids[size_t(n)], l.expert_ids[size_t(n)], l.row_weights[size_t(n)]);
  }

 private:
  void add(const Layer& l, int64_t t, int64_t e, double weight) {
    const std::vector<double> x = row(l.x, t, l.D);
    const Hidden of_rounded(l, rounded_as_floats(x, l.gate_up.G).values, e), of_exact(l, x, e);
    const Rounded hidden = rounded_about(of_rounded.values, of_rounded.errors, l.down.G);
    for (int64_t d = 0; d < l.D; ++d) {
      const double* const w = l.down.weights.data() + (e * l.D + d) * l.F;
      const double bias = l.biased ? l.down_bias[size_t(e * l.D + d)] : 0;
      const Result sum = dot(w, hidden);
      Result& to = tight[size_t(t * l.D + d)];
      to.value += weight * (sum.value + bias);
      to.tolerance += std::fabs(weight) * (sum.tolerance + 2e-6 * std::fabs(bias));
      double exact_sum = bias;
      for (int64_t f = 0; f < l.F; ++f) exact_sum += w[f] * of_exact.values[size_t(f)];
      exact[size_t(t * l.D + d)] += weight * exact_sum;
    }
  }
};

void test_layer(int64_t most_rows) {
  const Layer layer(most_rows, widths[below(14)], widths[below(13)]);
  const Oracle oracle(layer);
  const moesaic_packed_experts experts = layer.view();
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    std::vector<float> y(oracle.exact.size()), again(oracle.exact.size());
    expect(moesaic_packed_experts_forward(&experts, 1, *name, y.data()) == 0, "experts");
    expect(moesaic_packed_experts_forward(&experts, 2 + int(below(2)), *name, again.data()) == 0, "experts on threads");
    const std::string where =
        *name + numbered(", experts T N E D F G bits G bits",
                         {layer.T, layer.N, layer.E, layer.D, layer.F, layer.gate_up.G, layer.gate_up.bits, layer.down.G,
                          layer.down.bits});
    expect(y.empty() || !std::memcmp(y.data(), again.data(), y.size() * sizeof(float)), where + ": threads");
    int64_t wrong = 0;
    double error = 0, size = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      wrong += !close(y[i], oracle.tight[i]);
      error += (y[i] - oracle.exact[i]) * (y[i] - oracle.exact[i]), size += oracle.exact[i] * oracle.exact[i];
    }
    expect(wrong == 0, where + ": " + std::to_string(wrong) + " numbers");
    // Each of the two roundings moves a number by at most 1 / 254 of its group's largest.
    expect(layer.D < 16 || layer.F < 16 || !(error > 0.05 * 0.05 * size), where + ": far from unrounded numbers");
  }
}

// In any order, and with other matrices between them.
void test_parts_give_what_the_whole_gives() {
  const Layer layer(30, widths[below(14)], widths[below(13)]);
  moesaic_packed_experts experts = layer.view();
  const std::string where = numbered("parts T N E D F", {layer.T, layer.N, layer.E, layer.D, layer.F});
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    const int threads = 1 + int(below(3));
    std::vector<float> whole(size_t(layer.T * layer.D)), summed(whole.size(), NAN), rows(size_t(layer.N * layer.D), NAN);
    experts.slots = nullptr;
    expect(moesaic_packed_experts_forward(&experts, threads, *name, whole.data()) == 0, "whole");
    std::vector<int32_t> part_of(size_t(layer.E));
    for (int32_t& part : part_of) part = int32_t(below(3));
    for (int32_t part = 2; part >= 0; --part) {
      std::vector<int32_t> slots(size_t(layer.E));
      for (size_t e = 0; e < slots.size(); ++e) slots[e] = part_of[e] == part ? int32_t(e) : -1;
      experts.slots = slots.data();
      expect(moesaic_packed_experts_rows(&experts, threads, *name, rows.data()) == 0, "rows");
    }
    expect(moesaic_sum_rows(&experts.plan, layer.T, layer.N, layer.D, rows.data(), layer.row_weights.data(), threads,
                            *name, summed.data()) == 0, "sum");
    expect(whole.empty() || !std::memcmp(whole.data(), summed.data(), whole.size() * sizeof(float)), *name + where);
  }
}

void test_what_is_not_finite_stays_so() {
  const Packed packed(1, 20, 70);
  const moesaic_packed weight = packed.view();
  const double bad[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()};
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    std::vector<float> x = numbers(2 * 70, 1), y(2 * 20);
    x[size_t(below(70))] = float(bad[below(2)]);
    expect(linear(weight, nullptr, x.data(), 2, 1, *name, y.data()) == 0, "linear");
    for (int n = 0; n < 20; ++n) {
      expect(!std::isfinite(y[size_t(n)]), std::string(*name) + ": finite results of what is not");
      expect(std::isfinite(y[size_t(20 + n)]), std::string(*name) + ": another row's numbers");
    }
  }
}

void test_layers_of_the_same_inputs() {
  const int64_t T = below(30), K = 1 + below(300), several = 2 + below(3);
  const std::vector<float> x = numbers(T * K), bias = numbers(100);
  std::vector<Packed> matrices;
  for (int64_t i = 0; i < several; ++i) matrices.emplace_back(1, 1 + below(100), K);
  std::vector<moesaic_packed_layer> layers;
  for (const Packed& matrix : matrices) layers.push_back({matrix.view(), below(2) ? bias.data() : nullptr});
  for (const char* const* name = moesaic_packed_kernels(); *name; ++name) {
    std::vector<std::vector<float>> together, alone;
    std::vector<float*> ys;
    for (const Packed& matrix : matrices) together.emplace_back(size_t(T * matrix.N)), alone.push_back(together.back());
    for (std::vector<float>& y : together) ys.push_back(y.data());
    expect(moesaic_packed_linear(layers.data(), several, x.data(), T, 1 + int(below(3)), *name, ys.data()) == 0, "layers");
    for (int64_t i = 0; i < several; ++i) {
      const moesaic_packed_layer& layer = layers[size_t(i)];
      expect(linear(layer.weight, layer.bias, x.data(), T, 1, *name, alone[size_t(i)].data()) == 0, "layer");
    }
    expect(together == alone, std::string(*name) + ": layers of the same inputs give other numbers together");
  }
}

void test_no_rows_are_no_failure() {
  const Packed packed(1, 20, 70);
  const moesaic_packed weight = packed.view();
  expect(linear(weight, nullptr, nullptr, 0, 2, "", nullptr) == 0, "linear without rows");
}

void test_wrong_formats_are_refused() {
  const Packed packed(1, 20, 70);
  std::vector<float> x(70), y(20);
  moesaic_packed weight = packed.view();
  expect(linear(weight, nullptr, x.data(), 1, 1, "mmx", y.data()) == -1, "instruction set mmx");
  weight.group_size = 48;
  expect(linear(weight, nullptr, x.data(), 1, 1, "", y.data()) == -3, "groups of 48");
  weight = packed.view(), weight.bits = 5;
  expect(linear(weight, nullptr, x.data(), 1, 1, "", y.data()) == -3, "5 bits");
  const Layer layer(10, 32, 32);
  moesaic_packed_experts experts = layer.view();
  experts.down.columns += 1;
  expect(moesaic_packed_experts_forward(&experts, 1, "", y.data()) == -3, "down of another size");
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments(argc, argv);
  const int64_t most_rows = arguments.get(3, 420);
  test_no_rows_are_no_failure();  // the first call of the process: no memory is there yet
  test_wrong_formats_are_refused();
  for (int64_t i = arguments.get(2, 40); i > 0; --i) {
    test_what_is_not_finite_stays_so();
    test_linear(most_rows);
    test_layers_of_the_same_inputs();
    test_layer(most_rows);
    test_parts_give_what_the_whole_gives();
  }
  return verdict();
}
