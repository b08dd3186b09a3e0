// Products of bfloat16 pairs that sum in float32 (vdpbf16ps): twice the rate of float32 on AMD Zen 4 and later.
//
// A step takes two elements of the sum, which lie in one 32-bit word: two channels of query and key for the scores, two
// keys of weights and values for the output.
#pragma once

#include "vectors.hpp"

namespace hal {
namespace {

typedef uint32_t PairWord __attribute__((aligned(2), may_alias));

struct PairProduct {
  typedef PairWord Operand;
  static constexpr int kPair = 2;
  typedef Vec<16>::F F;

  HAL_INLINE void pack_query(const bf16* q, PairWord* out, int64_t stride, int64_t dim, float*) {
    for (int64_t d = 0; d < dim / 2; d++) out[d * stride] = ((const PairWord*)q)[d];
  }
  // Strides become those of pairs.
  HAL_INLINE const PairWord* pack_keys(const bf16* k, int64_t& stride, int64_t keys, int64_t dim, PairWord* room) {
    if (keys % kKeyStep == 0 && stride % 2 == 0) {
      stride /= 2;
      return (const PairWord*)k;
    }
    for (int64_t i = 0; i < round_up(keys, kKeyStep); i++)
      if (i < keys) memcpy(room + i * dim / 2, k + i * stride, dim * 2); else memset(room + i * dim / 2, 0, dim * 2);
    stride = dim / 2;
    return room;
  }
  // [keys / 2][dim] words, each of one channel of two keys.
  HAL_INLINE const PairWord* pack_values(const bf16* v, int64_t& stride, int64_t keys, int64_t dim, PairWord* room) {
    for (int64_t i = 0; i < round_up(keys, kKeyStep); i += 2) {
      const bf16 *a = v + i * stride, *b = a + stride;
      for (int64_t d = 0; d < dim; d += 8) {
        const __m128i none = _mm_setzero_si128();
        const __m256i x = _mm256_cvtepu16_epi32(i < keys ? _mm_loadu_si128((const __m128i*)(a + d)) : none);
        const __m256i y = _mm256_cvtepu16_epi32(i + 1 < keys ? _mm_loadu_si128((const __m128i*)(b + d)) : none);
        _mm256_storeu_si256((__m256i*)(room + i / 2 * dim + d), _mm256_or_si256(x, _mm256_slli_epi32(y, 16)));
      }
    }
    stride = dim;
    return room;
  }
  HAL_INLINE F step(PairWord a, F b, F sum) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)_mm512_set1_epi32((int)a));
  }
  HAL_INLINE const PairWord* weights(const PairWord*, const PairWord* weights) { return weights; }
  // Two weights of each row as a word, and the sum of what will be multiplied.
  HAL_INLINE void round(F a, F b, PairWord* out, F& sum) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i x = _mm512_srli_epi32(_mm512_add_epi32((__m512i)a, half), 16), y = _mm512_add_epi32((__m512i)b, half);
    const __m512i word = _mm512_mask_blend_epi16(0xaaaaaaaa, x, y);
    _mm512_store_si512((void*)out, word);
    sum = (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)word, (__m512bh)_mm512_set1_epi32(0x3f803f80));
  }
};

}  // namespace
}  // namespace hal
