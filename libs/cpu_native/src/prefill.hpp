// Attention of many rows: flash tiles over blocks of rows and keys, in float32 fused multiply-adds or bfloat16 products.
//
// A block holds rows as lanes: scores are S^T = K Q^T [keys, rows], the output O^T += V^T P^T [dim_v, rows]. Keys are
// read by broadcasts as they lie, the softmax needs no operation across lanes, and every row keeps its own maximum, so
// a NaN stays in its row. Source of the online softmax: Milakov & Gimelshein 2018, equation 3.
#pragma once

#include "mask.hpp"

namespace hal {
namespace {

// Products in float32. Operands of 16 bits are widened once per block of keys and task.
template <int N, class T>
struct FloatProduct {
  typedef float Operand;
  static constexpr int kPair = 1;  // elements of the sum that one step takes
  typedef typename Vec<N>::F F;

  HAL_INLINE void pack_query(const T* q, float* out, int64_t stride, int64_t dim, float* row) {
    widen(q, row, dim);
    for (int64_t d = 0; d < dim; d++) out[d * stride] = row[d];
  }
  // Keys and values of a block as they lie, or widened and filled up with zeros to whole steps.
  HAL_INLINE const float* pack_keys(const T* k, int64_t& stride, int64_t keys, int64_t dim, float* room) {
    if (sizeof(T) == 4 && keys % kKeyStep == 0) return (const float*)k;
    for (int64_t i = 0; i < round_up(keys, kKeyStep); i++)
      if (i < keys) widen(k + i * stride, room + i * dim, dim); else memset(room + i * dim, 0, dim * 4);
    stride = dim;
    return room;
  }
  HAL_INLINE const float* pack_values(const T* v, int64_t& stride, int64_t keys, int64_t dim, float* room) {
    return pack_keys(v, stride, keys, dim, room);
  }
  HAL_INLINE F step(float a, F b, F sum) { return b * a + sum; }
  // Weights stay where the scores were.
  HAL_INLINE const float* weights(const float* scores, float*) { return scores; }
};

// C[M rows][2 N lanes] = or += A[M rows, steps] times B[steps][2 N lanes]. A block's sum is added as one number: that
// rounds less than one long chain over all keys.
template <class P, int N, int M>
HAL_INLINE void multiply(const typename P::Operand* a, int64_t row_stride, int64_t step_stride, const typename P::Operand* b,
                         int64_t steps, float* c, bool add) {
  typedef typename Vec<N>::F F;
  F x[M], y[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) x[m] = y[m] = F{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; k++) {
    const F b0 = *(const F*)(b + k * 2 * N), b1 = *(const F*)(b + k * 2 * N + N);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const auto s = a[m * row_stride + k * step_stride];
      x[m] = P::step(s, b0, x[m]);
      y[m] = P::step(s, b1, y[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    float* o = c + m * 2 * N;
    store<N>(o, add ? load<N>(o) + x[m] : x[m]);
    store<N>(o + N, add ? load<N>(o + N) + y[m] : y[m]);
  }
}

template <int N, class T, class P>
struct Prefill {
  typedef typename Vec<N>::F F;
  typedef typename Vec<N>::I I;
  typedef typename P::Operand Operand;
  static constexpr int kRows = 2 * N, kM = N == 16 ? 8 : 4;

  // Rows that are worked on together. `sum` divides the output and is of the weights as they were multiplied; `whole`
  // is of the unrounded weights and makes the log-sum-exp.
  struct Block {
    Operand* query;  // [dim_qk / pair][rows]
    float *out, *maximum, *sum, *whole;
    int32_t *first, *end;
    int64_t least_first, most_first, least_end, most_end;
    int64_t first_query_block, last_query_block;  // of a block plan
  };

  static constexpr bool kRounds = P::kPair == 2;

  HAL_INLINE void begin(const Call& call, const Task& task, int64_t row, Block& block, float* room) {
    block.least_first = block.least_end = int64_t(1) << 60;
    block.most_first = block.most_end = 0;
    for (int j = 0; j < kRows; j++) {
      const int64_t r = least(row + j, task.row + task.rows - 1);
      P::pack_query(query_row<T>(call, task.batch, task.head, r), block.query + j, kRows, call.dim_qk, room);
      const int64_t end = end_key(call, r), first = least(first_key(call, r), end);
      block.first[j] = (int32_t)first;
      block.end[j] = (int32_t)end;
      if (first < end) {
        block.least_first = least(block.least_first, first);
        block.most_end = most(block.most_end, end);
      }
      block.most_first = most(block.most_first, first);
      block.least_end = least(block.least_end, end);
      block.maximum[j] = -kInfinity;
      block.sum[j] = block.whole[j] = 0;
    }
    memset(block.out, 0, call.dim_v * kRows * 4);
    if (!call.blocks) return;
    block.first_query_block = row / call.group / call.block_q;
    block.last_query_block = (least(row + kRows, task.row + task.rows) - 1) / call.group / call.block_q;
  }

  // The bytes of a plan for the keys' block: one for each query block, call.block_strides[2] apart. All heads of a group
  // have the same, see `Call::sharing`.
  HAL_INLINE const uint8_t* planned(const Call& call, const Task& task, int64_t key) {
    return call.blocks + task.batch * call.block_strides[0] + task.head * call.block_strides[1] + key / call.block_k * call.block_strides[3];
  }

  enum Seen : uint8_t { kNone, kSome, kAll };

  // How many of a block's rows may read keys from `key` to `stop`, by band and plan; rows of the band are not counted.
  HAL_INLINE Seen seen(const Call& call, const Task& task, const Block& block, int64_t key, int64_t stop) {
    if (block.most_end <= key || block.least_first >= stop) return kNone;
    if (!call.blocks) return kAll;
    const uint8_t* visible = planned(call, task, key);
    bool any = false, every = true;
    for (int64_t n = block.first_query_block; n <= block.last_query_block; n++) {
      const bool is = visible[n * call.block_strides[2]] != 0;
      any |= is;
      every &= is;
    }
    return every ? kAll : any ? kSome : kNone;
  }

  // Scores of rows whose query block may not read the keys become -inf.
  HAL_INLINE void hide_planned(const Call& call, const Task& task, int64_t row, int64_t key, int64_t filled, float* scores) {
    const uint8_t* visible = planned(call, task, key);
    for (int j = 0; j < kRows; j++) {
      const int64_t r = least(row + j, task.row + task.rows - 1);
      if (visible[r / call.group / call.block_q * call.block_strides[2]]) continue;
      for (int64_t i = 0; i < filled; i++) scores[i * kRows + j] = -kInfinity;
    }
  }

  HAL_INLINE const uint8_t* bytes(const Call& call, const Task& task, int64_t row, int64_t key) {
    return (const uint8_t*)call.mask + task.batch * call.mask_strides[0] +
           (task.head * call.group + row % call.group) * call.mask_strides[1] + row / call.group * call.mask_strides[2] + key * call.mask_strides[3];
  }

  // Log2 units of a score as the product, or the softcap, leaves it.
  HAL_INLINE float score_unit(const Call& call) { return call.softcap > 0 ? kLog2e : call.scale * kLog2e; }

  // Scores that a row may not see become -inf: by band, by the end of the keys, and by the mask.
  HAL_INLINE void hide(const Call& call, const Task& task, int64_t row, const Block& block, int64_t key, int64_t keys, int64_t filled, float* scores) {
    for (int h = 0; h < kRows; h += N) {
      const I first = *(const I*)(block.first + h) - (int)key, there = I{} + (int)keys;
      I end = *(const I*)(block.end + h) - (int)key;
      end = end < there ? end : there;
      for (int i = 0; i < (int)filled; i++) {
        float* s = scores + i * kRows + h;
        store<N>(s, ((first <= i) & (end > i)) ? load<N>(s) : all<N>(-kInfinity));
      }
    }
    if (!call.mask || is_additive(call)) return;
    const int64_t step = call.mask_strides[3];
    if (!mask_differs(call)) {
      const uint8_t* m = bytes(call, task, row, key);
      for (int64_t i = 0; i < keys; i++)
        if (!m[i * step])
          for (int h = 0; h < kRows; h += N) store<N>(scores + i * kRows + h, all<N>(-kInfinity));
      return;
    }
    for (int j = 0; j < kRows; j++) {
      const uint8_t* m = bytes(call, task, least(row + j, task.row + task.rows - 1), key);
      for (int64_t i = 0; i < keys; i++) scores[i * kRows + j] = m[i * step] ? scores[i * kRows + j] : -kInfinity;
    }
  }

  // Whether any of the rows from `row` to `end` may see any of these keys by the mask.
  HAL_INLINE bool any_visible(const Call& call, const Task& task, int64_t row, int64_t end, int64_t key, int64_t keys) {
    if (!mask_differs(call)) end = row + 1;
    bool any = false;
    for (int64_t r = row; r < end && !any; r++)
      any = with_mask<T>(call, task.batch, task.head, r, key,
                         [&](auto* m) __attribute__((always_inline)) { return lets_any_through(m, call.mask_strides[3], keys); });
    return any;
  }

  // Scores to weights, with the running maximum. `hidden`: some scores are -inf and their weights are 0.
  HAL_INLINE void softmax(const Call& call, Block& block, float* scores, Operand* weights, int64_t filled, bool hidden) {
    const float unit = is_additive(call) ? 1.f : score_unit(call);
    for (int h = 0; h < kRows; h += N) {
      F top = all<N>(-kInfinity), top2 = top;
      for (int64_t i = 0; i < filled; i += 2) {
        const F x = load<N>(scores + i * kRows + h), y = load<N>(scores + (i + 1) * kRows + h);
        top = x > top ? x : top;
        top2 = y > top2 ? y : top2;
      }
      top = (top > top2 ? top : top2) * unit;
      F maximum = load<N>(block.maximum + h);
      const I grown = top > maximum + 8.f;  // less growth than 2^8 needs no other scale
      bool any = false;
      for (int j = 0; j < N; j++) any |= grown[j] != 0;
      if (any) {
        const F raised = grown ? top : maximum;
        const F factor = grown ? exp2v(maximum - raised) : all<N>(1.f);
        store<N>(block.maximum + h, raised);
        store<N>(block.sum + h, load<N>(block.sum + h) * factor);
        if (kRounds) store<N>(block.whole + h, load<N>(block.whole + h) * factor);
        maximum = raised;
        for (int64_t d = 0; d < call.dim_v; d++) {
          float* o = block.out + d * kRows + h;
          store<N>(o, load<N>(o) * factor);
        }
      }
      F sum = F{}, whole = F{};
      for (int64_t i = 0; i < filled; i += P::kPair) {
        F weight[2];
#pragma GCC unroll 2
        for (int p = 0; p < P::kPair; p++) {
          const F x = load<N>(scores + (i + p) * kRows + h);
          weight[p] = exp2v(x * unit - maximum);
          if (hidden) weight[p] = x == -kInfinity ? F{} : weight[p];
        }
        if constexpr (kRounds) {
          whole += weight[0] + weight[1];
          P::round(weight[0], weight[1], weights + i / 2 * kRows + h, sum);
        } else {
          sum += weight[0];
          store<N>(scores + i * kRows + h, weight[0]);
        }
      }
      store<N>(block.sum + h, load<N>(block.sum + h) + sum);
      if (kRounds) store<N>(block.whole + h, load<N>(block.whole + h) + whole);
    }
  }

  HAL_INLINE void finish(const Call& call, const Task& task, int64_t row, const Block& block, float* room) {
    const int64_t rows = least<int64_t>(kRows, task.row + task.rows - row);
    for (int64_t j = 0; j < rows; j++) {
      for (int64_t d = 0; d < call.dim_v; d++) room[d] = block.out[d * kRows + j];
      finish_row<T>(call, task.batch, task.head, row + j, room, {block.maximum[j], block.sum[j]});
      if (kRounds && call.lse && block.sum[j] != 0.f) {
        const int64_t head = task.head * call.group + (row + j) % call.group;
        call.lse[(task.batch * call.heads_q + head) * call.len_q + (row + j) / call.group] =
            natural(block.maximum[j], block.whole[j]);
      }
    }
  }

  HAL_INLINE void run(const Call& call, const Task& task, char* scratch) {
    auto take = [&](int64_t bytes) __attribute__((always_inline)) {
      char* p = scratch;
      scratch += (bytes + 63) / 64 * 64;
      return p;
    };
    const int64_t dim = call.dim_qk, dim_v = call.dim_v;
    float* scores = (float*)take(kBlockKeys * kRows * 4);
    Operand* weights = (Operand*)take(kBlockKeys * kRows * 4);
    Operand* key_room = (Operand*)take(kBlockKeys * dim * 4);
    Operand* value_room = (Operand*)take(kBlockKeys * dim_v * 4);
    float* row_room = (float*)take((dim + dim_v) * 4);
    Block blocks[kMostTaskRows / kRows];
    const int64_t count = (task.rows + kRows - 1) / kRows;
    int64_t first = call.len_k, end = 0;
    for (int64_t n = 0; n < count; n++) {
      Block& block = blocks[n];
      block.query = (Operand*)take(dim * kRows * 4);
      block.out = (float*)take(dim_v * kRows * 4);
      block.maximum = (float*)take(kRows * 4);
      block.sum = (float*)take(kRows * 4);
      block.whole = (float*)take(kRows * 4);
      block.first = (int32_t*)take(kRows * 4);
      block.end = (int32_t*)take(kRows * 4);
      begin(call, task, task.row + n * kRows, block, row_room);
      first = least(first, block.least_first);
      end = most(end, block.most_end);
    }
    const int64_t key_head = task.head / call.sharing;
    const T* k = (const T*)call.key + task.batch * call.key_strides[0] + key_head * call.key_strides[1];
    const T* v = (const T*)call.value + task.batch * call.value_strides[0] + key_head * call.value_strides[1];
    const float factor = call.softcap > 0 ? 2.f * kLog2e * call.scale / call.softcap : 0.f;
    for (int64_t key = first, stop; key < end; key = stop) {
      stop = least(key + kBlockKeys, call.len_k);
      if (call.blocks) stop = least(stop, (key / call.block_k + 1) * call.block_k);
      const int64_t keys = stop - key, filled = round_up(keys, kKeyStep);
      Seen by[kMostTaskRows / kRows];
      bool any = false;
      for (int64_t n = 0; n < count; n++) {
        by[n] = seen(call, task, blocks[n], key, stop);
        const int64_t row = task.row + n * kRows;
        const int64_t row_end = least(row + kRows, task.row + task.rows);
        if (by[n] != kNone && call.mask && !any_visible(call, task, row, row_end, key, keys)) by[n] = kNone;
        any |= by[n] != kNone;
      }
      if (!any) continue;
      int64_t key_stride = call.key_strides[2], value_stride = call.value_strides[2];
      const Operand* kp = P::pack_keys(k + key * key_stride, key_stride, keys, dim, key_room);
      const Operand* vp = P::pack_values(v + key * value_stride, value_stride, keys, dim_v, value_room);
      for (int64_t n = 0; n < count; n++) {
        Block& block = blocks[n];
        if (by[n] == kNone) continue;
        for (int64_t i = 0; i < filled; i += kM)
          multiply<P, N, kM>(kp + i * key_stride, key_stride, 1, block.query, dim / P::kPair, scores + i * kRows, false);
        if (call.softcap > 0)
          for (int64_t i = 0; i < filled * kRows; i += N)
            store<N>(scores + i, softcapped<N>(load<N>(scores + i), factor, call.softcap));
        if (is_additive(call)) add_mask<kRows, T>(call, task, task.row + n * kRows, key, keys, filled, score_unit(call), scores);
        const bool cut = block.least_end < key + filled || block.most_first > key || keys < filled;
        const bool hidden = call.mask || cut || by[n] == kSome;
        if (cut || (call.mask && !is_additive(call))) hide(call, task, task.row + n * kRows, block, key, keys, filled, scores);
        if (by[n] == kSome) hide_planned(call, task, task.row + n * kRows, key, filled, scores);
        softmax(call, block, scores, weights, filled, hidden);
        const Operand* wp = P::weights((const Operand*)scores, weights);
        for (int64_t d = 0; d < dim_v; d += kM)
          multiply<P, N, kM>(vp + d, 1, value_stride, wp, filled / P::kPair, block.out + d * kRows, true);
      }
    }
    for (int64_t n = 0; n < count; n++) finish(call, task, task.row + n * kRows, blocks[n], row_room);
  }
};

template <int N, class T, class P>
void prefill(const Call& call, const Task& task, char* scratch) {
  Prefill<N, T, P>::run(call, task, scratch);
}

}  // namespace
}  // namespace hal
