// Products of a tile of kTileRows matrix rows with any number of tokens.
//
// Quantised weights: 32 inputs of 8 (16) rows are decoded once into bytes whose 4-byte groups stand row beside row,
//     w[group g of 4 inputs][row r][4]            256 (512) bytes, in registers
// and multiplied by every token: 4 of its bytes broadcast to all rows, eight times. So a row's sum sits in one lane:
//     out[t, r] = sum_b float(sum_i w[r, b, i] q[t, b, i]) * (scale[r, b] * d[t, b])
// with exact integers inside and the float sum in the order of b, whatever the number of tokens.
//
// MXFP4's codes doubled are the integers 0 1 2 3 4 6 8 12 and negatives. Byte products need one unsigned side: weights
// are taken as code + 12, and the block's -12 * sum(q) is where the accumulator starts. AVX2 adds 16-bit products modulo
// 2^16: eight sums of two may pass 2^15 on the way, the true sum of 16 products of |12 * 127| does not.
// Arm's products take both sides signed, and a lane of a register of activations as the four bytes for all rows; I8MM's
// multiply two rows with two tokens.
// The nibbles' order is met by storing the activations in the order of the nibbles: all low ones, then all high ones.
#include "dot.h"

namespace ossia::OSSIA_NS {
namespace {

// Integer products ----------------------------------------------------------------------------------------------------

#if OSSIA_512 || OSSIA_256

#if OSSIA_512
using Bytes = __m512i;
#else
using Bytes = __m256i;
#endif

struct Decoded {
  Bytes group[8];
};

OSSIA_INLINE Bytes broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
#if OSSIA_512
  return _mm512_set1_epi32(four);
#else
  return _mm256_set1_epi32(four);
#endif
}

#if OSSIA_512
OSSIA_INLINE Bytes rows_apart(const uint8_t* p, int64_t stride) {  // 16 bytes of rows 0, 4, 8 and 12
  const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * stride)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(8)), row(12), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
#define OSSIA_UNPACK(size, half) _mm512_unpack##half##_epi##size
OSSIA_INLINE Bytes low_nibbles(Bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
OSSIA_INLINE Bytes high_nibbles(Bytes a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
OSSIA_INLINE Bytes unsigned_codes(Bytes nibbles) {
  const __m128i codes = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), nibbles);
}
#else
OSSIA_INLINE Bytes rows_apart(const uint8_t* p, int64_t stride) {  // 16 bytes of rows 0 and 4
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * stride));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
#define OSSIA_UNPACK(size, half) _mm256_unpack##half##_epi##size
OSSIA_INLINE Bytes low_nibbles(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
OSSIA_INLINE Bytes high_nibbles(Bytes a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
OSSIA_INLINE Bytes unsigned_codes(Bytes nibbles) {
  const __m128i codes = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), nibbles);
}
#endif

// 16 bytes of every row, 4 x 4 groups turned inside each 128-bit lane, then nibbles to codes.
OSSIA_INLINE Decoded decode_mxfp4(const uint8_t* p, int64_t stride) {
  const Bytes a = rows_apart(p, stride), b = rows_apart(p + stride, stride);
  const Bytes c = rows_apart(p + 2 * stride, stride), d = rows_apart(p + 3 * stride, stride);
  const Bytes ab_low = OSSIA_UNPACK(32, lo)(a, b), ab_high = OSSIA_UNPACK(32, hi)(a, b);
  const Bytes cd_low = OSSIA_UNPACK(32, lo)(c, d), cd_high = OSSIA_UNPACK(32, hi)(c, d);
  const Bytes group[4] = {OSSIA_UNPACK(64, lo)(ab_low, cd_low), OSSIA_UNPACK(64, hi)(ab_low, cd_low),
                          OSSIA_UNPACK(64, lo)(ab_high, cd_high), OSSIA_UNPACK(64, hi)(ab_high, cd_high)};
  Decoded w;
  for (int g = 0; g < 4; ++g) {
    w.group[g] = unsigned_codes(low_nibbles(group[g]));
    w.group[4 + g] = unsigned_codes(high_nibbles(group[g]));
  }
  return w;
}

OSSIA_INLINE Decoded load_q8(const int8_t* p) {
  Decoded w;
  for (int g = 0; g < 8; ++g) std::memcpy(&w.group[g], p + g * sizeof(Bytes), sizeof(Bytes));
#if OSSIA_512
  for (Bytes& bytes : w.group) bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
#elif OSSIA_ISA == OSSIA_AVXVNNI
  for (Bytes& bytes : w.group) bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
#endif
  return w;
}

// gcc would first make all products and then add them, and has no registers to keep them in.
OSSIA_INLINE void keep_order(Bytes& sum) { asm volatile("" : "+x"(sum)); }

// The integer sums of kTokens tokens' blocks; each group of weights is in a register once for all of them.
#if OSSIA_ISA == OSSIA_AVX2

template <int kTokens>
OSSIA_INLINE void dot_mxfp4(const Decoded& w, const QBlock* x, Vf* dots) {
  __m256i sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = _mm256_set1_epi32(x[t].correction);
  OSSIA_UNROLL(8)
  for (int g = 0; g < 8; ++g)
    OSSIA_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(w.group[g], broadcast4(x[t].q + 4 * g)));
      keep_order(sums[t]);
    }
  for (int t = 0; t < kTokens; ++t) dots[t] = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[t], _mm256_set1_epi16(1)));
}

// |w| unsigned times q with the sign of w: pairs reach 2 * 127 * 128, just below 2^15.
template <int kTokens>
OSSIA_INLINE void dot_q8(const Decoded& w, const QBlock* x, Vf* dots) {
  __m256i sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = _mm256_setzero_si256();
  OSSIA_UNROLL(8)
  for (int g = 0; g < 8; ++g) {
    const __m256i magnitude = _mm256_abs_epi8(w.group[g]);
    OSSIA_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      const __m256i signed_q = _mm256_sign_epi8(broadcast4(x[t].q + 4 * g), w.group[g]);
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_q);
      sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      keep_order(sums[t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) dots[t] = _mm256_cvtepi32_ps(sums[t]);
}

#else

OSSIA_INLINE Bytes dot_bytes(Bytes sum, Bytes unsigned_bytes, Bytes signed_bytes) {
#if OSSIA_512
  return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
  return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

template <int kTokens>
OSSIA_INLINE void dot_codes(const Decoded& w, const QBlock* x, Vf* dots) {
  Bytes sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = broadcast4(reinterpret_cast<const int8_t*>(&x[t].correction));
  OSSIA_UNROLL(8)
  for (int g = 0; g < 8; ++g)
    OSSIA_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) sums[t] = dot_bytes(sums[t], w.group[g], broadcast4(x[t].q + 4 * g));
  for (int t = 0; t < kTokens; ++t) {
#if OSSIA_512
    dots[t] = _mm512_cvtepi32_ps(sums[t]);
#else
    dots[t] = _mm256_cvtepi32_ps(sums[t]);
#endif
  }
}

#endif

#elif OSSIA_NEON

using Bytes = int8x16_t;

struct Decoded {
  Bytes group[8][2];  // of rows 0 to 3 and 4 to 7
};

OSSIA_INLINE Bytes codes_of(uint8x16_t nibbles) {
  alignas(16) static constexpr int8_t kCodes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  return vqtbl1q_s8(vld1q_s8(kCodes), nibbles);
}

// 16 bytes of every row, 4 x 4 groups of four rows turned, then nibbles to codes.
OSSIA_INLINE Decoded decode_mxfp4(const uint8_t* p, int64_t stride) {
  Decoded w;
  for (int half = 0; half < 2; ++half) {
    const auto row = [&](int r) { return vreinterpretq_u32_u8(vld1q_u8(p + (4 * half + r) * stride)); };
    const uint32x4_t a = row(0), b = row(1), c = row(2), d = row(3);
    const uint64x2_t ab_even = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    const uint64x2_t cd_even = vreinterpretq_u64_u32(vtrn1q_u32(c, d)), cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    const uint64x2_t groups[4] = {vtrn1q_u64(ab_even, cd_even), vtrn1q_u64(ab_odd, cd_odd), vtrn2q_u64(ab_even, cd_even),
                                  vtrn2q_u64(ab_odd, cd_odd)};
    for (int g = 0; g < 4; ++g) {
      const uint8x16_t bytes = vreinterpretq_u8_u64(groups[g]);
      w.group[g][half] = codes_of(vandq_u8(bytes, vdupq_n_u8(15)));
      w.group[4 + g][half] = codes_of(vshrq_n_u8(bytes, 4));
    }
  }
  return w;
}

OSSIA_INLINE Decoded load_q8(const int8_t* p) {
  Decoded w;
  for (int g = 0; g < 8; ++g)
    for (int half = 0; half < 2; ++half) w.group[g][half] = vld1q_s8(p + 32 * g + 16 * half);
  return w;
}

// The integer sums of kTokens tokens' blocks, a half of the inputs after the other: there are 32 registers.
template <int kTokens>
OSSIA_INLINE void dot_codes(const Decoded& w, const QBlock* x, Vf* dots) {
  int32x4_t sums[kTokens][2];
  for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = vdupq_n_s32(0);
  OSSIA_UNROLL(2)
  for (int half = 0; half < 2; ++half) {
    const Bytes(*group)[2] = w.group + 4 * half;
    OSSIA_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      const Bytes q = vld1q_s8(x[t].q + 16 * half);
      OSSIA_UNROLL(2)
      for (int r = 0; r < 2; ++r) {
        sums[t][r] = vdotq_laneq_s32(sums[t][r], group[0][r], q, 0);
        sums[t][r] = vdotq_laneq_s32(sums[t][r], group[1][r], q, 1);
        sums[t][r] = vdotq_laneq_s32(sums[t][r], group[2][r], q, 2);
        sums[t][r] = vdotq_laneq_s32(sums[t][r], group[3][r], q, 3);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) dots[t] = {vcvtq_f32_s32(sums[t][0]), vcvtq_f32_s32(sums[t][1])};
}

#else  // portable: row by row, which any compiler turns into widening multiply-adds

struct Decoded {
  int8_t row[kTileRows][kBlock];
};

OSSIA_INLINE Decoded decode_mxfp4(const uint8_t* p, int64_t stride) {
  Decoded w;
  for (int r = 0; r < kTileRows; ++r) {
    uint8_t codes[kBlock];
    for (int i = 0; i < kBlock / 2; ++i) {
      codes[i] = p[r * stride + i] & 15;
      codes[kBlock / 2 + i] = p[r * stride + i] >> 4;
    }
    for (int i = 0; i < kBlock; ++i) {
      // 0 1 2 3 4 5 6 7 -> 0 1 2 3 4 6 8 12 in arithmetic that has a vector form everywhere.
      const int8_t m = codes[i] & 7;
      const int8_t above_4 = m > 4 ? m - 4 : 0, above_6 = m > 6 ? m - 6 : 0;
      const int8_t magnitude = static_cast<int8_t>(m + above_4 + 2 * above_6);
      w.row[r][i] = static_cast<int8_t>(codes[i] > 7 ? -magnitude : magnitude);
    }
  }
  return w;
}

OSSIA_INLINE Decoded load_q8(const int8_t* p) {
  Decoded w;
  for (int g = 0; g < 8; ++g)
    for (int r = 0; r < kTileRows; ++r) std::memcpy(&w.row[r][4 * g], p + (g * kTileRows + r) * 4, 4);
  return w;
}

template <int kTokens>
OSSIA_INLINE void dot_codes(const Decoded& w, const QBlock* x, Vf* dots) {
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      int32_t sum = 0;
      for (int i = 0; i < kBlock; ++i) sum += static_cast<int16_t>(w.row[r][i]) * static_cast<int16_t>(x[t].q[i]);
      dots[t][r] = static_cast<float>(sum);
    }
}

#endif

#if OSSIA_ISA != OSSIA_AVX2  // where both formats are multiplied alike
template <int kTokens>
OSSIA_INLINE void dot_mxfp4(const Decoded& w, const QBlock* x, Vf* dots) {
  dot_codes<kTokens>(w, x, dots);
}
template <int kTokens>
OSSIA_INLINE void dot_q8(const Decoded& w, const QBlock* x, Vf* dots) {
  dot_codes<kTokens>(w, x, dots);
}
#endif

// Scales --------------------------------------------------------------------------------------------------------------

// 2^(s - 127) of one byte per row. The bits s << 23 are right but for 0 (2^-127 is subnormal) and 255 (NaN, not
// infinity); setting the fraction's top bit mends both.
OSSIA_INLINE Vf e8m0_scales(const uint8_t* s) {
#if OSSIA_512
  const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s)));
  const __mmask16 edge =
      _mm512_cmpeq_epi32_mask(byte, _mm512_setzero_si512()) | _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255));
  const __m512i bits = _mm512_slli_epi32(byte, 23);
  return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, edge, bits, _mm512_set1_epi32(0x400000)));
#elif OSSIA_256
  const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(s)));
  const __m256i edge = _mm256_or_si256(_mm256_cmpeq_epi32(byte, _mm256_setzero_si256()),
                                       _mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255)));
  const __m256i half = _mm256_and_si256(edge, _mm256_set1_epi32(0x400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(byte, 23), half));
#elif OSSIA_NEON
  const uint16x8_t bytes = vmovl_u8(vld1_u8(s));
  const auto scale = [](uint32x4_t byte) {
    const uint32x4_t edge = vorrq_u32(vceqzq_u32(byte), vceqq_u32(byte, vdupq_n_u32(255)));
    return vorrq_u32(vshlq_n_u32(byte, 23), vandq_u32(edge, vdupq_n_u32(0x400000)));
  };
  return floats_of({scale(vmovl_u16(vget_low_u16(bytes))), scale(vmovl_u16(vget_high_u16(bytes)))});
#else
  Vi bits;
  for (int r = 0; r < kTileRows; ++r)
    bits[r] = static_cast<int32_t>((static_cast<uint32_t>(s[r]) << 23) | (s[r] == 0 || s[r] == 255 ? 0x400000u : 0u));
  return (Vf)bits;
#endif
}

constexpr int kScaleRun = 8;  // blocks whose scales are turned at a time

// to[block][row] = scales of the tile's rows, `count` <= 8 blocks.
OSSIA_INLINE void turn_scales(const uint8_t* from, int64_t row_stride, int64_t block_stride, int64_t count,
                              uint8_t to[kScaleRun][kTileRows]) {
#if OSSIA_512 || OSSIA_256
  if (block_stride == 1 && count == kScaleRun) {
    for (int part = 0; part < kTileRows; part += 8) {
      const auto row = [&](int r) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + (part + r) * row_stride));
      };
      const __m128i r01 = _mm_unpacklo_epi8(row(0), row(1)), r23 = _mm_unpacklo_epi8(row(2), row(3));
      const __m128i r45 = _mm_unpacklo_epi8(row(4), row(5)), r67 = _mm_unpacklo_epi8(row(6), row(7));
      const __m128i r0123_low = _mm_unpacklo_epi16(r01, r23), r0123_high = _mm_unpackhi_epi16(r01, r23);
      const __m128i r4567_low = _mm_unpacklo_epi16(r45, r67), r4567_high = _mm_unpackhi_epi16(r45, r67);
      const __m128i blocks[4] = {
          _mm_unpacklo_epi32(r0123_low, r4567_low), _mm_unpackhi_epi32(r0123_low, r4567_low),
          _mm_unpacklo_epi32(r0123_high, r4567_high), _mm_unpackhi_epi32(r0123_high, r4567_high)};
      for (int i = 0; i < 4; ++i) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(&to[2 * i][part]), blocks[i]);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(&to[2 * i + 1][part]), _mm_unpackhi_epi64(blocks[i], blocks[i]));
      }
    }
    return;
  }
#elif OSSIA_NEON
  if (block_stride == 1 && count == kScaleRun) {
    const auto row = [&](int r) { return vcombine_u8(vld1_u8(from + r * row_stride), vdup_n_u8(0)); };
    const auto pair = [&](int r) { return vreinterpretq_u16_u8(vzip1q_u8(row(r), row(r + 1))); };
    const uint16x8_t r01 = pair(0), r23 = pair(2), r45 = pair(4), r67 = pair(6);
    const uint32x4_t r0123_low = vreinterpretq_u32_u16(vzip1q_u16(r01, r23));
    const uint32x4_t r0123_high = vreinterpretq_u32_u16(vzip2q_u16(r01, r23));
    const uint32x4_t r4567_low = vreinterpretq_u32_u16(vzip1q_u16(r45, r67));
    const uint32x4_t r4567_high = vreinterpretq_u32_u16(vzip2q_u16(r45, r67));
    const uint32x4_t blocks[4] = {vzip1q_u32(r0123_low, r4567_low), vzip2q_u32(r0123_low, r4567_low),
                                  vzip1q_u32(r0123_high, r4567_high), vzip2q_u32(r0123_high, r4567_high)};
    for (int i = 0; i < 4; ++i) vst1q_u8(to[2 * i], vreinterpretq_u8_u32(blocks[i]));
    return;
  }
#endif
  for (int r = 0; r < kTileRows; ++r)
    for (int64_t b = 0; b < count; ++b) to[b][r] = from[r * row_stride + b * block_stride];
}

// Tiles ---------------------------------------------------------------------------------------------------------------

// sums[t, r] += w[r, i] q[t, i] * (scale[r] d[t])
template <int kTokens>
OSSIA_INLINE void accumulate_few(const Decoded& w, bool mxfp4, Vf scale, const QBlock* x, Vf* sums) {
  Vf dots[kTokens];
  if (mxfp4) {
    dot_mxfp4<kTokens>(w, x, dots);
  } else {
    dot_q8<kTokens>(w, x, dots);
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = fma(dots[t], mul(scale, set1(x[t].d)), sums[t]);
}

template <int kTokens>
OSSIA_INLINE void accumulate_in_memory(const Decoded& w, bool mxfp4, Vf scale, const QBlock* x, float* sums) {
  Vf few[kTokens];
  for (int t = 0; t < kTokens; ++t) few[t] = load(sums + t * kTileRows);
  accumulate_few<kTokens>(w, mxfp4, scale, x, few);
  for (int t = 0; t < kTokens; ++t) store(sums + t * kTileRows, few[t]);
}

#if OSSIA_ISA == OSSIA_I8MM

// Two rows' 8 bytes beside each other, to be multiplied with those of two tokens: four sums of 8 products.
struct Paired {
  Bytes pair[4][4];  // [8 inputs][rows 2 r and 2 r + 1]
};

OSSIA_INLINE Paired pair_rows(const Decoded& w) {
  Paired paired;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const int32x4_t first = vreinterpretq_s32_s8(w.group[2 * i][half]);
      const int32x4_t second = vreinterpretq_s32_s8(w.group[2 * i + 1][half]);
      paired.pair[i][2 * half] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
      paired.pair[i][2 * half + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
    }
  return paired;
}

// sums[t, r] as accumulate_few, of four tokens
OSSIA_INLINE void accumulate_paired(const Paired& w, Vf scale, const QBlock* x, float* sums) {
  int32x4_t dots[2][4];
  for (auto& of_tokens : dots)
    for (int32x4_t& dot : of_tokens) dot = vdupq_n_s32(0);
  OSSIA_UNROLL(2)
  for (int half = 0; half < 2; ++half)
    OSSIA_UNROLL(2)
    for (int t = 0; t < 2; ++t) {
      const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x[2 * t].q + 16 * half));
      const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x[2 * t + 1].q + 16 * half));
      const Bytes low = vreinterpretq_s8_s64(vzip1q_s64(a, b)), high = vreinterpretq_s8_s64(vzip2q_s64(a, b));
      OSSIA_UNROLL(4)
      for (int r = 0; r < 4; ++r) dots[t][r] = vmmlaq_s32(dots[t][r], w.pair[2 * half][r], low);
      OSSIA_UNROLL(4)
      for (int r = 0; r < 4; ++r) dots[t][r] = vmmlaq_s32(dots[t][r], w.pair[2 * half + 1][r], high);
    }
  OSSIA_UNROLL(4)
  for (int t = 0; t < 4; ++t) {
    const int32x4_t* four = dots[t / 2];
    const auto rows = [&](int32x4_t a, int32x4_t b) { return vcvtq_f32_s32(t % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b)); };
    float* to = sums + t * kTileRows;
    store(to, fma({rows(four[0], four[1]), rows(four[2], four[3])}, mul(scale, set1(x[t].d)), load(to)));
  }
}

#endif

template <int kTokens>
OSSIA_INLINE void accumulate(const Decoded& w, bool mxfp4, Vf scale, const QBlock* x, int64_t num_tokens, Vf* registers,
                             float* sums) {
  if constexpr (kTokens > 0) {
    accumulate_few<kTokens>(w, mxfp4, scale, x, registers);
  } else {
    int64_t t = 0;
#if OSSIA_ISA == OSSIA_I8MM
    const Paired paired = pair_rows(w);
    for (; t + 4 <= num_tokens; t += 4) accumulate_paired(paired, scale, x + t, sums + t * kTileRows);
#else
    for (; t + 4 <= num_tokens; t += 4) accumulate_in_memory<4>(w, mxfp4, scale, x + t, sums + t * kTileRows);
#endif
    for (; t < num_tokens; ++t) accumulate_in_memory<1>(w, mxfp4, scale, x + t, sums + t * kTileRows);
  }
}

// Asks for the cache lines of rows in the order of memory, a few at a time.
struct Ahead {
  const uint8_t* row;
  int64_t row_stride, row_bytes, at = 0;

  OSSIA_INLINE_MEMBER void ask(int num_lines) {
    for (int n = 0; n < num_lines; ++n) {
      prefetch(row + at);
      at += 64;
      if (at >= row_bytes) {
        at = 0;
        row += row_stride;
      }
    }
  }
};

// A tile's blocks of 32 inputs, one after the other: `begin` before every kScaleRun blocks, then weights and scales of
// block b, the i-th of its run.
struct Mxfp4Reader {
  static constexpr bool kIsMxfp4 = true;
  const Matrix& w;
  int64_t stride, scale_stride;
  const uint8_t *data, *scales;
  // The next tile's bytes are asked for while this one's are multiplied, row after row as they lie in memory.
  Ahead ahead, scales_ahead;
  alignas(64) uint8_t turned[kScaleRun][kTileRows];

  OSSIA_INLINE_MEMBER Mxfp4Reader(const Matrix& matrix, int64_t tile) : w(matrix) {
    const RowTile rows = row_tile(w, tile);
    stride = w.row_stride * rows.row_step;
    scale_stride = w.scale_row_stride * rows.row_step;
    data = w.data + rows.first_row * w.row_stride;
    scales = w.scales + rows.first_row * w.scale_row_stride;
    const int64_t num_blocks = w.cols / kBlock;
    ahead = {data + kTileRows * stride, stride, num_blocks * w.block_stride};
    scales_ahead = {scales + kTileRows * scale_stride, scale_stride, num_blocks * w.scale_block_stride};
  }
  OSSIA_INLINE_MEMBER void begin(int64_t run, int64_t count) {
    turn_scales(scales + run * w.scale_block_stride, scale_stride, w.scale_block_stride, count, turned);
  }
  OSSIA_INLINE_MEMBER Decoded weights(int64_t b, int64_t i) {
    ahead.ask(kTileRows * (kBlock / 2) / 64);
    if (i % 2 == 0) scales_ahead.ask(1);
    return decode_mxfp4(data + b * w.block_stride, stride);
  }
  OSSIA_INLINE_MEMBER Vf scale(int64_t, int64_t i) const { return e8m0_scales(turned[i]); }
};

struct Q8Reader {
  static constexpr bool kIsMxfp4 = false;
  static constexpr int64_t kBytes = kTileRows * kBlock;
  const int8_t* data;
  const uint16_t* scales;

  OSSIA_INLINE_MEMBER Q8Reader(const Matrix& w, int64_t tile) {
    const int64_t num_blocks = w.cols / kBlock;
    data = reinterpret_cast<const int8_t*>(w.data) + tile * num_blocks * kBytes;
    scales = reinterpret_cast<const uint16_t*>(w.scales) + tile * num_blocks * kTileRows;
  }
  OSSIA_INLINE_MEMBER void begin(int64_t, int64_t) {}
  OSSIA_INLINE_MEMBER Decoded weights(int64_t b, int64_t) {
    const int8_t* block = data + b * kBytes;
    for (int64_t line = 0; line < kBytes; line += 64) prefetch(block + 4096 + line);
    return load_q8(block);
  }
  OSSIA_INLINE_MEMBER Vf scale(int64_t b, int64_t) const { return load_half(scales + b * kTileRows); }
};

// kTokens > 0: exactly so many, sums in registers; 0: any number, sums in memory.
template <class Reader, int kTokens>
OSSIA_INLINE void one_tile(const Matrix& w, int64_t tile, const QBlock* x, int64_t num_tokens, float* sums) {
  const int64_t num_blocks = w.cols / kBlock;
  Reader reader(w, tile);
  Vf registers[kTokens > 0 ? kTokens : 1];
  for (Vf& sum : registers) sum = zero();
  if (kTokens == 0)
    for (int64_t t = 0; t < num_tokens; ++t) store(sums + t * kTileRows, zero());
  for (int64_t run = 0; run < num_blocks; run += kScaleRun) {
    const int64_t count = least<int64_t>(kScaleRun, num_blocks - run);
    reader.begin(run, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = run + i;
      const Decoded weights = reader.weights(b, i);
      accumulate<kTokens>(weights, Reader::kIsMxfp4, reader.scale(b, i), x + b * num_tokens, num_tokens, registers, sums);
    }
  }
  for (int t = 0; t < kTokens; ++t) store(sums + t * kTileRows, registers[t]);
}

#if OSSIA_512

// Two tiles by kTokens tokens: every four bytes of a token are read once for both tiles.
template <int kTokens>
OSSIA_INLINE void accumulate_pair(const Decoded& a, const Decoded& b, Vf scale_a, Vf scale_b, const QBlock* x,
                                  float* sums_a, float* sums_b) {
  Bytes dots_a[kTokens], dots_b[kTokens];
  OSSIA_UNROLL(4)
  for (int t = 0; t < kTokens; ++t) dots_a[t] = dots_b[t] = broadcast4(reinterpret_cast<const int8_t*>(&x[t].correction));
  OSSIA_UNROLL(8)
  for (int g = 0; g < 8; ++g)
    OSSIA_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      const Bytes q = broadcast4(x[t].q + 4 * g);
      dots_a[t] = dot_bytes(dots_a[t], a.group[g], q);
      dots_b[t] = dot_bytes(dots_b[t], b.group[g], q);
    }
  OSSIA_UNROLL(4)
  for (int t = 0; t < kTokens; ++t) {
    float *to_a = sums_a + t * kTileRows, *to_b = sums_b + t * kTileRows;
    const Vf d = set1(x[t].d);
    store(to_a, fma(_mm512_cvtepi32_ps(dots_a[t]), mul(scale_a, d), load(to_a)));
    store(to_b, fma(_mm512_cvtepi32_ps(dots_b[t]), mul(scale_b, d), load(to_b)));
  }
}

template <class Reader>
OSSIA_INLINE void two_tiles(const Matrix& a, int64_t tile_a, const Matrix& b, int64_t tile_b, const QBlock* x,
                            int64_t num_tokens, float* sums_a, float* sums_b) {
  const int64_t num_blocks = a.cols / kBlock;
  Reader reader_a(a, tile_a), reader_b(b, tile_b);
  for (int64_t t = 0; t < num_tokens; ++t) {
    store(sums_a + t * kTileRows, zero());
    store(sums_b + t * kTileRows, zero());
  }
  for (int64_t run = 0; run < num_blocks; run += kScaleRun) {
    const int64_t count = least<int64_t>(kScaleRun, num_blocks - run);
    reader_a.begin(run, count);
    reader_b.begin(run, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = run + i;
      const Decoded w_a = reader_a.weights(block, i), w_b = reader_b.weights(block, i);
      const Vf scale_a = reader_a.scale(block, i), scale_b = reader_b.scale(block, i);
      const QBlock* q = x + block * num_tokens;
      int64_t t = 0;
      for (; t + 4 <= num_tokens; t += 4)
        accumulate_pair<4>(w_a, w_b, scale_a, scale_b, q + t, sums_a + t * kTileRows, sums_b + t * kTileRows);
      for (; t < num_tokens; ++t)
        accumulate_pair<1>(w_a, w_b, scale_a, scale_b, q + t, sums_a + t * kTileRows, sums_b + t * kTileRows);
    }
  }
}

#endif

// Float weights -------------------------------------------------------------------------------------------------------

// out[t][r] = sum_i x[t, i] w[r, i]: lanes over i, added at the end, then the inputs past the last full vector.
template <Format kFormat, int kRows, int kTokens>
OSSIA_INLINE void float_patch(const uint8_t* w, int64_t row_stride, int64_t cols, const float* x, int64_t x_stride,
                              float* out, int64_t out_stride) {
  using Number = Numbers<kFormat>;
  Vf sums[kTokens][kRows];
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) sums[t][r] = zero();
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    Vf x_lanes[kTokens];
    for (int t = 0; t < kTokens; ++t) x_lanes[t] = load(x + t * x_stride + i);
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* p = w + r * row_stride + i * Number::kBytes;
      if (i % 32 == 0) prefetch(p + 2048);
      const Vf w_lanes = Number::vector(p);
      for (int t = 0; t < kTokens; ++t) sums[t][r] = fma(w_lanes, x_lanes[t], sums[t][r]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int r = 0; r < kRows; ++r) {
      float sum = sum_lanes(sums[t][r]);
      for (int64_t rest = i; rest < cols; ++rest)
        sum += Number::one(w + r * row_stride + rest * Number::kBytes) * x[t * x_stride + rest];
      out[t * out_stride + r] = sum;
    }
}

template <Format kFormat, int kRows>
OSSIA_INLINE void float_rows_of(const uint8_t* w, int64_t row_stride, int64_t cols, const float* x, int64_t x_stride,
                                int64_t num_tokens, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 3 <= num_tokens; t += 3)
    float_patch<kFormat, kRows, 3>(w, row_stride, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  for (; t < num_tokens; ++t)
    float_patch<kFormat, kRows, 1>(w, row_stride, cols, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

template <Format kFormat>
static void float_rows_as(const Matrix& w, int64_t row, int64_t count, const float* x, int64_t x_stride,
                          int64_t num_tokens, float* out, int64_t out_stride) {
  const int64_t end = row + count;
  for (; row + 4 <= end; row += 4, out += 4)
    float_rows_of<kFormat, 4>(w.data + row * w.row_stride, w.row_stride, w.cols, x, x_stride, num_tokens, out, out_stride);
  for (; row < end; ++row, ++out)
    float_rows_of<kFormat, 1>(w.data + row * w.row_stride, w.row_stride, w.cols, x, x_stride, num_tokens, out, out_stride);
}

// Enough products of them at once to hide their latency. Where there is no byte dot
// product, a multiplication counts with the 16-bit addition that keeps it.
#if OSSIA_NEON
using Sums = int32x4_t;
OSSIA_INLINE Bytes broadcast4(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
OSSIA_INLINE Sums no_sums() { return vdupq_n_s32(0); }
OSSIA_INLINE Sums multiply_accumulate(Sums sum, Bytes a, Bytes b) {
#if OSSIA_ISA == OSSIA_I8MM
  return vmmlaq_s32(sum, a, b);
#else
  return vdotq_s32(sum, a, b);
#endif
}
#define OSSIA_REGISTER "w"
#elif OSSIA_512 || OSSIA_256
#define OSSIA_REGISTER "x"
using Sums = Bytes;
OSSIA_INLINE Sums no_sums() { return Bytes{}; }
OSSIA_INLINE Sums multiply_accumulate(Sums sum, Bytes a, Bytes b) {
#if OSSIA_512
  return _mm512_dpbusd_epi32(sum, a, b);
#elif OSSIA_ISA == OSSIA_AVXVNNI
  return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
  // Written out, since a compiler would see that all products are the same.
  __m256i product;
  asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "x"(b));
  return _mm256_add_epi16(sum, product);
#endif
}
#endif

}  // namespace

void quantized_tile(const Matrix& w, int64_t tile, const QBlock* x, int64_t num_tokens, float* sums) {
  if (w.format == Format::kQ8) {
    switch (num_tokens) {
      case 1: return one_tile<Q8Reader, 1>(w, tile, x, 1, sums);
      case 2: return one_tile<Q8Reader, 2>(w, tile, x, 2, sums);
      default: return one_tile<Q8Reader, 0>(w, tile, x, num_tokens, sums);
    }
  }
  switch (num_tokens) {
    case 1: return one_tile<Mxfp4Reader, 1>(w, tile, x, 1, sums);
    case 2: return one_tile<Mxfp4Reader, 2>(w, tile, x, 2, sums);
    case 3: return one_tile<Mxfp4Reader, 3>(w, tile, x, 3, sums);
    default: return one_tile<Mxfp4Reader, 0>(w, tile, x, num_tokens, sums);
  }
}

void quantized_tiles(const Matrix& a, int64_t tile_a, const Matrix& b, int64_t tile_b, const QBlock* x, int64_t num_tokens,
                     float* sums_a, float* sums_b) {
#if OSSIA_512
  if (num_tokens >= 4 && a.format == Format::kQ8)
    return two_tiles<Q8Reader>(a, tile_a, b, tile_b, x, num_tokens, sums_a, sums_b);
  if (num_tokens >= 4) return two_tiles<Mxfp4Reader>(a, tile_a, b, tile_b, x, num_tokens, sums_a, sums_b);
#endif
  quantized_tile(a, tile_a, x, num_tokens, sums_a);
  quantized_tile(b, tile_b, x, num_tokens, sums_b);
}

void float_rows(const Matrix& w, int64_t row, int64_t count, const float* x, int64_t x_stride, int64_t num_tokens,
                float* out, int64_t out_stride) {
  switch (w.format) {
    case Format::kF32: return float_rows_as<Format::kF32>(w, row, count, x, x_stride, num_tokens, out, out_stride);
    case Format::kBf16: return float_rows_as<Format::kBf16>(w, row, count, x, x_stride, num_tokens, out, out_stride);
    default: return float_rows_as<Format::kF16>(w, row, count, x, x_stride, num_tokens, out, out_stride);
  }
}

double integer_products(int64_t num_rounds) {
#if OSSIA_512 || OSSIA_256 || OSSIA_NEON
  constexpr double kPerRound = 8 * static_cast<double>(sizeof(Bytes)) * (OSSIA_ISA == OSSIA_I8MM ? 2 : 1);
  const Bytes a = broadcast4(reinterpret_cast<const int8_t*>("\1\2\3\4"));
  Bytes b = a;
  Sums s0 = no_sums(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (int64_t i = 0; i < num_rounds; ++i) {
    s0 = multiply_accumulate(s0, a, b);
    s1 = multiply_accumulate(s1, a, b);
    s2 = multiply_accumulate(s2, a, b);
    s3 = multiply_accumulate(s3, a, b);
    s4 = multiply_accumulate(s4, a, b);
    s5 = multiply_accumulate(s5, a, b);
    s6 = multiply_accumulate(s6, a, b);
    s7 = multiply_accumulate(s7, a, b);
    asm volatile("" : "+" OSSIA_REGISTER(b));
  }
  for (const Sums& sum : {s0, s1, s2, s3, s4, s5, s6, s7}) asm volatile("" : : OSSIA_REGISTER(sum));
#else
  constexpr double kPerRound = kTileRows * kBlock;
  Decoded w;
  std::memset(&w, 3, sizeof w);
  QBlock x = {};
  Vf sum = zero();
  for (int64_t i = 0; i < num_rounds; ++i) {
    asm volatile("" : : "r"(&w), "r"(&x) : "memory");
    Vf dot;
    dot_mxfp4<1>(w, &x, &dot);
    sum = add(sum, dot);
  }
  asm volatile("" : : "m"(sum));
#endif
  return kPerRound * static_cast<double>(num_rounds);
}

}  // namespace ossia::OSSIA_NS
