// The kernels for AVX2 with FMA and F16C.
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
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    _mm_prefetch(memory + i + 4096, _MM_HINT_T0);
    sum = _mm256_xor_si256(sum, _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(memory + i)), _mm256_loadu_si256((const __m256i*)(memory + i + 32))));
  }
  return (uint64_t)_mm256_extract_epi64(sum, 0) ^ (uint64_t)_mm256_extract_epi64(sum, 1) ^
         (uint64_t)_mm256_extract_epi64(sum, 2) ^ (uint64_t)_mm256_extract_epi64(sum, 3);
}

}  // namespace

const KernelTable& avx2_kernels() {
  static const KernelTable table = {
      16,
      {prefill<8, float, FloatProduct<8, float>>, prefill<8, bf16, FloatProduct<8, bf16>>, prefill<8, f16, FloatProduct<8, f16>>},
      {decode<8, float>, decode<8, bf16>, decode<8, f16>},
      {backward<8, float>, backward<8, bf16>, backward<8, f16>},
      {finish_backward<8, float>, finish_backward<8, bf16>, finish_backward<8, f16>},
      finish,
      read,
  };
  return table;
}

}  // namespace hal
