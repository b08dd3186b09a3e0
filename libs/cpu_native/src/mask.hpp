// Masks of both kinds: bytes that hide keys, and numbers that are added to the scores.
//
// Numbers are taken to log2 units, in which the scores are by then. -inf hides a key. Every finite number stays finite, so
// a row whose keys all have the lowest number of its dtype averages its values as it does in other implementations;
// numbers below -2.3e38, which have no log2 unit, count as one.
#pragma once

#include "vectors.hpp"

namespace hal {
namespace {

constexpr float kLowest = -3.402823466e38f;

HAL_INLINE bool is_additive(const Call& call) { return call.mask && call.mask_kind != HAL_MASK_BYTES; }

HAL_INLINE bool hides(uint8_t m) { return m == 0; }
HAL_INLINE bool hides(float m) { return m == -kInfinity; }
HAL_INLINE bool hides(bf16 m) { return m.bits == 0xff80; }
HAL_INLINE bool hides(f16 m) { return m.bits == 0xfc00; }

// f(the mask of a row from `key` on, typed).
template <class T, class F>
HAL_INLINE auto with_mask(const Call& call, int64_t batch, int64_t head_kv, int64_t row, int64_t key, F f) {
  const int64_t place = batch * call.mask_strides[0] + (head_kv * call.group + row % call.group) * call.mask_strides[1] +
                        row / call.group * call.mask_strides[2] + key * call.mask_strides[3];
  if (call.mask_kind == HAL_MASK_BYTES) return f((const uint8_t*)call.mask + place);
  if (call.mask_kind == HAL_MASK_FLOAT32) return f((const float*)call.mask + place);
  return f((const T*)call.mask + place);
}

// Whether the rows of a key head see a mask that differs between them.
HAL_INLINE bool mask_differs(const Call& call) {
  return (call.mask_strides[1] && call.group > 1) || (call.mask_strides[2] && call.len_q > 1);
}

// Which of up to 64 keys, from `low` to `high`, the mask of a row lets through, a bit each.
template <class M>
HAL_INLINE uint64_t let_through(const M* m, int64_t step, int64_t low, int64_t high) {
  uint64_t bits = 0;
  for (int64_t i = low; i < high; i++) bits |= uint64_t(!hides(m[i * step])) << i;
  return bits;
}
template <class M>
HAL_INLINE bool lets_any_through(const M* m, int64_t step, int64_t keys) {
  for (int64_t i = 0; i < keys; i++)
    if (!hides(m[i * step])) return true;
  return false;
}

// The numbers of a row for `keys` keys in log2 units, -inf from there to `filled`, a multiple of 8.
HAL_INLINE void added_row(const uint8_t*, int64_t, int64_t, int64_t, float*) {}
template <class M>
HAL_INLINE void added_row(const M* m, int64_t step, int64_t keys, int64_t filled, float* out) {
  int64_t i = 0;
  if (step == 1)
    for (; i + 8 <= keys; i += 8) widen(m + i, out + i, 8);
  for (; i < keys; i++) {
    const M one[8] = {m[i * step]};
    float wide[8];
    widen(one, wide, 8);
    out[i] = wide[0];
  }
  for (; i < filled; i++) out[i] = -kInfinity;
  const __m256 hidden = _mm256_set1_ps(-kInfinity);
  for (i = 0; i < filled; i += 8) {
    const __m256 x = _mm256_loadu_ps(out + i);
    const __m256 y = _mm256_max_ps(_mm256_set1_ps(kLowest), _mm256_mul_ps(x, _mm256_set1_ps(kLog2e)));  // NaN passes
    _mm256_storeu_ps(out + i, _mm256_blendv_ps(y, hidden, _mm256_cmp_ps(x, hidden, _CMP_EQ_OQ)));
  }
}

// a[8][8] of rows `stride` apart, transposed.
HAL_INLINE void transpose8(const float* a, int64_t stride, __m256 out[8]) {
  __m256 x[8], y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256 p = _mm256_loadu_ps(a + 2 * i * stride), q = _mm256_loadu_ps(a + (2 * i + 1) * stride);
    x[2 * i] = _mm256_unpacklo_ps(p, q);
    x[2 * i + 1] = _mm256_unpackhi_ps(p, q);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      y[4 * i + 2 * j] = _mm256_shuffle_ps(x[4 * i + j], x[4 * i + j + 2], 0x44);
      y[4 * i + 2 * j + 1] = _mm256_shuffle_ps(x[4 * i + j], x[4 * i + j + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    out[i] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(y[i], y[i + 4], 0x31);
  }
}

// score * unit + number, -inf where the number is: a hidden key's score may be NaN.
HAL_INLINE void add8(float* score, __m256 unit, __m256 number) {
  const __m256 hidden = _mm256_set1_ps(-kInfinity);
  const __m256 sum = _mm256_fmadd_ps(_mm256_loadu_ps(score), unit, number);
  _mm256_storeu_ps(score, _mm256_blendv_ps(sum, hidden, _mm256_cmp_ps(number, hidden, _CMP_EQ_OQ)));
}

// Adds the mask to scores [filled][lanes], whose lanes are the rows from `row` on; rows beyond the task repeat its last one.
template <int kRows, class T>
HAL_INLINE void add_mask(const Call& call, const Task& task, int64_t row, int64_t key, int64_t keys, int64_t filled, float unit,
                         float* scores) {
  alignas(64) float room[8 * kBlockKeys];
  const __m256 factor = _mm256_set1_ps(unit);
  const int64_t step = call.mask_strides[3];
  auto read = [&](int64_t r, float* out) __attribute__((always_inline)) {
    with_mask<T>(call, task.batch, task.head, r, key,
                 [&](auto* m) __attribute__((always_inline)) { added_row(m, step, keys, filled, out); });
  };
  if (!mask_differs(call)) {
    read(row, room);
    for (int64_t i = 0; i < filled; i++)
      for (int h = 0; h < kRows; h += 8) add8(scores + i * kRows + h, factor, _mm256_set1_ps(room[i]));
    return;
  }
  for (int h = 0; h < kRows; h += 8) {
    for (int j = 0; j < 8; j++) read(least(row + h + j, task.row + task.rows - 1), room + j * kBlockKeys);
    for (int64_t i = 0; i < filled; i += 8) {
      __m256 number[8];
      transpose8(room + i, kBlockKeys, number);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++) add8(scores + (i + k) * kRows + h, factor, number[k]);
    }
  }
}

}  // namespace
}  // namespace hal
