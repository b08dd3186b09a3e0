// The steps of fields and the count of pixels, for vectors of 8 or 16 floats; see vectors.hpp for why all is inlined.
//
// A step walks down a strip of one vector's width and keeps the rows above in registers, so that each old value is
// loaded three times: as itself and as its neighbours' neighbour.
#pragma once

#include "fields.hpp"
#include "vectors.hpp"

namespace hal {
namespace {

template <int N>
struct Loose {  // a vector anywhere in memory
  typedef float F __attribute__((vector_size(N * 4), aligned(4), may_alias));
};
template <int N>
HAL_INLINE typename Vec<N>::F load_loose(const float* p) {
  return (typename Vec<N>::F)(*(const typename Loose<N>::F*)p);
}
HAL_INLINE Vec<8>::F fused(Vec<8>::F a, Vec<8>::F b, Vec<8>::F c) { return (Vec<8>::F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#ifdef __AVX512F__
HAL_INLINE Vec<16>::F fused(Vec<16>::F a, Vec<16>::F b, Vec<16>::F c) { return (Vec<16>::F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#endif

// The first `count` lanes.
template <int N>
HAL_INLINE void store_some(float* p, typename Vec<N>::F x, int64_t count) {
  if (count >= N) {
    *(typename Loose<N>::F*)p = (typename Loose<N>::F)x;
    return;
  }
  alignas(64) float lanes[N];
  store<N>(lanes, x);
  for (int64_t i = 0; i < count; i++) p[i] = lanes[i];
}

HAL_INLINE const float* row_of(const Field& field, int64_t row, int64_t height) {
  return field.values + (row < 0 ? row + height : row >= height ? row - height : row) * field.stride;
}

// What lies beyond the border of each row.
HAL_INLINE void frame(const Field& field, int64_t width, int64_t first, int64_t last) {
  if (!field.framed) return;
  for (int64_t y = first; y < last; y++) {
    float* row = field.values + y * field.stride;
    row[-1] = row[width - 1];
    row[width] = row[0];
  }
}

// w + 2 c + e.
template <int N>
HAL_INLINE typename Vec<N>::F line(const float* p, typename Vec<N>::F centre) {
  return fused(all<N>(2.f), centre, load_loose<N>(p - 1) + load_loose<N>(p + 1));
}

template <int N, bool Reacts>
HAL_INLINE void reaction_diffusion_rows(const Reaction& by, const Field old[2], const Field now[2], int64_t height, int64_t width, int64_t first, int64_t last) {
  using F = typename Vec<N>::F;
  const F two = all<N>(2.f), rate_u = all<N>(by.rate_u), rate_v = all<N>(by.rate_v), share_u = all<N>(by.share_u);
  const F share_v = all<N>(by.share_v), r = all<N>(-by.r), s = all<N>(by.s), constant = all<N>(by.constant);
  for (int64_t x = 0; x < width; x += N) {
    const float *p = row_of(old[0], first - 1, height) + x, *q = row_of(old[1], first - 1, height) + x;
    F line_u[2] = {line<N>(p, load_loose<N>(p)), {}}, line_v[2] = {line<N>(q, load_loose<N>(q)), {}};
    p = row_of(old[0], first, height) + x, q = row_of(old[1], first, height) + x;
    F u = load_loose<N>(p), v = load_loose<N>(q);
    line_u[1] = line<N>(p, u), line_v[1] = line<N>(q, v);
    for (int64_t y = first; y < last; y++) {
      p = row_of(old[0], y + 1, height) + x, q = row_of(old[1], y + 1, height) + x;
      const F next_u = load_loose<N>(p), next_v = load_loose<N>(q);
      const F below_u = line<N>(p, next_u), below_v = line<N>(q, next_v);
      F new_u = fused(rate_u, fused(two, line_u[1], line_u[0] + below_u), share_u * u);
      F new_v = fused(rate_v, fused(two, line_v[1], line_v[0] + below_v), share_v * v);
      if (Reacts) {
        new_u = fused(r, fused(u * u, u, v), new_u);
        new_v = fused(s, u, new_v) + constant;
      }
      store_some<N>(now[0].values + y * now[0].stride + x, new_u, width - x);
      store_some<N>(now[1].values + y * now[1].stride + x, new_v, width - x);
      line_u[0] = line_u[1], line_u[1] = below_u, u = next_u;
      line_v[0] = line_v[1], line_v[1] = below_v, v = next_v;
    }
  }
  frame(now[0], width, first, last);
  frame(now[1], width, first, last);
}

template <int N>
void reaction_diffusion_band(const Reaction& by, const Field old[2], const Field now[2], int64_t height, int64_t width, int64_t first, int64_t last) {
  if (by.reacts) reaction_diffusion_rows<N, true>(by, old, now, height, width, first, last);
  else reaction_diffusion_rows<N, false>(by, old, now, height, width, first, last);
}

template <int N>
void ricci_band(float dt, const Field& old, const Field& now, int64_t height, int64_t width, int64_t first, int64_t last) {
  using F = typename Vec<N>::F;
  const F minus_four = all<N>(-4.f), step = all<N>(dt), base = all<N>(-2.f * kLog2e);
  for (int64_t x = 0; x < width; x += N) {
    F up = load_loose<N>(row_of(old, first - 1, height) + x);
    const float* p = row_of(old, first, height) + x;
    F phi = load_loose<N>(p);
    for (int64_t y = first; y < last; y++) {
      const float* below = row_of(old, y + 1, height) + x;
      const F down = load_loose<N>(below);
      const F laplacian = fused(minus_four, phi, up + down + (load_loose<N>(p - 1) + load_loose<N>(p + 1)));
      store_some<N>(now.values + y * now.stride + x, fused(step * exp2v(base * phi), laplacian, phi), width - x);
      up = phi, phi = down, p = below;
    }
  }
  frame(now, width, first, last);
}

// 64 pixels as bits: value >= level, which NaN never is.
HAL_INLINE uint64_t bits_of(const float* p, float level, int64_t count) {
  uint64_t found = 0;
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16)
    found |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(p + i), _mm512_set1_ps(level), _CMP_GE_OQ) << i;
#endif
  for (; i + 8 <= count; i += 8)
    found |= (uint64_t)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(level), _CMP_GE_OQ)) << i;
  for (; i < count; i++) found |= (uint64_t)(p[i] >= level) << i;
  return found;
}

template <int N>
void euler_band(const float* field, float level, int32_t* parts, uint64_t* bits, int64_t height, int64_t width, int64_t first, int64_t last) {
  const int64_t words = width / 64 + 1;  // the corner to the right of the last pixel belongs to a word too
  uint64_t *above = bits, *here = bits + words;
  for (int64_t y = first - 1; y < last; y++) {
    for (int64_t w = 0; w < words; w++) {
      const int64_t left = width - 64 * w;
      here[w] = y < 0 || y >= height ? 0 : bits_of(field + y * width + 64 * w, level, left < 64 ? left : 64);
    }
    if (y >= first) {
      int64_t sum = 0;
      uint64_t carry_above = 0, carry_here = 0;
      for (int64_t w = 0; w < words; w++) {
        const uint64_t a = above[w], h = here[w], west_a = a << 1 | carry_above, west_h = h << 1 | carry_here;
        carry_above = a >> 63, carry_here = h >> 63;
        sum += __builtin_popcountll(a | h | west_a | west_h) - __builtin_popcountll(a | h) - __builtin_popcountll(h | west_h) + __builtin_popcountll(h);
      }
      parts[y] = (int32_t)sum;
    }
    uint64_t* swap = above;
    above = here, here = swap;
  }
}

template <int N>
constexpr FieldKernels field_kernels() {
  return {reaction_diffusion_band<N>, ricci_band<N>, euler_band<N>};
}

}  // namespace
}  // namespace hal
