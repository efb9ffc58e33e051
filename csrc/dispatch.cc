// Which instruction sets this build has and this machine runs.
#include <cstring>

#if defined(OSSIA_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace ossia {

namespace portable {
extern const Kernels kernels;
}
#if defined(OSSIA_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
#endif
#if defined(OSSIA_ARM64)
namespace dotprod {
extern const Kernels kernels;
}
namespace i8mm {
extern const Kernels kernels;
}
#endif

namespace {

bool runs_avx2() {
#if defined(OSSIA_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool runs_avxvnni() {
#if defined(OSSIA_X86)
  // CPUID leaf 7, subleaf 1, EAX bit 4; not every compiler that we build with knows its name.
  unsigned highest = 0, eax = 7, ebx = 0, ecx = 1, edx = 0;
  asm volatile("cpuid" : "=a"(highest), "+b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  if (!runs_avx2() || highest < 1) return false;
  ebx = 0;
  ecx = 1;
  asm volatile("cpuid" : "+a"(eax), "+b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4) & 1;
#else
  return false;
#endif
}

bool runs_avx512vnni() {
#if defined(OSSIA_X86)
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Products of bytes, which Armv8.4 always has, and of matrices of them, which Armv8.6 always has.
bool runs_dotprod() {
#if defined(OSSIA_ARM64) && defined(__linux__)
  return (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}

bool runs_i8mm() {
#if defined(OSSIA_ARM64) && defined(__linux__)
  return runs_dotprod() && ((getauxval(AT_HWCAP2) >> 13) & 1);  // HWCAP2_I8MM
#else
  return false;
#endif
}

}  // namespace

const Kernels* find_kernels(const char* isa) {
  const auto is = [&](const char* name) { return std::strcmp(isa, name) == 0; };
  if (is("portable")) return &portable::kernels;
#if defined(OSSIA_X86)
  if (is("avx2") && runs_avx2()) return &avx2::kernels;
  if (is("avxvnni") && runs_avxvnni()) return &avxvnni::kernels;
  if (is("avx512vnni") && runs_avx512vnni()) return &avx512vnni::kernels;
#endif
#if defined(OSSIA_ARM64)
  if (is("dotprod") && runs_dotprod()) return &dotprod::kernels;
  if (is("i8mm") && runs_i8mm()) return &i8mm::kernels;
#endif
  return nullptr;
}

const char* best_isa() {
  if (runs_avx512vnni()) return "avx512vnni";
  if (runs_avxvnni()) return "avxvnni";
  if (runs_avx2()) return "avx2";
  if (runs_i8mm()) return "i8mm";
  if (runs_dotprod()) return "dotprod";
  return "portable";
}

}  // namespace ossia
