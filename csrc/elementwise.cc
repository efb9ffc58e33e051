// Rows at a time: embed, rms_norm, rope. Shapes: see kernels.h.
#include "elementwise.h"

#include <cmath>

#include "dot.h"

namespace ossia::OSSIA_NS {
namespace {

constexpr int64_t kWorthSharing = 1 << 15;  // numbers; some 5 microseconds

template <Format kFormat>
void widen_row(const uint8_t* row, int64_t cols, float* out) {
  for (int64_t i = 0; i < cols; ++i) out[i] = Numbers<kFormat>::one(row + i * Numbers<kFormat>::kBytes);
}

}  // namespace

void embed(Workspace& work, const Matrix& table, const int32_t* ids, int64_t num_tokens, float* out) {
  const int64_t dim = table.cols;
  work.pool.for_each(num_tokens, num_tokens * dim >= kWorthSharing, [&](int64_t t, int) {
    const uint8_t* row = table.data + ids[t] * table.row_stride;
    float* x = out + t * dim;
    switch (table.format) {
      case Format::kF32: return widen_row<Format::kF32>(row, dim, x);
      case Format::kBf16: return widen_row<Format::kBf16>(row, dim, x);
      case Format::kF16: return widen_row<Format::kF16>(row, dim, x);
      default: break;
    }
    // Q8_0 as it stands in the file: int8 [row, b, 32], float16 [row, b].
    for (int64_t b = 0; b < dim / kBlock; ++b) {
      const int8_t* q = reinterpret_cast<const int8_t*>(row + b * table.block_stride);
      const float d = half_to_float(load_u16(table.scales + ids[t] * table.scale_row_stride + b * table.scale_block_stride));
      for (int i = 0; i < kBlock; ++i) x[b * kBlock + i] = d * q[i];
    }
  });
}

void rms_norm(Workspace& work, const float* x, const float* scale, float eps, int64_t num_tokens, int64_t dim, float* out) {
  work.pool.for_each(num_tokens, num_tokens * dim >= kWorthSharing, [&](int64_t t, int) {
    const float* row = x + t * dim;
    float* normed = out + t * dim;
    Vf squares[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes)
      for (int part = 0; part < 4; ++part) {
        const Vf lanes = load(row + i + part * kLanes);
        squares[part] = fma(lanes, lanes, squares[part]);
      }
    float sum = sum_lanes(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    for (; i < dim; ++i) sum += row[i] * row[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (i = 0; i + kLanes <= dim; i += kLanes)
      store(normed + i, mul(mul(load(row + i), set1(factor)), load(scale + i)));
    for (; i < dim; ++i) normed[i] = row[i] * factor * scale[i];
  });
}

void rope(Workspace& work, float* x, const float* cos, const float* sin, int64_t num_tokens, int64_t heads, int64_t dim) {
  const int64_t pairs = dim / 2;
  work.pool.for_each(num_tokens, num_tokens * heads * dim >= kWorthSharing, [&](int64_t t, int) {
    const float* c = cos + t * pairs;
    const float* s = sin + t * pairs;
    for (int64_t h = 0; h < heads; ++h) {
      float* first = x + (t * heads + h) * dim;
      float* second = first + pairs;
      int64_t i = 0;
      for (; i + kLanes <= pairs; i += kLanes) {
        const Vf a = load(first + i), b = load(second + i), cos_lanes = load(c + i), sin_lanes = load(s + i);
        store(first + i, sub(mul(a, cos_lanes), mul(b, sin_lanes)));
        store(second + i, add(mul(b, cos_lanes), mul(a, sin_lanes)));
      }
      for (; i < pairs; ++i) {
        const float a = first[i], b = second[i];
        first[i] = a * c[i] - b * s[i];
        second[i] = b * c[i] + a * s[i];
      }
    }
  });
}

}  // namespace ossia::OSSIA_NS
