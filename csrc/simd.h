// Vectors of floats for the instruction set that a file is compiled for. Every kernel file is compiled once per set with
// OSSIA_ISA and OSSIA_NS given; everything here has internal linkage, so that no function of one set can stand in for
// another set's.
//
//   Vf          kLanes floats
//   min, max    a NaN in the second argument is kept
//   exp         relative error below 3e-7; below -87.3 zero (Cephes expf's polynomial)
#pragma once

#include <cstdint>
#include <cstring>

#define OSSIA_PORTABLE 0
#define OSSIA_AVX2 1
#define OSSIA_AVXVNNI 2
#define OSSIA_AVX512VNNI 3
#define OSSIA_DOTPROD 4
#define OSSIA_I8MM 5

#if OSSIA_ISA == OSSIA_AVX2 || OSSIA_ISA == OSSIA_AVXVNNI
#define OSSIA_256 1
#else
#define OSSIA_256 0
#endif
#if OSSIA_ISA == OSSIA_AVX512VNNI
#define OSSIA_512 1
#else
#define OSSIA_512 0
#endif
#if OSSIA_ISA == OSSIA_DOTPROD || OSSIA_ISA == OSSIA_I8MM
#define OSSIA_NEON 1
#else
#define OSSIA_NEON 0
#endif
#if OSSIA_256 || OSSIA_512
#include <immintrin.h>
#elif OSSIA_NEON
#include <arm_neon.h>
#endif

// Loops over registers must be unrolled, or the registers become memory.
#if defined(__clang__)
#define OSSIA_PRAGMA(text) _Pragma(#text)
#define OSSIA_UNROLL(count) OSSIA_PRAGMA(unroll count)
#else
#define OSSIA_PRAGMA(text) _Pragma(#text)
#define OSSIA_UNROLL(count) OSSIA_PRAGMA(GCC unroll count)
#endif

#define OSSIA_INLINE static inline __attribute__((always_inline))
#define OSSIA_INLINE_MEMBER inline __attribute__((always_inline))

namespace ossia::OSSIA_NS {

template <class T>
OSSIA_INLINE T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
OSSIA_INLINE T greatest(T a, T b) {
  return a < b ? b : a;
}
OSSIA_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
OSSIA_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

OSSIA_INLINE float bf16_to_float(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; NaN stays NaN.
OSSIA_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

// Exact for all values: the float with the same fields is the number times 2^-112; infinities and NaN are mended after.
OSSIA_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(rest) * 0x1p112f);
  return bits_as<float>(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : scaled));
}

// To nearest, ties to even, for finite values >= 0; above the largest half: infinity.
OSSIA_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if (bits >= 0x47800000) return 0x7c00;
  if (bits < 0x38800000) {
    // A subnormal half counts steps of 2^-24; adding 0.5 leaves that count in the sum's low bits, rounded to even.
    return static_cast<uint16_t>(bits_as<uint32_t>(value + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

// The number of a scale in E8M0, 2^(scale - 127); 255 is NaN.
OSSIA_INLINE float power_of_scale(uint8_t scale) {
  if (scale == 255) return bits_as<float>(0x7fc00000u);
  return bits_as<float>(scale ? static_cast<uint32_t>(scale) << 23 : 0x00400000u);
}

OSSIA_INLINE uint16_t load_u16(const void* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

OSSIA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

#if OSSIA_512

constexpr int kLanes = 16;
using Vf = __m512;
OSSIA_INLINE Vf zero() { return _mm512_setzero_ps(); }
OSSIA_INLINE Vf set1(float x) { return _mm512_set1_ps(x); }
OSSIA_INLINE Vf load(const float* p) { return _mm512_loadu_ps(p); }
OSSIA_INLINE void store(float* p, Vf a) { _mm512_storeu_ps(p, a); }
OSSIA_INLINE Vf add(Vf a, Vf b) { return _mm512_add_ps(a, b); }
OSSIA_INLINE Vf sub(Vf a, Vf b) { return _mm512_sub_ps(a, b); }
OSSIA_INLINE Vf mul(Vf a, Vf b) { return _mm512_mul_ps(a, b); }
OSSIA_INLINE Vf div(Vf a, Vf b) { return _mm512_div_ps(a, b); }
OSSIA_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
OSSIA_INLINE Vf min(Vf a, Vf b) { return _mm512_min_ps(a, b); }
OSSIA_INLINE Vf max(Vf a, Vf b) { return _mm512_max_ps(a, b); }
OSSIA_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
OSSIA_INLINE Vf power_of_two(Vf biased) {  // 2^n, of a float that holds n in its low bits
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(biased), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f800000)));
}
OSSIA_INLINE Vf load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
OSSIA_INLINE void store_bf16(uint16_t* p, Vf a) {  // as float_to_bf16
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i nan = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
}
OSSIA_INLINE Vf load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
OSSIA_INLINE Vf load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif OSSIA_256

constexpr int kLanes = 8;
using Vf = __m256;
OSSIA_INLINE Vf zero() { return _mm256_setzero_ps(); }
OSSIA_INLINE Vf set1(float x) { return _mm256_set1_ps(x); }
OSSIA_INLINE Vf load(const float* p) { return _mm256_loadu_ps(p); }
OSSIA_INLINE void store(float* p, Vf a) { _mm256_storeu_ps(p, a); }
OSSIA_INLINE Vf add(Vf a, Vf b) { return _mm256_add_ps(a, b); }
OSSIA_INLINE Vf sub(Vf a, Vf b) { return _mm256_sub_ps(a, b); }
OSSIA_INLINE Vf mul(Vf a, Vf b) { return _mm256_mul_ps(a, b); }
OSSIA_INLINE Vf div(Vf a, Vf b) { return _mm256_div_ps(a, b); }
OSSIA_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
OSSIA_INLINE Vf min(Vf a, Vf b) { return _mm256_min_ps(a, b); }
OSSIA_INLINE Vf max(Vf a, Vf b) { return _mm256_max_ps(a, b); }
OSSIA_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
OSSIA_INLINE Vf power_of_two(Vf biased) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(biased), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(0x3f800000)));
}
OSSIA_INLINE Vf load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
OSSIA_INLINE void store_bf16(uint16_t* p, Vf a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, nan, is_nan);
  // Packing works within each half of the register.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
OSSIA_INLINE Vf load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OSSIA_INLINE Vf load_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#elif OSSIA_NEON

// Two registers side by side, so that a tile has as many rows as AVX2's.
constexpr int kLanes = 8;
struct Vf {
  float32x4_t low, high;
};
struct Vu {
  uint32x4_t low, high;
};
OSSIA_INLINE Vu bits_of(Vf a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
OSSIA_INLINE Vf floats_of(Vu a) { return {vreinterpretq_f32_u32(a.low), vreinterpretq_f32_u32(a.high)}; }
OSSIA_INLINE Vf set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
OSSIA_INLINE Vf zero() { return set1(0.0f); }
OSSIA_INLINE Vf load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
OSSIA_INLINE void store(float* p, Vf a) {
  vst1q_f32(p, a.low);
  vst1q_f32(p + 4, a.high);
}
OSSIA_INLINE Vf add(Vf a, Vf b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
OSSIA_INLINE Vf sub(Vf a, Vf b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
OSSIA_INLINE Vf mul(Vf a, Vf b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
OSSIA_INLINE Vf div(Vf a, Vf b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
OSSIA_INLINE Vf fma(Vf a, Vf b, Vf c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
OSSIA_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  return {vbslq_f32(vcltq_f32(a.low, b.low), yes.low, no.low), vbslq_f32(vcltq_f32(a.high, b.high), yes.high, no.high)};
}
OSSIA_INLINE Vf min(Vf a, Vf b) { return where_less(a, b, a, b); }
OSSIA_INLINE Vf max(Vf a, Vf b) { return where_less(b, a, a, b); }
OSSIA_INLINE Vf power_of_two(Vf biased) {
  const Vu n = bits_of(biased);
  const uint32x4_t one = vdupq_n_u32(0x3f800000);
  return floats_of({vaddq_u32(vshlq_n_u32(n.low, 23), one), vaddq_u32(vshlq_n_u32(n.high, 23), one)});
}
OSSIA_INLINE Vf load_bf16(const uint16_t* p) {
  return floats_of({vshll_n_u16(vld1_u16(p), 16), vshll_n_u16(vld1_u16(p + 4), 16)});
}
OSSIA_INLINE uint16x4_t rounded_to_bf16(uint32x4_t bits) {  // as float_to_bf16
  const uint32x4_t top = vshrq_n_u32(bits, 16), odd = vandq_u32(top, vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  const uint32x4_t is_nan = vcgtq_u32(vandq_u32(bits, vdupq_n_u32(0x7fffffff)), vdupq_n_u32(0x7f800000));
  return vmovn_u32(vbslq_u32(is_nan, vorrq_u32(top, vdupq_n_u32(0x40)), rounded));
}
OSSIA_INLINE void store_bf16(uint16_t* p, Vf a) {
  const Vu bits = bits_of(a);
  vst1_u16(p, rounded_to_bf16(bits.low));
  vst1_u16(p + 4, rounded_to_bf16(bits.high));
}
OSSIA_INLINE Vf load_half(const uint16_t* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4)))};
}
OSSIA_INLINE Vf load_int8(const int8_t* p) {
  const int16x8_t wide = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}

#else

// The vector extension of gcc and clang, which they map to whatever the machine has.
constexpr int kLanes = 8;
typedef float Vf __attribute__((vector_size(32)));
typedef int32_t Vi __attribute__((vector_size(32)));
OSSIA_INLINE Vf zero() { return Vf{}; }
OSSIA_INLINE Vf set1(float x) { return Vf{x, x, x, x, x, x, x, x}; }
OSSIA_INLINE Vf load(const float* p) {
  Vf a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
OSSIA_INLINE void store(float* p, Vf a) { std::memcpy(p, &a, sizeof a); }
OSSIA_INLINE Vf add(Vf a, Vf b) { return a + b; }
OSSIA_INLINE Vf sub(Vf a, Vf b) { return a - b; }
OSSIA_INLINE Vf mul(Vf a, Vf b) { return a * b; }
OSSIA_INLINE Vf div(Vf a, Vf b) { return a / b; }
OSSIA_INLINE Vf fma(Vf a, Vf b, Vf c) {
#ifdef __FP_FAST_FMAF
  Vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
OSSIA_INLINE Vf where_less(Vf a, Vf b, Vf yes, Vf no) {
  const Vi mask = a < b;
  return (Vf)(((Vi)yes & mask) | ((Vi)no & ~mask));
}
OSSIA_INLINE Vf min(Vf a, Vf b) { return where_less(a, b, a, b); }
OSSIA_INLINE Vf max(Vf a, Vf b) { return where_less(b, a, a, b); }
OSSIA_INLINE Vf power_of_two(Vf biased) { return (Vf)(((Vi)biased << 23) + 0x3f800000); }
OSSIA_INLINE Vf load_bf16(const uint16_t* p) {
  Vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = bf16_to_float(load_u16(p + i));
  return r;
}
OSSIA_INLINE void store_bf16(uint16_t* p, Vf a) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(a[i]);
}
OSSIA_INLINE Vf load_half(const uint16_t* p) {
  Vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = half_to_float(load_u16(p + i));
  return r;
}
OSSIA_INLINE Vf load_int8(const int8_t* p) {
  Vf r;
  for (int i = 0; i < kLanes; ++i) r[i] = p[i];
  return r;
}

#endif

// The lanes added in a fixed order: halves onto each other.
OSSIA_INLINE float sum_lanes(Vf a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

OSSIA_INLINE Vf exp(Vf x) {
  const Vf magic = set1(12582912.0f);  // 1.5 2^23: adding it rounds to an integer, which stays in the low bits
  const Vf clamped = max(set1(-87.3f), min(set1(88.3f), x));
  const Vf biased = fma(clamped, set1(1.44269504f), magic);
  const Vf n = sub(biased, magic);
  Vf r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  Vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return where_less(x, set1(-87.3f), zero(), mul(p, power_of_two(biased)));
}

OSSIA_INLINE Vf sigmoid(Vf x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))); }

// Rows of float32 or, as uint16, of bfloat16. Where fewer than kLanes numbers are left, the other lanes are zero.
OSSIA_INLINE Vf load_up_to(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof *p);
  return load(lanes);
}
OSSIA_INLINE Vf load_up_to(const uint16_t* p, int64_t count) {
  if (count >= kLanes) return load_bf16(p);
  uint16_t lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof *p);
  return load_bf16(lanes);
}
OSSIA_INLINE void store_up_to(float* p, int64_t count, Vf a) {
  if (count >= kLanes) return store(p, a);
  float lanes[kLanes];
  store(lanes, a);
  std::memcpy(p, lanes, count * sizeof *p);
}
OSSIA_INLINE void store_up_to(uint16_t* p, int64_t count, Vf a) {
  if (count >= kLanes) return store_bf16(p, a);
  uint16_t lanes[kLanes];
  store_bf16(lanes, a);
  std::memcpy(p, lanes, count * sizeof *p);
}

}  // namespace ossia::OSSIA_NS
