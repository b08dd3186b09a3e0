// Attention of few rows against many keys: keys and values are streamed once, 64 keys at a time, for all rows of a key
// head; the keys of a head may be split over threads, whose partial results are merged afterwards.
#pragma once

#include "mask.hpp"

namespace hal {
namespace {

// Two vectors from 2 N elements that follow each other. bfloat16 comes as its even and its odd elements, which takes two
// cheap operations; the query and the output are kept in the same order.
template <class T>
struct IsPaired {
  static constexpr bool value = false;
};
template <>
struct IsPaired<bf16> {
  static constexpr bool value = true;
};

#ifdef __AVX512F__
HAL_INLINE void load_two(const float* p, Vec<16>::F& a, Vec<16>::F& b) {
  a = (Vec<16>::F)_mm512_loadu_ps(p);
  b = (Vec<16>::F)_mm512_loadu_ps(p + 16);
}
HAL_INLINE void load_two(const f16* p, Vec<16>::F& a, Vec<16>::F& b) {
  a = (Vec<16>::F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b = (Vec<16>::F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1));
}
HAL_INLINE void load_two(const bf16* p, Vec<16>::F& a, Vec<16>::F& b) {
  const __m512i w = _mm512_loadu_si512(p);
  a = (Vec<16>::F)_mm512_slli_epi32(w, 16);
  b = (Vec<16>::F)_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000));
}
#endif
HAL_INLINE void load_two(const float* p, Vec<8>::F& a, Vec<8>::F& b) {
  a = (Vec<8>::F)_mm256_loadu_ps(p);
  b = (Vec<8>::F)_mm256_loadu_ps(p + 8);
}
HAL_INLINE void load_two(const f16* p, Vec<8>::F& a, Vec<8>::F& b) {
  a = (Vec<8>::F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b = (Vec<8>::F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
}
HAL_INLINE void load_two(const bf16* p, Vec<8>::F& a, Vec<8>::F& b) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p);
  a = (Vec<8>::F)_mm256_slli_epi32(w, 16);
  b = (Vec<8>::F)_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000));
}

// Sums of the vectors of four keys, in a tree: each 128-bit lane of the result has one partial sum per key.
#ifdef __AVX512F__
HAL_INLINE Vec<16>::F fold4(Vec<16>::F a, Vec<16>::F b, Vec<16>::F c, Vec<16>::F d) {
  auto fold = [](__m512 x, __m512 y) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  const __m512d x = _mm512_castps_pd(fold((__m512)a, (__m512)b)), y = _mm512_castps_pd(fold((__m512)c, (__m512)d));
  return (Vec<16>::F)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
// The lanes' partial sums added: the sums of 16 keys from four results of fold4.
HAL_INLINE Vec<16>::F fold_lanes(const Vec<16>::F* part) {
  auto fold = [](__m512 x, __m512 y) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return (Vec<16>::F)fold(fold((__m512)part[0], (__m512)part[1]), fold((__m512)part[2], (__m512)part[3]));
}
#endif
HAL_INLINE Vec<8>::F fold4(Vec<8>::F a, Vec<8>::F b, Vec<8>::F c, Vec<8>::F d) {
  return (Vec<8>::F)_mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
}
HAL_INLINE Vec<8>::F fold_lanes(const Vec<8>::F* part) {
  const __m256 a = (__m256)part[0], b = (__m256)part[1];
  return (Vec<8>::F)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Rows are worked on four at once, or two, as the registers allow.
template <int N, class T>
struct Decode {
  typedef typename Vec<N>::F F;
  typedef typename Vec<N>::I I;
  static constexpr int kGroups = kBlockKeys / N, kFours = N / 4, kRows = N == 16 ? 4 : 2;

  struct State {
    float *query, *out, *weights;  // [rows][dim_qk], [rows][dim_v], [4][64]
    float maximum[HAL_DECODE_ROWS], sum[HAL_DECODE_ROWS];
    int64_t first[HAL_DECODE_ROWS], end[HAL_DECODE_ROWS];
  };

  // Which of 64 keys a row sees, a bit each.
  HAL_INLINE uint64_t visible(const Call& call, const Task& task, const State& s, int64_t row, int64_t key, int64_t keys) {
    const int64_t low = most<int64_t>(s.first[row] - key, 0), high = least(s.end[row] - key, keys);
    if (low >= high) return 0;
    uint64_t bits = (~uint64_t(0) >> (64 - (high - low))) << low;
    if (call.mask)
      bits &= with_mask<T>(call, task.batch, task.head, row, key,
                           [&](auto* m) __attribute__((always_inline)) { return let_through(m, call.mask_strides[3], low, high); });
    return bits;
  }

  // All ones in the lanes of the keys that are seen.
  HAL_INLINE I lanes(uint64_t bits) {
    I places;
    for (int i = 0; i < N; i++) places[i] = 1 << i;
    return (places & (int)(bits & ((1 << N) - 1))) != 0;
  }

  // 64 keys for R rows from `row` on. `fetch`: ask for the values of these keys, and the next keys, ahead of their use.
  template <int R>
  HAL_INLINE void block(const Call& call, const Task& task, State& s, int64_t row, int64_t key, int64_t keys, bool hidden, bool fetch) {
    const int64_t dim = call.dim_qk, dim_v = call.dim_v, ks = call.key_strides[2], vs = call.value_strides[2];
    const T* k = (const T*)call.key + task.batch * call.key_strides[0] + task.head * call.key_strides[1] + key * ks;
    const T* v = (const T*)call.value + task.batch * call.value_strides[0] + task.head * call.value_strides[1] + key * vs;
    constexpr int kLine = 64 / (int)sizeof(T);
    F part[R][kFours], score[R][kGroups];
#pragma GCC unroll 1
    for (int g = 0; g < kGroups; g++) {
#pragma GCC unroll 4
      for (int j = 0; j < kFours; j++) {
        F sum[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) sum[r][i] = F{};
        const T* kp[4];
        for (int i = 0; i < 4; i++) {
          const int64_t n = least<int64_t>(g * N + j * 4 + i, keys - 1);
          kp[i] = k + n * ks;
          if (fetch)
            for (int64_t d = 0; d < dim_v; d += kLine) _mm_prefetch((const char*)(v + n * vs + d), _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int64_t d = 0; d < dim; d += 2 * N)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            F a, b;
            load_two(kp[i] + d, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
              const float* q = s.query + (row + r) * dim + d;
              sum[r][i] = a * load<N>(q) + sum[r][i];
              sum[r][i] = b * load<N>(q + N) + sum[r][i];
            }
          }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) part[r][j] = fold4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) score[r][g] = fold_lanes(part[r]);
    }
    if (call.softcap > 0) {
      const float factor = 2.f / call.softcap;
      for (int r = 0; r < R; r++)
        for (int g = 0; g < kGroups; g++) score[r][g] = softcapped<N>(score[r][g], factor, call.softcap * kLog2e);
    }
    if (is_additive(call))
      for (int r = 0; r < R; r++) {
        float* added = s.weights;  // free until the scores become weights
        with_mask<T>(call, task.batch, task.head, row + r, key, [&](auto* m) __attribute__((always_inline)) {
          added_row(m, call.mask_strides[3], keys, kBlockKeys, added);
        });
        for (int g = 0; g < kGroups; g++) score[r][g] += load<N>(added + g * N);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      uint64_t bits = ~uint64_t(0);
      if (hidden) {
        bits = visible(call, task, s, row + r, key, keys);
        for (int g = 0; g < kGroups; g++) score[r][g] = lanes(bits >> (N * g)) ? score[r][g] : all<N>(-kInfinity);
      }
      F tops = score[r][0];
      for (int g = 1; g < kGroups; g++) tops = score[r][g] > tops ? score[r][g] : tops;
      float top = tops[0];
      for (int i = 1; i < N; i++) top = most(top, tops[i]);
      float& maximum = s.maximum[row + r];
      if (top > maximum) {
        const float factor = exp2v(all<N>(maximum - top))[0];
        maximum = top;
        s.sum[row + r] *= factor;
        float* o = s.out + (row + r) * dim_v;
        for (int64_t d = 0; d < dim_v; d += N) store<N>(o + d, load<N>(o + d) * factor);
      }
      F sum = F{};
      for (int g = 0; g < kGroups; g++) {
        F e = exp2v(score[r][g] - maximum);
        if (hidden) e = lanes(bits >> (N * g)) ? e : F{};
        sum += e;
        store<N>(s.weights + r * kBlockKeys + g * N, e);
      }
      float whole = 0;
      for (int i = 0; i < N; i++) whole += sum[i];
      s.sum[row + r] += whole;
    }
    int64_t d = 0;
    for (; d + 4 * N <= dim_v; d += 4 * N) values<R, 4 * N>(call, s, row, k, v, d, keys, fetch);
    for (; d < dim_v; d += 2 * N) values<R, 2 * N>(call, s, row, k, v, d, keys, fetch);
  }

  // Adds the weighted values of W channels. Fetches the part of the next keys that lies at the same channels.
  template <int R, int W>
  HAL_INLINE void values(const Call& call, State& s, int64_t row, const T* k, const T* v, int64_t d, int64_t keys, bool fetch) {
    const int64_t ks = call.key_strides[2], vs = call.value_strides[2], dim_v = call.dim_v;
    F sum[R][W / N];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < W / N; i++) sum[r][i] = load<N>(s.out + (row + r) * dim_v + d + N * i);
#pragma GCC unroll 1
    for (int64_t key = 0; key < keys; key++) {
      const T* p = v + key * vs + d;
      if (fetch)
        for (int e = 0; e < W; e += 64 / (int)sizeof(T)) _mm_prefetch((const char*)(k + (key + kBlockKeys) * ks + d + e), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int i = 0; i < W / N / 2; i++) {
        F a, b;
        load_two(p + 2 * N * i, a, b);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const float w = s.weights[r * kBlockKeys + key];
          sum[r][2 * i] = a * w + sum[r][2 * i];
          sum[r][2 * i + 1] = b * w + sum[r][2 * i + 1];
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < W / N; i++) store<N>(s.out + (row + r) * dim_v + d + N * i, sum[r][i]);
  }

  // Partial results of all rows of a head over the keys of a task: [rows][dim_v + 2] floats.
  HAL_INLINE void run(const Call& call, const Task& task, char* scratch, float* partial) {
    State s;
    const int64_t dim = call.dim_qk, dim_v = call.dim_v, rows = call.rows;
    s.query = (float*)scratch;
    s.out = s.query + HAL_DECODE_ROWS * dim;
    s.weights = s.out + HAL_DECODE_ROWS * dim_v;
    // The scores are made in log2 units at once; under a softcap they keep the user's unit until it is applied.
    const float unit = call.scale * kLog2e;
    int64_t least_end = call.len_k, most_first = 0, begin = call.len_k, stop = 0;
    for (int64_t r = 0; r < rows; r++) {
      const T* q = query_row<T>(call, task.batch, task.head, r);
      for (int64_t d = 0; d < dim; d += 2 * N) {
        F a, b;
        load_two(q + d, a, b);
        store<N>(s.query + r * dim + d, a * unit);
        store<N>(s.query + r * dim + d + N, b * unit);
      }
      memset(s.out + r * dim_v, 0, dim_v * 4);
      s.maximum[r] = -kInfinity;
      s.sum[r] = 0;
      s.first[r] = first_key(call, r);
      s.end[r] = end_key(call, r);
      least_end = least(least_end, s.end[r]);
      most_first = most(most_first, s.first[r]);
      begin = least(begin, s.first[r]);
      stop = most(stop, s.end[r]);
    }
    const int64_t last = least(task.key + task.keys, stop);
    for (int64_t key = most(task.key, begin); key < last; key += kBlockKeys) {
      const int64_t keys = least(kBlockKeys, last - key);
      const bool hidden = call.mask || keys < kBlockKeys || key + kBlockKeys > least_end || key < most_first;
      bool any = !call.mask;
      for (int64_t r = 0; r < rows && !any; r++) any = visible(call, task, s, r, key, keys) != 0;
      if (!any) continue;
      int64_t r = 0;
      for (; r + kRows <= rows; r += kRows) block<kRows>(call, task, s, r, key, keys, hidden, r == 0);
      if (kRows > 2 && r + 2 <= rows) {
        block<2>(call, task, s, r, key, keys, hidden, r == 0);
        r += 2;
      }
      if (r < rows) block<1>(call, task, s, r, key, keys, hidden, r == 0);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* o = partial + r * partial_floats(call);
      const float* from = s.out + r * dim_v;
      for (int64_t d = 0; d < dim_v; d += 2 * N)
        for (int i = 0; i < N; i++) {  // bfloat16: even and odd channels back into order
          o[d + (IsPaired<T>::value ? 2 * i : i)] = from[d + i];
          o[d + (IsPaired<T>::value ? 2 * i + 1 : N + i)] = from[d + N + i];
        }
      o[dim_v] = s.maximum[r];
      o[dim_v + 1] = s.sum[r];
    }
  }
};

template <int N, class T>
void decode(const Call& call, const Task& task, char* scratch, float* partial) {
  Decode<N, T>::run(call, task, scratch, partial);
}

}  // namespace
}  // namespace hal
