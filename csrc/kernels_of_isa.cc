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
double integer_peak(int64_t num_rounds) {
  constexpr int kChains = 10;
  const auto start = std::chrono::steady_clock::now();
#if OSSIA_512 || OSSIA_256
  Bytes sums[kChains];
  for (Bytes& sum : sums) std::memset(&sum, 0, sizeof sum);
  Bytes a = broadcast4(reinterpret_cast<const int8_t*>("\1\2\3\4")), b = a;
  for (int64_t i = 0; i < num_rounds; ++i) {
    for (Bytes& sum : sums) {
#if OSSIA_512
      sum = _mm512_dpbusd_epi32(sum, a, b);
#elif OSSIA_ISA == OSSIA_AVXVNNI
      sum = _mm256_dpbusd_avx_epi32(sum, a, b);
#else
      // The empty statement hides from the compiler that all products are the same.
      asm volatile("" : "+x"(a));
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
#endif
    }
    asm volatile("" : "+x"(b));
  }
  volatile char sink = 0;
  for (const Bytes& sum : sums) {
    char first;
    std::memcpy(&first, &sum, 1);
    sink = static_cast<char>(sink + first);
  }
  constexpr double kPerRound = kChains * static_cast<double>(sizeof(Bytes));
#else
  Decoded w;
  std::memset(&w, 3, sizeof w);
  QBlock x = {};
  Vf sum = zero();
  for (int64_t i = 0; i < num_rounds; ++i) {
    asm volatile("" : : "r"(&w), "r"(&x) : "memory");
    sum = add(sum, dot_mxfp4(w, x));
  }
  volatile float sink = sum_lanes(sum);
  constexpr double kPerRound = kTileRows * kBlock;
  static_cast<void>(kChains);
#endif
  static_cast<void>(sink);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return kPerRound * static_cast<double>(num_rounds) / seconds.count() / 1e9;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {OSSIA_TEXT(OSSIA_NS), kTileRows, embed, rms_norm, rope, linear, moe, attention, pack_q8, integer_peak};

}  // namespace ossia::OSSIA_NS
