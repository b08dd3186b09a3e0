// AVX-512 with products of bfloat16 pairs. All but the prefill of bfloat16 is that of AVX-512.
#include "pairs.hpp"
#include "prefill.hpp"

namespace hal {

const KernelTable& avx512_bf16_kernels() {
  static const KernelTable table = [] {
    KernelTable made = avx512_kernels();
    made.prefill[HAL_BFLOAT16] = prefill<16, bf16, PairProduct>;
    return made;
  }();
  return table;
}

}  // namespace hal
