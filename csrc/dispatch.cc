// Which instruction sets this build has and this machine runs.
#include <cstring>

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

}  // namespace

const Kernels* find_kernels(const char* isa) {
  const auto is = [&](const char* name) { return std::strcmp(isa, name) == 0; };
  if (is("portable")) return &portable::kernels;
#if defined(OSSIA_X86)
  if (is("avx2") && runs_avx2()) return &avx2::kernels;
  if (is("avxvnni") && runs_avxvnni()) return &avxvnni::kernels;
  if (is("avx512vnni") && runs_avx512vnni()) return &avx512vnni::kernels;
#endif
  return nullptr;
}

const char* best_isa() {
  if (runs_avx512vnni()) return "avx512vnni";
  if (runs_avxvnni()) return "avxvnni";
  if (runs_avx2()) return "avx2";
  return "portable";
}

}  // namespace ossia
