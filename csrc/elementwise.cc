// Rows at a time: embed, rms_norm, rope, dequantize. Shapes: see kernels.h.
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

// The 16 numbers of E2M1, and 16 codes as those numbers times a scale.
alignas(64) constexpr float kNumbers[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

OSSIA_INLINE void widen_codes(const uint8_t* codes, float scale, float* out) {
#if OSSIA_512
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  store(out, mul(_mm512_permutexvar_ps(index, _mm512_load_ps(kNumbers)), set1(scale)));
#elif OSSIA_256
  for (int i = 0; i < 16; i += 8) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    // The fourth bit is the sign, and the permutation looks at three.
    const Vf sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(index, 3), 31));
    const Vf magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kNumbers), index);
    store(out + i, mul(_mm256_xor_ps(magnitude, sign), set1(scale)));
  }
#else
  for (int i = 0; i < 16; ++i) out[i] = kNumbers[codes[i]] * scale;
#endif
}

// 2^(scale - 127); 255 is NaN.
OSSIA_INLINE float power_of_scale(uint8_t scale) {
  if (scale == 255) return bits_as<float>(0x7fc00000u);
  return bits_as<float>(scale ? static_cast<uint32_t>(scale) << 23 : 0x00400000u);
}

// A number of MXFP4 has two significant bits, so that its float's upper half is its bfloat16.
OSSIA_INLINE void store_numbers(const float* numbers, float* out) { std::memcpy(out, numbers, kBlock * sizeof(float)); }
OSSIA_INLINE void store_numbers(const float* numbers, uint16_t* out) {
  for (int i = 0; i < kBlock; ++i) out[i] = static_cast<uint16_t>(bits_as<uint32_t>(numbers[i]) >> 16);
}

template <class Number>
void dequantize_rows(Workspace& work, const Matrix& source, Number* out) {
  const bool pairs = source.format == Format::kMxfp4Pairs;
  work.pool.for_each(source.rows, source.rows * source.cols >= kWorthSharing, [&](int64_t r, int) {
    const uint8_t* blocks = source.data + r * source.row_stride;
    const uint8_t* scales = source.scales + r * source.scale_row_stride;
    Number* row = out + r * source.cols;
    for (int64_t b = 0; b < source.cols / kBlock; ++b) {
      const uint8_t* block = blocks + b * source.block_stride;
      const float scale = power_of_scale(scales[b * source.scale_block_stride]);
      alignas(64) uint8_t codes[kBlock];
      if (pairs) {
        for (int i = 0; i < kBlock / 2; ++i) codes[2 * i] = block[i] & 15, codes[2 * i + 1] = block[i] >> 4;
      } else {
        for (int i = 0; i < kBlock / 2; ++i) codes[i] = block[i] & 15, codes[kBlock / 2 + i] = block[i] >> 4;
      }
      alignas(64) float numbers[kBlock];
      widen_codes(codes, scale, numbers);
      widen_codes(codes + kBlock / 2, scale, numbers + kBlock / 2);
      store_numbers(numbers, row + b * kBlock);
    }
  });
}

}  // namespace

void dequantize(Workspace& work, const Matrix& source, float* floats, uint16_t* bf16) {
  if (floats) {
    dequantize_rows(work, source, floats);
  } else {
    dequantize_rows(work, source, bf16);
  }
}

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
