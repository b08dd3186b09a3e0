// The kernels for AVX-512 (F, BW, VL, DQ) with FMA and F16C. Compiled with those flags, so nothing here may run, or be
// linked into code that runs, on a processor without them.
#include "backward.hpp"
#include "decode.hpp"

namespace hal {
namespace {

void finish(const Call& call, int64_t batch, int64_t head, int64_t row, const float* out, Partial state) {
  if (call.dtype == HAL_FLOAT32) finish_row<float>(call, batch, head, row, out, state);
  else if (call.dtype == HAL_BFLOAT16) finish_row<bf16>(call, batch, head, row, out, state);
  else finish_row<f16>(call, batch, head, row, out, state);
}

uint64_t read(const char* memory, int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    _mm_prefetch(memory + i + 4096, _MM_HINT_T0);
    _mm_prefetch(memory + i + 4160, _MM_HINT_T0);
    _mm_prefetch(memory + i + 4224, _MM_HINT_T0);
    _mm_prefetch(memory + i + 4288, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(memory + i + 64 * j));
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return (uint64_t)_mm512_reduce_add_epi64(all);
}

}  // namespace

const KernelTable& avx512_kernels() {
  static const KernelTable table = {
      32,
      {prefill<16, float, FloatProduct<16, float>>, prefill<16, bf16, FloatProduct<16, bf16>>, prefill<16, f16, FloatProduct<16, f16>>},
      {decode<16, float>, decode<16, bf16>, decode<16, f16>},
      {backward<16, float>, backward<16, bf16>, backward<16, f16>},
      {finish_backward<16, float>, finish_backward<16, bf16>, finish_backward<16, f16>},
      finish,
      read,
  };
  return table;
}

}  // namespace hal
