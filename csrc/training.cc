// What training does between matrix products, in one pass over memory each. Shapes: see kernels.h; g is the gradient of
// a result, dx that of x.
#include "training.h"

#include <cmath>

#include "simd.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kWorthSharing = 1 << 15;  // numbers; some 5 microseconds
constexpr int64_t kChunkRows = 64;          // whose share of a sum over rows is added up by itself, whoever works

// gate' = min(gate, limit), s = sigmoid(alpha gate'), up' = clip(up, -limit, limit) + 1; NaN stays.
struct Swiglu {
  Vf gate, up, sigmoid_of_gate;
};
OSSIA_INLINE Swiglu swiglu_parts(Vf gate, Vf up, Vf limit) {
  gate = min(limit, gate);
  up = add(max(sub(zero(), limit), min(limit, up)), set1(1.0f));
  return {gate, up, sigmoid(mul(set1(kSwigluAlpha), gate))};
}

// inner[n, f] = gate'[n, f] s[n, f] up'[n, f]
template <class Number>
void swiglu_of(Workspace& work, const Number* gate_up, float limit, int64_t rows, int64_t dim, Number* inner) {
  work.pool.for_each(rows, rows * dim >= kWorthSharing, [&](int64_t n, int) {
    const Number* gate = gate_up + n * 2 * dim;
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Swiglu part = swiglu_parts(load_up_to(gate + i, dim - i), load_up_to(gate + dim + i, dim - i), set1(limit));
      store_up_to(inner + n * dim + i, dim - i, mul(mul(part.gate, part.sigmoid_of_gate), part.up));
    }
  });
}

// dots[n] = inner[n, f] dinner[n, f];  dpre[n, (gate, up) f] = weights[n] dinner[n, f] d inner[n, f] / d (gate, up)[n, f]
//   d inner / d gate = s (1 + alpha gate' (1 - s)) up', nothing beyond the limit
//   d inner / d up   = gate' s, nothing beyond the limits
template <class Number>
void swiglu_backward_of(Workspace& work, const Number* gate_up, const Number* dinner, const float* weights, float limit,
                        int64_t rows, int64_t dim, Number* dpre, float* dots) {
  work.pool.for_each(rows, rows * dim >= kWorthSharing, [&](int64_t n, int) {
    const Number* gates = gate_up + n * 2 * dim;
    Number* dgates = dpre + n * 2 * dim;
    const Vf most = set1(limit), weight = set1(weights[n]);
    Vf dot = zero();
    for (int64_t i = 0; i < dim; i += kLanes) {
      const int64_t left = dim - i;
      const Vf gate = load_up_to(gates + i, left), up = load_up_to(gates + dim + i, left);
      const Vf g = load_up_to(dinner + n * dim + i, left), weighted = mul(g, weight);
      const Swiglu part = swiglu_parts(gate, up, most);
      const Vf glu = mul(part.gate, part.sigmoid_of_gate);
      const Vf bend = mul(mul(set1(kSwigluAlpha), glu), sub(set1(1.0f), part.sigmoid_of_gate));
      const Vf slope = mul(add(part.sigmoid_of_gate, bend), part.up);
      dot = fma(mul(glu, part.up), g, dot);
      store_up_to(dgates + i, left, where_less(most, gate, zero(), mul(slope, weighted)));
      const Vf size = max(sub(zero(), up), up);
      store_up_to(dgates + dim + i, left, where_less(most, size, zero(), mul(glu, weighted)));
    }
    dots[n] = sum_lanes(dot);
  });
}

// out[n, d] = weights[n] source[indices[n], d], and zeros from row `count` on
template <class From, class To>
void take_rows_of(Workspace& work, const From* source, const int64_t* indices, const float* weights, int64_t count,
                  int64_t num_out, int64_t dim, To* out) {
  work.pool.for_each(num_out, num_out * dim >= kWorthSharing, [&](int64_t n, int) {
    To* to = out + n * dim;
    if (n >= count) {
      std::memset(to, 0, dim * sizeof *to);
      return;
    }
    const From* from = source + indices[n] * dim;
    const Vf weight = set1(weights ? weights[n] : 1.0f);
    for (int64_t i = 0; i < dim; i += kLanes) store_up_to(to + i, dim - i, mul(weight, load_up_to(from + i, dim - i)));
  });
}

// out[indices[n], d] += weights[n] rows[n, d]; every index once
template <class Number>
void add_rows_of(Workspace& work, const Number* rows, const int64_t* indices, const float* weights, int64_t count,
                 int64_t dim, float* out) {
  work.pool.for_each(count, count * dim >= kWorthSharing, [&](int64_t n, int) {
    const Number* from = rows + n * dim;
    float* to = out + indices[n] * dim;
    const Vf weight = set1(weights ? weights[n] : 1.0f);
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Vf product = mul(weight, load_up_to(from + i, dim - i));
      store_up_to(to + i, dim - i, add(load_up_to(to + i, dim - i), product));
    }
  });
}

// The numbers of E2M1 that are nearest to 32 magnitudes below 16, ties to the even code: codes are steps of 0.5 up to 2, of
// 1 up to 4, of 2 up to 6. Gives the sum of squared errors, halves added to halves.
OSSIA_INLINE float nearest_numbers(const float* x, float unit, float* out) {
  constexpr float kRound = 0x1p23f;  // beyond it floats are whole numbers: adding it rounds to one, ties to even
  float errors[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const float magnitude = x[i] * unit;
    float code = (magnitude + magnitude + kRound) - kRound;
    code = least(code, (magnitude + kRound) - kRound + 2);
    code = least(code, (magnitude * 0.5f + kRound) - kRound + 4);
    code = least(code, 7.0f);
    out[i] = greatest(greatest(code * 0.5f, code - 2), code * 2 - 8);
    const float difference = magnitude - out[i];
    errors[i] = difference * difference;
  }
  for (int half = kBlock / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) errors[i] += errors[i + half];
  return errors[0];
}

// As `quantize` and `dequantize` of ossia/ops/mxfp4.py with the rule "best", step by step, so that all bits are the same.
OSSIA_INLINE void round_block(const float* x, float* out) {
  constexpr int kBias = 127;
  uint32_t largest_bits = 0;
  for (int i = 0; i < kBlock; ++i) largest_bits = greatest(largest_bits, bits_as<uint32_t>(x[i]) & 0x7fffffff);
  if (largest_bits >= 0x7f800000) {
    for (int i = 0; i < kBlock; ++i) out[i] = bits_as<float>(0x7fc00000u);
    return;
  }
  const auto power = [](int exponent) { return power_of_scale(static_cast<uint8_t>(exponent + kBias)); };
  // The largest of E2M1's powers of two is 4 = 2^2; below the smallest scale's reach all is counted in that scale.
  const int exponent = greatest(static_cast<int>(largest_bits >> 23) - kBias - 2, -kBias);
  float scaled[kBlock], numbers[kBlock], other[kBlock], largest = 0;
  for (int i = 0; i < kBlock; ++i) {
    scaled[i] = std::fabs(x[i]) * power(-exponent);
    largest = greatest(largest, scaled[i]);
  }
  const float error = nearest_numbers(scaled, 1, numbers);
  float least_error = error;
  const auto try_scale = [&](int step, float unit) {
    if (exponent + step < -kBias) return;
    const float other_error = nearest_numbers(scaled, 1 / unit, other) * (unit * unit);
    if (!(other_error < least_error)) return;
    least_error = other_error;
    for (int i = 0; i < kBlock; ++i) numbers[i] = other[i] * unit;
  };
  if (largest > 7) try_scale(1, 2);
  if (error > (largest - 3) * (largest - 3)) try_scale(-1, 0.5f);
  for (int i = 0; i < kBlock; ++i) out[i] = std::copysign(numbers[i] * power(exponent), x[i]);
}

}  // namespace

void round_mxfp4(Workspace& work, const float* x, int64_t num_blocks, float* out) {
  constexpr int64_t kBlocks = 256;
  work.pool.for_each(divide_up(num_blocks, kBlocks), num_blocks * kBlock >= kWorthSharing, [&](int64_t chunk, int) {
    for (int64_t b = chunk * kBlocks; b < least((chunk + 1) * kBlocks, num_blocks); ++b)
      round_block(x + b * kBlock, out + b * kBlock);
  });
}

// With r = 1 / sqrt(mean_d x[t, d]^2 + eps) and m = mean_d g[t, d] scale[d] x[t, d]:
//   dx[t, d] = r g[t, d] scale[d] - r^3 m x[t, d];  dscale[d] = g[t, d] r x[t, d]
void rms_norm_backward(Workspace& work, const float* x, const float* scale, float eps, const float* g, int64_t num_tokens,
                       int64_t dim, float* dx, float* dscale) {
  const int64_t num_chunks = divide_up(num_tokens, kChunkRows);
  float* partial = work.partial.get<float>(num_chunks * dim);
  work.pool.for_each(num_chunks, num_tokens * dim >= kWorthSharing, [&](int64_t chunk, int) {
    float* sums = partial + chunk * dim;
    std::memset(sums, 0, dim * sizeof *sums);
    for (int64_t t = chunk * kChunkRows; t < least((chunk + 1) * kChunkRows, num_tokens); ++t) {
      const float *row = x + t * dim, *g_row = g + t * dim;
      Vf squares = zero(), products = zero();
      for (int64_t i = 0; i < dim; i += kLanes) {
        const Vf lanes = load_up_to(row + i, dim - i);
        squares = fma(lanes, lanes, squares);
        products = fma(mul(load_up_to(g_row + i, dim - i), load_up_to(scale + i, dim - i)), lanes, products);
      }
      const float count = static_cast<float>(dim);
      const float r = 1.0f / std::sqrt(sum_lanes(squares) / count + eps);
      const Vf factor = set1(r), back = set1(r * r * r * (sum_lanes(products) / count));
      for (int64_t i = 0; i < dim; i += kLanes) {
        const int64_t left = dim - i;
        const Vf lanes = load_up_to(row + i, left), g_scaled = mul(load_up_to(g_row + i, left), factor);
        store_up_to(dx + t * dim + i, left, sub(mul(g_scaled, load_up_to(scale + i, left)), mul(back, lanes)));
        store_up_to(sums + i, left, fma(g_scaled, lanes, load_up_to(sums + i, left)));
      }
    }
  });
  std::memset(dscale, 0, dim * sizeof *dscale);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk)
    for (int64_t d = 0; d < dim; ++d) dscale[d] += partial[chunk * dim + d];
}

void swiglu(Workspace& work, const Rows& gate_up, float limit, int64_t rows, int64_t dim, const Rows& inner) {
  if (gate_up.floats) {
    swiglu_of(work, gate_up.floats, limit, rows, dim, inner.floats);
  } else {
    swiglu_of(work, gate_up.bf16, limit, rows, dim, inner.bf16);
  }
}

void swiglu_backward(Workspace& work, const Rows& gate_up, const Rows& dinner, const float* weights, float limit, int64_t rows,
                     int64_t dim, const Rows& dpre, float* dots) {
  if (gate_up.floats) {
    swiglu_backward_of(work, gate_up.floats, dinner.floats, weights, limit, rows, dim, dpre.floats, dots);
  } else {
    swiglu_backward_of(work, gate_up.bf16, dinner.bf16, weights, limit, rows, dim, dpre.bf16, dots);
  }
}

void take_rows(Workspace& work, const Rows& source, const int64_t* indices, const float* weights, int64_t count,
               int64_t num_out, int64_t dim, const Rows& out) {
  if (source.floats && out.floats) {
    take_rows_of(work, source.floats, indices, weights, count, num_out, dim, out.floats);
  } else if (source.floats) {
    take_rows_of(work, source.floats, indices, weights, count, num_out, dim, out.bf16);
  } else if (out.floats) {
    take_rows_of(work, source.bf16, indices, weights, count, num_out, dim, out.floats);
  } else {
    take_rows_of(work, source.bf16, indices, weights, count, num_out, dim, out.bf16);
  }
}

void add_rows(Workspace& work, const Rows& rows, const int64_t* indices, const float* weights, int64_t count, int64_t dim,
              float* out) {
  if (rows.floats) {
    add_rows_of(work, rows.floats, indices, weights, count, dim, out);
  } else {
    add_rows_of(work, rows.bf16, indices, weights, count, dim, out);
  }
}

}  // namespace ossia::OSSIA_NS
