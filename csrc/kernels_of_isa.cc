// The table of one instruction set, and what its integer multiplication reaches at most.
#include <chrono>

#include "attention.h"
#include "dot.h"
#include "elementwise.h"
#include "linear.h"
#include "moe.h"

namespace ossia::OSSIA_NS {
namespace {

#define OSSIA_TEXT_OF(name) #name
#define OSSIA_TEXT(name) OSSIA_TEXT_OF(name)

// Multiply-accumulates of bytes in registers, enough of them at once to hide their latency. Where there is no byte dot
// product, a multiplication counts with the 16-bit addition that keeps it.
#if OSSIA_512 || OSSIA_256
OSSIA_INLINE Bytes multiply_accumulate(Bytes sum, Bytes a, Bytes b) {
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

double integer_peak(int64_t num_rounds) {
  const auto start = std::chrono::steady_clock::now();
#if OSSIA_512 || OSSIA_256
  constexpr double kPerRound = 8 * static_cast<double>(sizeof(Bytes));
  const Bytes a = broadcast4(reinterpret_cast<const int8_t*>("\1\2\3\4"));
  Bytes b = a, s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
  for (int64_t i = 0; i < num_rounds; ++i) {
    s0 = multiply_accumulate(s0, a, b);
    s1 = multiply_accumulate(s1, a, b);
    s2 = multiply_accumulate(s2, a, b);
    s3 = multiply_accumulate(s3, a, b);
    s4 = multiply_accumulate(s4, a, b);
    s5 = multiply_accumulate(s5, a, b);
    s6 = multiply_accumulate(s6, a, b);
    s7 = multiply_accumulate(s7, a, b);
    asm volatile("" : "+x"(b));
  }
  asm volatile("" : : "x"(s0), "x"(s1), "x"(s2), "x"(s3), "x"(s4), "x"(s5), "x"(s6), "x"(s7));
#else
  constexpr double kPerRound = kTileRows * kBlock;
  Decoded w;
  std::memset(&w, 3, sizeof w);
  QBlock x = {};
  Vf sum = zero();
  for (int64_t i = 0; i < num_rounds; ++i) {
    asm volatile("" : : "r"(&w), "r"(&x) : "memory");
    sum = add(sum, dot_mxfp4(w, x));
  }
  asm volatile("" : : "m"(sum));
#endif
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return kPerRound * static_cast<double>(num_rounds) / seconds.count() / 1e9;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {OSSIA_TEXT(OSSIA_NS), kTileRows, embed, rms_norm, rope, linear, moe, attention, pack_q8, integer_peak};

}  // namespace ossia::OSSIA_NS
