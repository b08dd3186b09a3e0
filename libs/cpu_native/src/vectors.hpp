// Vectors of floats in the compiler's own types: 16 lanes become AVX-512 code, 8 lanes AVX2 code.
//
// Everything is in an anonymous namespace and always inlined: a file that is compiled for AVX-512 must not emit a
// function that the linker could pick for a processor without it. For the same reason no <algorithm> here.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "call.hpp"

#define HAL_INLINE __attribute__((always_inline)) static inline

namespace hal {
namespace {

template <class T>
HAL_INLINE T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
HAL_INLINE T most(T a, T b) {
  return a < b ? b : a;
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

template <int N>
struct Vec {
  typedef float F __attribute__((vector_size(N * 4), aligned(N * 4), may_alias));
  typedef int I __attribute__((vector_size(N * 4), aligned(N * 4), may_alias));
};

template <int N>
HAL_INLINE typename Vec<N>::F load(const float* p) {
  return *(const typename Vec<N>::F*)p;
}
template <int N>
HAL_INLINE void store(float* p, typename Vec<N>::F x) {
  *(typename Vec<N>::F*)p = x;
}
template <int N>
HAL_INLINE typename Vec<N>::F all(float x) {
  return x - typename Vec<N>::F{};
}

// 2^x to 2e-7 relative. Far below -126 the result is 0 or next to it; NaN stays NaN.
#ifdef __AVX512F__
HAL_INLINE Vec<16>::F exp2v(Vec<16>::F v) {
  __m512 x = _mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)v);  // the second operand's NaN passes
  __m512 f = _mm512_reduce_ps(x, 0x01), p;                     // x - floor(x)
  p = _mm512_fmadd_ps(f, _mm512_set1_ps(2.1613085e-4f), _mm512_set1_ps(1.2467801e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6754560e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5485279e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022931e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314704e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return (Vec<16>::F)_mm512_scalef_ps(p, x);
}
#endif
HAL_INLINE Vec<8>::F exp2v(Vec<8>::F v) {
  // A polynomial on [-0.5, 0.5], times a power of two that is made in the exponent's bits.
  __m256 x = _mm256_max_ps(_mm256_set1_ps(-126.f), (__m256)v);
  x = _mm256_min_ps(_mm256_set1_ps(127.f), x);
  const __m256 t = _mm256_add_ps(x, _mm256_set1_ps(12582912.f));
  const __m256 f = _mm256_sub_ps(x, _mm256_sub_ps(t, _mm256_set1_ps(12582912.f)));
  __m256 p = _mm256_fmadd_ps(f, _mm256_set1_ps(1.5403530e-4f), _mm256_set1_ps(1.3333558e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6181291e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5504109e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022651e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314718e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.f));
  // The low bits of t hold the integer. For a NaN they give some power of two, and p is NaN itself.
  const __m256i power = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23), _mm256_set1_epi32(0x3f800000));
  return (Vec<8>::F)_mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// cap * tanh(x) with x = score * scale / cap, by tanh(x) = 1 - 2 / (exp(2x) + 1); `factor` = 2 * log2(e) * scale / cap.
template <int N>
HAL_INLINE typename Vec<N>::F softcapped(typename Vec<N>::F score, float factor, float cap) {
  return cap - (2.f * cap) / (exp2v(score * factor) + 1.f);
}

// n elements (a multiple of 8) as floats.
HAL_INLINE void widen(const float* p, float* o, int64_t n) { memcpy(o, p, n * 4); }
HAL_INLINE void widen(const f16* p, float* o, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_ps(o + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
}
HAL_INLINE void widen(const bf16* p, float* o, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm256_storeu_si256((__m256i*)(o + i), _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + i))), 16));
}

// n floats (a multiple of 8) times `factor`, rounded to the nearest, ties to even; NaN stays NaN.
HAL_INLINE void narrow(const float* p, float factor, float* o, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(o + i, _mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(factor)));
}
HAL_INLINE void narrow(const float* p, float factor, f16* o, int64_t n) {
  for (int64_t i = 0; i < n; i += 8)
    _mm_storeu_si128((__m128i*)(o + i), _mm256_cvtps_ph(_mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(factor)), 0));
}
HAL_INLINE void narrow(const float* p, float factor, bf16* o, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(factor));
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i w = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    w = _mm256_blendv_epi8(w, _mm256_set1_epi32(0x7fc0), nan);
    w = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0x08);
    _mm_storeu_si128((__m128i*)(o + i), _mm256_castsi256_si128(w));
  }
}

// The log-sum-exp of weights relative to 2^maximum. The lowest number is that of a mask, see mask.hpp.
HAL_INLINE float natural(float maximum, float sum) {
  return maximum <= -3.402823466e38f ? maximum : (maximum + __builtin_log2f(sum)) * kLn2;
}

// Divides a row's sum by its weights and writes it and its log-sum-exp. A row without weights gives 0 and -inf.
template <class T>
HAL_INLINE void finish_row(const Call& call, int64_t batch, int64_t head_kv, int64_t row, const float* out, Partial state) {
  const int64_t head = head_kv * call.group + row % call.group, query = row / call.group;
  T* o = (T*)call.out + batch * call.out_strides[0] + head * call.out_strides[1] + query * call.out_strides[2];
  narrow(out, state.sum == 0.f ? 0.f : 1.f / state.sum, o, call.dim_v);
  if (call.lse)
    call.lse[(batch * call.heads_q + head) * call.len_q + query] =
        state.sum == 0.f ? -kInfinity : natural(state.maximum, state.sum);
}

template <class T>
HAL_INLINE const T* query_row(const Call& call, int64_t batch, int64_t head_kv, int64_t row) {
  return (const T*)call.query + batch * call.query_strides[0] +
         (head_kv * call.group + row % call.group) * call.query_strides[1] + row / call.group * call.query_strides[2];
}
HAL_INLINE int64_t first_key(const Call& call, int64_t row) {
  return most<int64_t>(0, least(call.len_k, row / call.group + call.band_low));
}
HAL_INLINE int64_t end_key(const Call& call, int64_t row) {
  return most<int64_t>(0, least(call.len_k, row / call.group + call.band_high + 1));
}

}  // namespace
}  // namespace hal
