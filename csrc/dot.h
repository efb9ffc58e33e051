// Products of a tile of matrix rows with any number of tokens (dot.cc), and activations as those products want them.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ossia::OSSIA_NS {

constexpr int kTileRows = kLanes;
// Tokens whose activations are laid side by side, block by block: 96 x 90 blocks x 40 bytes stay in a 512 KB cache.
constexpr int kTokenTile = 96;

// sums[t][kTileRows] of the tile's rows with `num_tokens` tokens, x in the layout [b][num_tokens].
void quantized_tile(const Matrix& w, int64_t tile, const QBlock* x, int64_t num_tokens, float* sums);

// The same for two tiles of matrices of one shape and format, which is faster than one after the other.
void quantized_tiles(const Matrix& a, int64_t tile_a, const Matrix& b, int64_t tile_b, const QBlock* x, int64_t num_tokens,
                     float* sums_a, float* sums_b);

// out[t, j] = x[t, i] w[row + j, i] for j < count, of a matrix of floats.
void float_rows(const Matrix& w, int64_t row, int64_t count, const float* x, int64_t x_stride, int64_t num_tokens,
                float* out, int64_t out_stride);

// Multiplies bytes in registers, to be timed; gives the number of multiply-accumulates.
double integer_products(int64_t num_rounds);

// Which rows a tile reads and which of its lanes are new. An MXFP4 matrix's last tile reads back over rows of the one
// before; one of fewer rows than a tile is done row by row, the row standing in all lanes. A packed Q8 matrix is padded.
struct RowTile {
  int64_t first_row;
  int64_t row_step;   // 1, or 0 where one row stands in all lanes
  int first_lane, end_lane;
};
OSSIA_INLINE int64_t num_row_tiles(const Matrix& w) {
  return w.format != Format::kQ8 && w.rows < kTileRows ? w.rows : divide_up(w.rows, kTileRows);
}
OSSIA_INLINE RowTile row_tile(const Matrix& w, int64_t tile) {
  const int64_t first = tile * kTileRows;
  if (w.format == Format::kQ8) return {first, 1, 0, static_cast<int>(least<int64_t>(kTileRows, w.rows - first))};
  if (w.rows < kTileRows) return {tile, 0, 0, 1};
  const int64_t shift = greatest<int64_t>(0, first + kTileRows - w.rows);
  return {first - shift, 1, static_cast<int>(shift), kTileRows};
}

// Numbers of a format, read a vector or one at a time.
template <Format kFormat>
struct Numbers;
template <>
struct Numbers<Format::kF32> {
  static constexpr int kBytes = 4;
  OSSIA_INLINE Vf vector(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  OSSIA_INLINE float one(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
};
template <>
struct Numbers<Format::kBf16> {
  static constexpr int kBytes = 2;
  OSSIA_INLINE Vf vector(const uint8_t* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
  OSSIA_INLINE float one(const uint8_t* p) { return bf16_to_float(load_u16(p)); }
};
template <>
struct Numbers<Format::kF16> {
  static constexpr int kBytes = 2;
  OSSIA_INLINE Vf vector(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
  OSSIA_INLINE float one(const uint8_t* p) { return half_to_float(load_u16(p)); }
};

// keep(tile, sums[t][kTileRows]) for tiles first .. end-1 of a matrix, with at most kTokenTile tokens.
template <class Keep>
OSSIA_INLINE void for_tiles(const Matrix& w, int64_t first, int64_t end, const QBlock* x, int64_t num_tokens,
                            const Keep& keep) {
  alignas(64) float sums[2][kTokenTile * kTileRows];
  int64_t tile = first;
  for (; tile + 2 <= end; tile += 2) {
    quantized_tiles(w, tile, w, tile + 1, x, num_tokens, sums[0], sums[1]);
    keep(tile, sums[0]);
    keep(tile + 1, sums[1]);
  }
  if (tile < end) {
    quantized_tile(w, tile, x, num_tokens, sums[0]);
    keep(tile, sums[0]);
  }
}

// Activations ---------------------------------------------------------------------------------------------------------

// x[32] to q, d with x ~ q d, |q| <= 127, rounded to nearest, ties to even. `mxfp4`: d is halved for the doubled codes.
// A block that holds a NaN or an infinity becomes NaN.
OSSIA_INLINE void quantize_block(const float* x, Format format, QBlock* out) {
  uint32_t top = 0;
  for (int i = 0; i < kBlock; ++i) top = greatest(top, bits_as<uint32_t>(x[i]) & 0x7fffffffu);
  float d = bits_as<float>(top) / 127.0f;
  float inverse = 1.0f / d;
  if (top >= 0x7f800000u) {
    d = bits_as<float>(0x7fc00000u);
    inverse = 0.0f;
  } else if (!(d >= 0x1p-126f)) {
    d = inverse = 0.0f;
  }
  int32_t q[kBlock];
  if (inverse == 0.0f) {
    std::memset(q, 0, sizeof q);
  } else {
    for (int i = 0; i < kBlock; ++i) q[i] = bits_as<int32_t>(x[i] * inverse + 12582912.0f) - 0x4b400000;
  }
  if (format == Format::kMxfp4Pairs) {
    for (int i = 0; i < kBlock / 2; ++i) {
      out->q[i] = static_cast<int8_t>(q[2 * i]);
      out->q[kBlock / 2 + i] = static_cast<int8_t>(q[2 * i + 1]);
    }
  } else {
    for (int i = 0; i < kBlock; ++i) out->q[i] = static_cast<int8_t>(q[i]);
  }
  const bool mxfp4 = format != Format::kQ8;
  out->d = mxfp4 ? 0.5f * d : d;
#if OSSIA_256 && OSSIA_ISA == OSSIA_AVX2
  if (!mxfp4) {
    out->correction = 0;
    return;
  }
  // Two 16-bit sums, of the first and the second pair of every group, as the products' lanes hold them.
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out->q));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
  sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
  out->correction = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(-12)));
#elif OSSIA_256 || OSSIA_512
  int32_t sum = 0;
  for (int i = 0; i < kBlock; ++i) sum += out->q[i];
  out->correction = (mxfp4 ? -12 : -128) * sum;
#else
  out->correction = 0;
#endif
}

// One token's row into column `token` of the layout [b][num_tokens].
OSSIA_INLINE void quantize_row(const float* x, int64_t num_blocks, Format format, QBlock* out, int64_t num_tokens) {
  for (int64_t b = 0; b < num_blocks; ++b) quantize_block(x + b * kBlock, format, out + b * num_tokens);
}

}  // namespace ossia::OSSIA_NS
