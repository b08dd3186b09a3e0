#include "cpuid.hpp"

#include <cpuid.h>

namespace hal {

int best_isa() {
  static const int best = [] {
    __builtin_cpu_init();
    unsigned a, b, c, d;
    // F16C has no name in __builtin_cpu_supports of older compilers. AVX2's name says that the system keeps ymm registers.
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 29 & 1)) return 0;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
      return (int)HAL_ISA_AVX2;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return (int)HAL_ISA_AVX512;
    return (int)HAL_ISA_AVX512_BF16;
  }();
  return best;
}

int preferred_isa() {
  // Intel's Sapphire and Emerald Rapids run vdpbf16ps at a third of the rate of float32's fused multiply-adds.
  const int best = best_isa();
  return best == HAL_ISA_AVX512_BF16 && !__builtin_cpu_is("amd") ? (int)HAL_ISA_AVX512 : best;
}

}  // namespace hal
