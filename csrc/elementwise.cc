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

// The 16 numbers of E2M1.
alignas(64) constexpr float kNumbers[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// The 32 numbers of a block. A number of MXFP4 has two significant bits, so that its float's upper half is its bfloat16.
#if OSSIA_512

struct LowHigh {
  Vf low, high;  // of the low and of the high nibbles
};
OSSIA_INLINE LowHigh numbers_of_nibbles(const uint8_t* block, float scale) {
  // The permutation looks at four bits of each index.
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block)));
  const Vf table = _mm512_load_ps(kNumbers);
  return {mul(_mm512_permutexvar_ps(bytes, table), set1(scale)),
          mul(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table), set1(scale))};
}

template <bool kPairs>
OSSIA_INLINE void widen_block(const uint8_t* block, float scale, float* out) {
  const LowHigh numbers = numbers_of_nibbles(block, scale);
  if (kPairs) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    store(out, _mm512_permutex2var_ps(numbers.low, first, numbers.high));
    store(out + 16, _mm512_permutex2var_ps(numbers.low, second, numbers.high));
  } else {
    store(out, numbers.low);
    store(out + 16, numbers.high);
  }
}

template <bool kPairs>
OSSIA_INLINE void widen_block(const uint8_t* block, float scale, uint16_t* out) {
  const LowHigh numbers = numbers_of_nibbles(block, scale);
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(numbers.low), 16);
  const __m512i high = _mm512_castps_si512(numbers.high);
  if (kPairs) {
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi32(-0x10000))));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
  }
}

#else

template <bool kPairs>
OSSIA_INLINE void widen_block(const uint8_t* block, float scale, float* out) {
  alignas(64) uint8_t codes[kBlock];
  for (int i = 0; i < kBlock / 2; ++i) {
    codes[kPairs ? 2 * i : i] = block[i] & 15;
    codes[kPairs ? 2 * i + 1 : kBlock / 2 + i] = block[i] >> 4;
  }
#if OSSIA_256
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    // The fourth bit is the sign, and the permutation looks at three.
    const Vf sign = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(index, 3), 31));
    const Vf magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kNumbers), index);
    store(out + i, mul(_mm256_xor_ps(magnitude, sign), set1(scale)));
  }
#else
  for (int i = 0; i < kBlock; ++i) out[i] = kNumbers[codes[i]] * scale;
#endif
}

template <bool kPairs>
OSSIA_INLINE void widen_block(const uint8_t* block, float scale, uint16_t* out) {
  alignas(64) float numbers[kBlock];
  widen_block<kPairs>(block, scale, numbers);
  for (int i = 0; i < kBlock; ++i) out[i] = static_cast<uint16_t>(bits_as<uint32_t>(numbers[i]) >> 16);
}

#endif

template <bool kPairs, class Number>
void dequantize_rows(Workspace& work, const Matrix& source, Number* out) {
  work.pool.for_each(source.rows, source.rows * source.cols >= kWorthSharing, [&](int64_t r, int) {
    const uint8_t* blocks = source.data + r * source.row_stride;
    const uint8_t* scales = source.scales + r * source.scale_row_stride;
    for (int64_t b = 0; b < source.cols / kBlock; ++b) {
      const float scale = power_of_scale(scales[b * source.scale_block_stride]);
      widen_block<kPairs>(blocks + b * source.block_stride, scale, out + r * source.cols + b * kBlock);
    }
  });
}

template <class Number>
void dequantize_to(Workspace& work, const Matrix& source, Number* out) {
  if (source.format == Format::kMxfp4Pairs) {
    dequantize_rows<true>(work, source, out);
  } else {
    dequantize_rows<false>(work, source, out);
  }
}

template <class Number>
void rotate_pairs(Workspace& work, const Number* x, const float* cos, const float* sin, int64_t num_tokens, int64_t heads,
                  int64_t dim, Number* out) {
  const int64_t pairs = dim / 2;
  work.pool.for_each(num_tokens, num_tokens * heads * dim >= kWorthSharing, [&](int64_t t, int) {
    const float* c = cos + t * pairs;
    const float* s = sin + t * pairs;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t first = (t * heads + h) * dim, second = first + pairs;
      for (int64_t i = 0; i < pairs; i += kLanes) {
        const int64_t left = pairs - i;
        const Vf a = load_up_to(x + first + i, left), b = load_up_to(x + second + i, left);
        const Vf cos_lanes = load_up_to(c + i, left), sin_lanes = load_up_to(s + i, left);
        store_up_to(out + first + i, left, sub(mul(a, cos_lanes), mul(b, sin_lanes)));
        store_up_to(out + second + i, left, add(mul(b, cos_lanes), mul(a, sin_lanes)));
      }
    }
  });
}

}  // namespace

void dequantize(Workspace& work, const Matrix& source, float* floats, uint16_t* bf16) {
  if (floats) {
    dequantize_to(work, source, floats);
  } else {
    dequantize_to(work, source, bf16);
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

void rope(Workspace& work, const Rows& x, const float* cos, const float* sin, int64_t num_tokens, int64_t heads, int64_t dim,
          const Rows& out) {
  if (x.floats) {
    rotate_pairs(work, x.floats, cos, sin, num_tokens, heads, dim, out.floats);
  } else {
    rotate_pairs(work, x.bf16, cos, sin, num_tokens, heads, dim, out.bf16);
  }
}

}  // namespace ossia::OSSIA_NS
