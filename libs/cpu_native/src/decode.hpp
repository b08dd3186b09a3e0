// Attention of few rows against many keys: keys and values are streamed once, 64 keys at a time, for all rows of a key
// head; the keys of a head may be split over threads, whose partial results are merged afterwards.
#pragma once

#include "vectors.hpp"

namespace hal {
namespace {

// 32 elements as two vectors. bfloat16 comes as its even and its odd elements, which takes two cheap operations; the
// query and the output are kept in the same order.
HAL_INLINE void load32(const float* p, __m512& a, __m512& b) {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + 16);
}
HAL_INLINE void load32(const f16* p, __m512& a, __m512& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1));
}
HAL_INLINE void load32(const bf16* p, __m512& a, __m512& b) {
  const __m512i w = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}
template <class T>
struct IsPaired {
  static constexpr bool value = false;
};
template <>
struct IsPaired<bf16> {
  static constexpr bool value = true;
};

// Sums of the four vectors of four keys, in a tree: each 128-bit lane of the result has one partial sum per key.
HAL_INLINE __m512 fold(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
HAL_INLINE __m512 fold_pairs(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
HAL_INLINE __m512 fold_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

template <class T>
struct Decode {
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
    if (call.mask) {
      const int64_t step = call.mask_strides[3];
      const uint8_t* m = mask_row(call, task.batch, task.head, row) + key * step;
      for (int64_t i = low; i < high; i++) bits &= ~(uint64_t(m[i * step] == 0) << i);
    }
    return bits;
  }

  // 64 keys for R rows from `row` on. `fetch`: ask for the values of these keys, and the next keys, ahead of their use.
  template <int R>
  HAL_INLINE void block(const Call& call, const Task& task, State& s, int64_t row, int64_t key, int64_t keys, bool hidden, bool fetch) {
    const int64_t dim = call.dim_qk, dim_v = call.dim_v, ks = call.key_strides[2], vs = call.value_strides[2];
    const T* k = (const T*)call.key + task.batch * call.key_strides[0] + task.head * call.key_strides[1] + key * ks;
    const T* v = (const T*)call.value + task.batch * call.value_strides[0] + task.head * call.value_strides[1] + key * vs;
    constexpr int kLine = 64 / (int)sizeof(T);
    __m512 part[R][4], score[R][4];
#pragma GCC unroll 1
    for (int g = 0; g < 4; g++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __m512 sum[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) sum[r][i] = _mm512_setzero_ps();
        const T* kp[4];
        for (int i = 0; i < 4; i++) {
          const int64_t n = least<int64_t>(g * 16 + j * 4 + i, keys - 1);
          kp[i] = k + n * ks;
          if (fetch)
            for (int64_t d = 0; d < dim_v; d += kLine) _mm_prefetch((const char*)(v + n * vs + d), _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int64_t d = 0; d < dim; d += 32)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) {
            __m512 a, b;
            load32(kp[i] + d, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
              const float* q = s.query + (row + r) * dim + d;
              sum[r][i] = _mm512_fmadd_ps(a, _mm512_load_ps(q), sum[r][i]);
              sum[r][i] = _mm512_fmadd_ps(b, _mm512_load_ps(q + 16), sum[r][i]);
            }
          }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) part[r][j] = fold_pairs(fold(sum[r][0], sum[r][1]), fold(sum[r][2], sum[r][3]));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) score[r][g] = fold_lanes(fold_lanes(part[r][0], part[r][1]), fold_lanes(part[r][2], part[r][3]));
    }
    if (call.softcap > 0) {
      const float factor = 2.f / call.softcap;
      for (int r = 0; r < R; r++)
        for (int g = 0; g < 4; g++)
          score[r][g] = (__m512)softcapped<16>((Vec<16>::F)score[r][g], factor, call.softcap * kLog2e);
    }
    const __m512 none = _mm512_set1_ps(-kInfinity);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      uint64_t bits = ~uint64_t(0);
      if (hidden) {
        bits = visible(call, task, s, row + r, key, keys);
        for (int g = 0; g < 4; g++) score[r][g] = _mm512_mask_mov_ps(none, (__mmask16)(bits >> (16 * g)), score[r][g]);
      }
      const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(score[r][0], score[r][1]), _mm512_max_ps(score[r][2], score[r][3])));
      float& maximum = s.maximum[row + r];
      if (top > maximum) {
        const float factor = exp2v(all<16>(maximum - top))[0];
        maximum = top;
        s.sum[row + r] *= factor;
        float* o = s.out + (row + r) * dim_v;
        for (int64_t d = 0; d < dim_v; d += 16) _mm512_store_ps(o + d, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(o + d)));
      }
      __m512 sum = _mm512_setzero_ps();
      for (int g = 0; g < 4; g++) {
        __m512 e = (__m512)exp2v((Vec<16>::F)_mm512_sub_ps(score[r][g], _mm512_set1_ps(maximum)));
        if (hidden) e = _mm512_maskz_mov_ps((__mmask16)(bits >> (16 * g)), e);
        sum = _mm512_add_ps(sum, e);
        _mm512_store_ps(s.weights + r * kBlockKeys + g * 16, e);
      }
      s.sum[row + r] += _mm512_reduce_add_ps(sum);
    }
    int64_t d = 0;
    for (; d + 64 <= dim_v; d += 64) values<R, 64>(call, s, row, k, v, d, keys, fetch);
    for (; d < dim_v; d += 32) values<R, 32>(call, s, row, k, v, d, keys, fetch);
  }

  // Adds the weighted values of W channels. Fetches the part of the next keys that lies at the same channels.
  template <int R, int W>
  HAL_INLINE void values(const Call& call, State& s, int64_t row, const T* k, const T* v, int64_t d, int64_t keys, bool fetch) {
    const int64_t ks = call.key_strides[2], vs = call.value_strides[2], dim_v = call.dim_v;
    __m512 sum[R][W / 16];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < W / 16; i++) sum[r][i] = _mm512_load_ps(s.out + (row + r) * dim_v + d + 16 * i);
#pragma GCC unroll 1
    for (int64_t key = 0; key < keys; key++) {
      const T* p = v + key * vs + d;
      if (fetch)
        for (int e = 0; e < W; e += 64 / (int)sizeof(T)) _mm_prefetch((const char*)(k + (key + kBlockKeys) * ks + d + e), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int i = 0; i < W / 32; i++) {
        __m512 a, b;
        load32(p + 32 * i, a, b);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512 w = _mm512_set1_ps(s.weights[r * kBlockKeys + key]);
          sum[r][2 * i] = _mm512_fmadd_ps(w, a, sum[r][2 * i]);
          sum[r][2 * i + 1] = _mm512_fmadd_ps(w, b, sum[r][2 * i + 1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < W / 16; i++) _mm512_store_ps(s.out + (row + r) * dim_v + d + 16 * i, sum[r][i]);
  }

  // Partial results of all rows of a head over the keys of a task: [rows][dim_v + 2] floats.
  HAL_INLINE void run(const Call& call, const Task& task, char* scratch, float* partial) {
    State s;
    const int64_t dim = call.dim_qk, dim_v = call.dim_v, rows = call.rows;
    s.query = (float*)scratch;
    s.out = s.query + HAL_DECODE_ROWS * dim;
    s.weights = s.out + HAL_DECODE_ROWS * dim_v;
    // The scores are made in log2 units at once; under a softcap they keep the user's unit until it is applied.
    const __m512 unit = _mm512_set1_ps(call.scale * kLog2e);
    int64_t least_end = call.len_k, most_first = 0, begin = call.len_k, stop = 0;
    for (int64_t r = 0; r < rows; r++) {
      const T* q = query_row<T>(call, task.batch, task.head, r);
      for (int64_t d = 0; d < dim; d += 32) {
        __m512 a, b;
        load32(q + d, a, b);
        _mm512_store_ps(s.query + r * dim + d, _mm512_mul_ps(a, unit));
        _mm512_store_ps(s.query + r * dim + d + 16, _mm512_mul_ps(b, unit));
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
      if (call.mask && !mask_differs(call) && !visible(call, task, s, 0, key, keys) && rows == call.group) continue;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) block<4>(call, task, s, r, key, keys, hidden, r == 0);
      if (r + 2 <= rows) {
        block<2>(call, task, s, r, key, keys, hidden, r == 0);
        r += 2;
      }
      if (r < rows) block<1>(call, task, s, r, key, keys, hidden, r == 0);
    }
    for (int64_t r = 0; r < rows; r++) {
      float* o = partial + r * partial_floats(call);
      const float* from = s.out + r * dim_v;
      for (int64_t d = 0; d < dim_v; d += 32)
        for (int i = 0; i < 16; i++) {  // bfloat16: even and odd channels back into order
          o[d + (IsPaired<T>::value ? 2 * i : i)] = from[d + i];
          o[d + (IsPaired<T>::value ? 2 * i + 1 : 16 + i)] = from[d + 16 + i];
        }
      o[dim_v] = s.maximum[r];
      o[dim_v + 1] = s.sum[r];
    }
  }
};

template <class T>
void decode(const Call& call, const Task& task, char* scratch, float* partial) {
  Decode<T>::run(call, task, scratch, partial);
}

}  // namespace
}  // namespace hal
