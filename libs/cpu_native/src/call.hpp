// What the kernels share: a call with its derived sizes, and the table of one instruction set's kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hal_cpu_native.h"

namespace hal {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Rows of one key head: row r is query r / group of head r % group, so that the heads of a group share every key read.
struct Call : hal_attention {
  int64_t group, rows;
  int64_t sharing;  // heads of `heads_kv` that read the same key head: above 1 where a plan parts the heads of a group
};

struct BackwardCall : hal_backward {
  Call call;
};

// A share of the work: some rows of one key head (prefill), or some keys for all its rows (decode).
struct Task {
  int64_t batch, head, row, rows, key, keys;
};

// The state of one row after some of the keys: maximum in log2 units, sum of weights, and the output before division.
struct Partial {
  float maximum, sum;
};

using PrefillKernel = void (*)(const Call&, const Task&, char* scratch);
using BackwardKernel = void (*)(const BackwardCall&, const Task&, char* scratch, float* partial);
using DecodeKernel = void (*)(const Call&, const Task&, char* scratch, float* partial);

// Kernels of one instruction set, by hal_dtype.
struct KernelTable {
  int block_rows;                       // rows that one block of a prefill task holds
  PrefillKernel prefill[3];
  DecodeKernel decode[3];               // null: the instruction set has none
  BackwardKernel backward[3];
  void (*finish_backward[3])(const BackwardCall&, const Task&, float* parts, int64_t splits, int64_t stride);
  void (*finish)(const Call&, int64_t batch, int64_t head, int64_t row, const float* out, Partial state);
  uint64_t (*read)(const char* memory, int64_t bytes);
};

const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();

// Most rows of a prefill task, and keys that are worked on at once.
constexpr int64_t kMostTaskRows = 256;
constexpr int64_t kBlockKeys = 64;
// The last keys are filled up to a multiple of this.
constexpr int64_t kKeyStep = 8;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of scratch of one thread: blocks of `block_rows` rows (query, output, state), scores, packed keys and values.
inline int64_t prefill_scratch(const Call& call, int64_t block_rows, int64_t task_rows) {
  const int64_t blocks = (task_rows + block_rows - 1) / block_rows;
  const int64_t block = block_rows * (call.dim_qk + call.dim_v + 5) * 4;
  const int64_t keys = kBlockKeys * (call.dim_qk + call.dim_v + 2 * block_rows) * 4;
  return round_up(blocks * round_up(block, 64) + keys + (call.dim_qk + call.dim_v) * 4 + 256, 4096);
}

// Rows of a backward task that are worked on together.
constexpr int64_t kBackwardRows = 128;

// Bytes of scratch of one thread of a backward pass whose tasks have up to `keys` keys, see backward.hpp.
inline int64_t backward_scratch(const Call& call, int64_t block_rows, int64_t keys) {
  const int64_t dim = round_up(call.dim_qk, block_rows), dim_v = round_up(call.dim_v, block_rows);
  const int64_t rows = kBackwardRows * (2 * dim + 2 * dim_v + (dim > dim_v ? dim : dim_v) + 5 + 2 * kBlockKeys);
  const int64_t blocks = kBackwardRows / block_rows;
  return round_up((keys * (dim + dim_v) + rows + kBlockKeys * (block_rows + dim + dim_v) + dim + dim_v) * 4 + (blocks * 8 + 16) * 64, 4096);
}

// Floats of one row's partial result: output, maximum, sum.
inline int64_t partial_floats(const Call& call) { return call.dim_v + 2; }

inline int64_t decode_scratch(const Call& call) {
  return round_up((HAL_DECODE_ROWS * (call.dim_qk + call.dim_v + 8) + 4 * kBlockKeys) * 4 + 256, 4096);
}

}  // namespace hal
