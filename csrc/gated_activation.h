// The gated activations on vectors, with their slopes, as moesaic.ops.activation defines them. Internal linkage, like
// matrix_product.h.
#pragma once

#include "experts.h"

namespace {

// e to the power of x, to about 1e-7 relative; x within -87 .. 88.
inline Vector exponential(Vector x) {
  const Vector n = round_to_integer(x * Vector::fill(1.44269504f));
  // ln 2 in two parts, the first with few digits, so that n times it is exact.
  const Vector r = multiply_add(n, Vector::fill(2.12194440e-4f), multiply_add(n, Vector::fill(-0.693359375f), x));
  // The series of the exponential; the first term left out is below 6e-9 for |r| <= ln(2) / 2.
  Vector sum = Vector::fill(1.0f / 5040);
  sum = multiply_add(sum, r, Vector::fill(1.0f / 720));
  sum = multiply_add(sum, r, Vector::fill(1.0f / 120));
  sum = multiply_add(sum, r, Vector::fill(1.0f / 24));
  sum = multiply_add(sum, r, Vector::fill(1.0f / 6));
  sum = multiply_add(sum, r, Vector::fill(0.5f));
  sum = multiply_add(sum, r, Vector::fill(1.0f));
  sum = multiply_add(sum, r, Vector::fill(1.0f));
  return times_power_of_two(sum, n);
}

inline Vector sigmoid(Vector x) {
  const Vector one = Vector::fill(1.0f);
  const Vector negative = at_least(at_most(Vector::fill(0.0f) - x, Vector::fill(88.0f)), Vector::fill(-87.0f));
  return one / (one + exponential(negative));
}

struct Hidden {
  Vector value, gate_slope, up_slope;
};

// d/dg of g s(g) with s(g) = sigmoid(alpha g), where silu = g s.
inline Vector silu_slope(Vector s, Vector silu, Vector alpha) {
  return multiply_add(alpha * silu, Vector::fill(1.0f) - s, s);
}

struct Swiglu {
  template <class Experts>
  explicit Swiglu(const Experts&) {}

  Hidden operator()(Vector gate, Vector up) const {
    const Vector s = sigmoid(gate), silu = gate * s;
    return {silu * up, silu_slope(s, silu, Vector::fill(1.0f)) * up, silu};
  }
};

struct ClampedSwiglu {
  Vector limit, alpha;

  template <class Experts>
  explicit ClampedSwiglu(const Experts& experts)
      : limit(Vector::fill(experts.limit)), alpha(Vector::fill(experts.alpha)) {}

  Hidden operator()(Vector gate, Vector up) const {
    const Vector zero = Vector::fill(0.0f), one = Vector::fill(1.0f);
    const Vector g = at_most(gate, limit), u = at_least(at_most(up, limit), zero - limit) + one;
    const Vector s = sigmoid(alpha * g), glu = g * s;
    const Vector up_slope = where_at_most(zero - limit, up, where_at_most(up, limit, glu));
    return {u * glu, where_at_most(gate, limit, silu_slope(s, glu, alpha) * u), up_slope};
  }
};

}  // namespace
