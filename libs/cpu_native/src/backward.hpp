// Gradients of query, key and value from a given (out, lse): the scores are made again, block by block, in float32.
//
// Blocks hold rows as lanes, as in prefill.hpp, whose bands, masks and plans these are: S^T = K Q^T and dP^T = V dO^T
// [keys, rows], P = 2^(S - lse), dS = P (dP - delta), dQ^T += K^T dS^T [dim, rows]. dK += dS^T Q and dV += P^T dO [keys,
// dim] take rows as steps. A task owns some keys of one key head and works through all rows that read them, in order, so
// that equal calls give equal bits for any number of threads. Source: Dao 2023 (FlashAttention-2), algorithm 2.
#pragma once

#include "prefill.hpp"

namespace hal {
namespace {

// C[M][2 N lanes] += sum over the rows of some blocks of A[row][m] B[row][lanes]. `a`: [blocks][keys][rows of a block].
template <int N, int M>
HAL_INLINE void add_rows(const float* a, int64_t block_stride, const float* b, int64_t b_stride, int64_t blocks,
                         const uint8_t* used, float* c, int64_t c_stride) {
  typedef typename Vec<N>::F F;
  constexpr int kRows = 2 * N;
  F x[M], y[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) x[m] = load<N>(c + m * c_stride), y[m] = load<N>(c + m * c_stride + N);
  for (int64_t n = 0; n < blocks; n++) {
    if (!used[n]) continue;
    const float *p = a + n * block_stride, *q = b + n * kRows * b_stride;
#pragma GCC unroll 2
    for (int k = 0; k < kRows; k++) {
      const F b0 = load<N>(q + k * b_stride), b1 = load<N>(q + k * b_stride + N);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const float s = p[m * kRows + k];
        x[m] = b0 * s + x[m];
        y[m] = b1 * s + y[m];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) store<N>(c + m * c_stride, x[m]), store<N>(c + m * c_stride + N, y[m]);
}

template <int N, class T>
struct Backward {
  typedef FloatProduct<N, T> P;
  typedef Prefill<N, T, P> Forward;
  typedef typename Forward::Block Block;
  typedef typename Vec<N>::F F;
  static constexpr int kRows = Forward::kRows, kM = Forward::kM;
  static constexpr int kMostBlocks = kBackwardRows / kRows;

  // What the rows of a chunk keep beside their blocks: query and gradient of the output as rows, and transposed.
  struct Chunk {
    Block blocks[kMostBlocks];
    float* grad_out[kMostBlocks];  // [dim_v][rows]
    float *query_rows, *grad_rows;  // [rows][padded dim]
    int64_t count, first, end;
  };

  template <class U>
  HAL_INLINE U* row_of(const Call& call, U* data, const int64_t* strides, const Task& task, int64_t row) {
    return data + task.batch * strides[0] + (task.head * call.group + row % call.group) * strides[1] + row / call.group * strides[2];
  }

  HAL_INLINE void begin(const BackwardCall& b, const Task& task, Chunk& chunk, int64_t dim_room, int64_t dim_v_room, float* room) {
    const Call& call = b.call;
    chunk.count = (task.rows + kRows - 1) / kRows;
    chunk.first = call.len_k, chunk.end = 0;
    for (int64_t n = 0; n < chunk.count; n++) {
      Block& block = chunk.blocks[n];
      const int64_t row = task.row + n * kRows;
      Forward::begin(call, task, row, block, room);
      memset(block.out, 0, call.dim_qk * kRows * 4);
      chunk.first = least(chunk.first, block.least_first);
      chunk.end = most(chunk.end, block.most_end);
      for (int j = 0; j < kRows; j++) {
        const int64_t r = least(row + j, task.row + task.rows - 1), head = task.head * call.group + r % call.group;
        const int64_t place = (task.batch * call.heads_q + head) * call.len_q + r / call.group;
        float *q = chunk.query_rows + (n * kRows + j) * dim_room, *g = chunk.grad_rows + (n * kRows + j) * dim_v_room;
        widen(row_of(call, (const T*)call.query, call.query_strides, task, r), q, call.dim_qk);
        widen(row_of(call, (const T*)b.grad_out, b.grad_out_strides, task, r), g, call.dim_v);
        widen(row_of(call, (const T*)call.out, call.out_strides, task, r), room, call.dim_v);
        float delta = b.grad_lse ? -b.grad_lse[place] : 0.f;
        F sum = F{};
        int64_t d = 0;
        for (; d + N <= call.dim_v; d += N) sum += load<N>(room + d) * load<N>(g + d);
        for (int i = 0; i < N; i++) delta += sum[i];
        for (; d < call.dim_v; d++) delta += room[d] * g[d];
        for (d = 0; d < call.dim_v; d++) chunk.grad_out[n][d * kRows + j] = g[d];
        for (d = call.dim_qk; d < dim_room; d++) q[d] = 0;
        for (d = call.dim_v; d < dim_v_room; d++) g[d] = 0;
        const float lse = call.lse[place];
        // Rows without keys, and those that fill the last block up, have weights of 0.
        block.maximum[j] = lse == -kInfinity || row + j >= task.row + task.rows ? kInfinity : most(kLowest, lse * kLog2e);
        block.sum[j] = delta;
      }
    }
  }

  // Scores [filled][rows] to weights, and products dP to gradients of the scores; `slope` under a softcap: of the cap.
  HAL_INLINE void differentiate(const Call& call, const Block& block, float* scores, float* grads, const float* slope,
                                int64_t filled, bool hidden) {
    const float unit = is_additive(call) ? 1.f : Forward::score_unit(call);
    for (int h = 0; h < kRows; h += N) {
      const F lse = load<N>(block.maximum + h), delta = load<N>(block.sum + h);
      for (int64_t i = 0; i < filled; i++) {
        float *s = scores + i * kRows + h, *g = grads + i * kRows + h;
        const F x = load<N>(s);
        F weight = exp2v(x * unit - lse);
        F grad = weight * (load<N>(g) - delta);
        if (slope) grad *= load<N>(slope + i * kRows + h);
        if (hidden) {
          weight = x == -kInfinity ? F{} : weight;
          grad = x == -kInfinity ? F{} : grad;
        }
        store<N>(s, weight);
        store<N>(g, grad);
      }
    }
  }

  HAL_INLINE void run(const BackwardCall& b, const Task& whole, char* scratch, float* partial) {
    const Call& call = b.call;
    auto take = [&](int64_t floats) __attribute__((always_inline)) {
      float* p = (float*)scratch;
      scratch += (floats * 4 + 63) / 64 * 64;
      return p;
    };
    const int64_t dim = call.dim_qk, dim_v = call.dim_v, dim_room = round_up(dim, kRows), dim_v_room = round_up(dim_v, kRows);
    float* grad_key = take(whole.keys * dim_room);
    float* grad_value = take(whole.keys * dim_v_room);
    float* scores = take(kMostBlocks * kBlockKeys * kRows);
    float* grads = take(kMostBlocks * kBlockKeys * kRows);
    float* slope = take(kBlockKeys * kRows);
    float* key_room = take(kBlockKeys * dim);
    float* value_room = take(kBlockKeys * dim_v);
    float* room = take(most(dim, dim_v));
    Chunk chunk;
    for (Block& block : chunk.blocks) {
      block.query = take(dim * kRows);
      block.out = take(most(dim, dim_v) * kRows);
      block.maximum = take(kRows), block.sum = take(kRows), block.whole = take(kRows);
      block.first = (int32_t*)take(kRows), block.end = (int32_t*)take(kRows);
    }
    for (float*& each : chunk.grad_out) each = take(dim_v * kRows);
    chunk.query_rows = take(kBackwardRows * dim_room);
    chunk.grad_rows = take(kBackwardRows * dim_v_room);
    memset(grad_key, 0, whole.keys * dim_room * 4);
    memset(grad_value, 0, whole.keys * dim_v_room * 4);
    const T* k = (const T*)call.key + whole.batch * call.key_strides[0] + whole.head * call.key_strides[1];
    const T* v = (const T*)call.value + whole.batch * call.value_strides[0] + whole.head * call.value_strides[1];
    const float factor = call.softcap > 0 ? 2.f * kLog2e * call.scale / call.softcap : 0.f;
    Task task = whole;
    for (task.row = 0; task.row < call.rows; task.row += kBackwardRows) {
      task.rows = least<int64_t>(kBackwardRows, call.rows - task.row);
      begin(b, task, chunk, dim_room, dim_v_room, room);
      const int64_t end = least(chunk.end, whole.key + whole.keys);
      for (int64_t key = most(chunk.first / kBlockKeys * kBlockKeys, whole.key), stop; key < end; key = stop) {
        stop = least(least(key + kBlockKeys, call.len_k), whole.key + whole.keys);
        if (call.blocks) stop = least(stop, (key / call.block_k + 1) * call.block_k);
        const int64_t keys = stop - key, filled = round_up(keys, kKeyStep);
        uint8_t by[kMostBlocks];
        bool any = false;
        for (int64_t n = 0; n < chunk.count; n++) {
          const int64_t row = task.row + n * kRows;
          by[n] = Forward::seen(call, task, chunk.blocks[n], key, stop);
          const int64_t row_end = least(row + kRows, task.row + task.rows);
          if (by[n] && call.mask && !Forward::any_visible(call, task, row, row_end, key, keys)) by[n] = Forward::kNone;
          any |= by[n] != 0;
        }
        if (!any) continue;
        int64_t key_stride = call.key_strides[2], value_stride = call.value_strides[2];
        const float* kp = P::pack_keys(k + key * key_stride, key_stride, keys, dim, key_room);
        const float* vp = P::pack_values(v + key * value_stride, value_stride, keys, dim_v, value_room);
        for (int64_t n = 0; n < chunk.count; n++) {
          if (!by[n]) continue;
          Block& block = chunk.blocks[n];
          float *s = scores + n * kBlockKeys * kRows, *g = grads + n * kBlockKeys * kRows;
          const int64_t row = task.row + n * kRows;
          for (int64_t i = 0; i < filled; i += kM) {
            multiply<P, N, kM>(kp + i * key_stride, key_stride, 1, block.query, dim, s + i * kRows, false);
            multiply<P, N, kM>(vp + i * value_stride, value_stride, 1, chunk.grad_out[n], dim_v, g + i * kRows, false);
          }
          if (call.softcap > 0)
            for (int64_t i = 0; i < filled * kRows; i += N) {
              const F capped = softcapped<N>(load<N>(s + i), factor, call.softcap), share = capped * (1.f / call.softcap);
              store<N>(s + i, capped);
              store<N>(slope + i, 1.f - share * share);
            }
          if (is_additive(call)) add_mask<kRows, T>(call, task, row, key, keys, filled, Forward::score_unit(call), s);
          const bool cut = block.least_end < key + filled || block.most_first > key || keys < filled;
          const bool hidden = call.mask || cut || by[n] == Forward::kSome;
          if (cut || (call.mask && !is_additive(call))) Forward::hide(call, task, row, block, key, keys, filled, s);
          if (by[n] == Forward::kSome) Forward::hide_planned(call, task, row, key, filled, s);
          differentiate(call, block, s, g, call.softcap > 0 ? slope : nullptr, filled, hidden);
          for (int64_t d = 0; d < dim; d += kM) multiply<P, N, kM>(kp + d, 1, key_stride, g, filled, block.out + d * kRows, true);
        }
        // Keys that fill a block of products up are left out of the sums.
        for (int64_t i = 0; i < keys; i += kM) {
          const int64_t place = key - whole.key + i, rows = least<int64_t>(kM, keys - i);
          add_keys(scores + i * kRows, chunk.grad_rows, dim_v_room, chunk.count, by, grad_value + place * dim_v_room, rows);
          add_keys(grads + i * kRows, chunk.query_rows, dim_room, chunk.count, by, grad_key + place * dim_room, rows);
        }
      }
      for (int64_t r = 0; r < task.rows; r++) {
        const Block& block = chunk.blocks[r / kRows];
        for (int64_t d = 0; d < dim; d++) room[d] = block.out[d * kRows + r % kRows];
        if (partial) memcpy(partial + (task.row + r) * dim, room, dim * 4);
        else narrow(room, call.scale, row_of(call, (T*)b.grad_query, b.grad_query_strides, task, task.row + r), dim);
      }
    }
    T* gk = (T*)b.grad_key + whole.batch * b.grad_key_strides[0] + whole.head * b.grad_key_strides[1];
    T* gv = (T*)b.grad_value + whole.batch * b.grad_value_strides[0] + whole.head * b.grad_value_strides[1];
    for (int64_t i = 0; i < whole.keys; i++) {
      narrow(grad_key + i * dim_room, call.scale, gk + (whole.key + i) * b.grad_key_strides[2], dim);
      narrow(grad_value + i * dim_v_room, 1.f, gv + (whole.key + i) * b.grad_value_strides[2], dim_v);
    }
  }

  HAL_INLINE void add_keys(const float* a, const float* rows, int64_t width, int64_t blocks, const uint8_t* used, float* sums,
                           int64_t keys) {
    constexpr int64_t kStride = kBlockKeys * kRows;
    for (int64_t d = 0; d < width; d += kRows)
      if (keys == kM) add_rows<N, kM>(a, kStride, rows + d, width, blocks, used, sums + d, width);
      else
        for (int64_t i = 0; i < keys; i++)
          add_rows<N, 1>(a + i * kRows, kStride, rows + d, width, blocks, used, sums + i * width + d, width);
  }

  // Sums the partial gradients of a row over the splits of the keys and writes it.
  HAL_INLINE void finish(const BackwardCall& b, const Task& task, float* parts, int64_t splits, int64_t stride) {
    for (int64_t split = 1; split < splits; split++)
      for (int64_t d = 0; d < b.call.dim_qk; d++) parts[d] += parts[split * stride + d];
    narrow(parts, b.call.scale, row_of(b.call, (T*)b.grad_query, b.grad_query_strides, task, task.row), b.call.dim_qk);
  }
};

template <int N, class T>
void backward(const BackwardCall& call, const Task& task, char* scratch, float* partial) {
  Backward<N, T>::run(call, task, scratch, partial);
}
template <int N, class T>
void finish_backward(const BackwardCall& call, const Task& task, float* parts, int64_t splits, int64_t stride) {
  Backward<N, T>::finish(call, task, parts, splits, stride);
}

}  // namespace
}  // namespace hal
