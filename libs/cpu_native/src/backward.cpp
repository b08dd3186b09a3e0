// The C interface of the backward pass: checks, and the division of a call into tasks.
#include <atomic>

#include "plan.hpp"
#include "pool.hpp"

namespace hal {
namespace {

// Tasks that a call is divided into at least, where it has the keys: by its sizes alone, so that the number of threads
// changes no bit of the result.
constexpr int64_t kLeastTasks = 8, kLeastKeys = 256;

struct Plan {
  BackwardCall call;
  const KernelTable* kernels;
  int threads;
  int64_t heads, splits, split_keys, scratch, partials;
  int64_t tasks() const { return heads * splits; }
  int64_t bytes() const { return threads * scratch + partials; }
  int64_t partial() const { return call.call.rows * call.call.dim_qk; }  // floats of one split
};

int plan(const hal_backward* given, Plan& p) {
  if (!given) return HAL_NULL_POINTER;
  static_cast<hal_backward&>(p.call) = *given;
  Call& c = p.call.call;
  if (const int status = checked(&given->forward, c, p.kernels)) return status;
  if (c.sharing > 1) return HAL_BAD_KERNEL;  // gradients of a key head that its heads read by different plans
  p.heads = c.batch * c.heads_kv;
  p.splits = p.heads && c.len_k ? (kLeastTasks + p.heads - 1) / p.heads : 1;
  while (p.splits > 1 && c.len_k / p.splits < kLeastKeys) p.splits--;
  p.split_keys = round_up((c.len_k + p.splits - 1) / p.splits, kBlockKeys);
  if (p.split_keys) p.splits = (c.len_k + p.split_keys - 1) / p.split_keys;
  const int64_t most = p.split_keys < c.len_k ? p.split_keys : c.len_k;
  p.scratch = backward_scratch(c, p.kernels->block_rows, most);
  p.partials = p.splits > 1 ? round_up(p.tasks() * p.partial() * 4, 64) : 0;
  p.threads = p.tasks() < c.threads ? (int)p.tasks() : c.threads;
  return HAL_OK;
}

struct Work {
  const Plan* plan;
  bool merging;
  std::atomic<int64_t> next{0};
  std::atomic<int> entered{0};
};

void work(void* data) {
  Work& shared = *(Work*)data;
  const Plan& p = *shared.plan;
  const Call& c = p.call.call;
  const int slot = shared.entered.fetch_add(1);
  if (slot >= p.threads) return;
  char* scratch = (char*)c.workspace + slot * p.scratch;
  float* partials = (float*)((char*)c.workspace + p.threads * p.scratch);
  const int64_t tasks = shared.merging ? p.heads : p.tasks();
  for (int64_t t; (t = shared.next.fetch_add(1)) < tasks;) {
    const int64_t head = shared.merging ? t : t / p.splits, split = t % p.splits;
    Task task{head / c.heads_kv, head % c.heads_kv, 0, 1, split * p.split_keys, p.split_keys};
    if (shared.merging) {
      float* first = partials + head * p.splits * p.partial();
      for (; task.row < c.rows; task.row++)
        p.kernels->finish_backward[c.dtype](p.call, task, first + task.row * c.dim_qk, p.splits, p.partial());
      continue;
    }
    if (c.len_k - task.key < task.keys) task.keys = c.len_k - task.key;
    p.kernels->backward[c.dtype](p.call, task, scratch, p.splits > 1 ? partials + t * p.partial() : nullptr);
  }
}

}  // namespace
}  // namespace hal

extern "C" {

int64_t hal_cpu_native_backward_bytes(void) { return sizeof(hal_backward); }

int64_t hal_cpu_native_backward_workspace(const hal_backward* call) {
  hal::Plan p;
  const int status = hal::plan(call, p);
  return status ? -status : p.bytes();
}

int hal_cpu_native_attention_backward(const hal_backward* call) {
  hal::Plan p;
  if (const int status = hal::plan(call, p)) return status;
  const hal::Call& c = p.call.call;
  if (!p.heads) return HAL_OK;
  if (!c.rows || !c.len_k) return HAL_BAD_SIZE;
  if (!c.query || !c.key || !c.value || !c.out || !c.lse || !c.workspace || (uintptr_t)c.workspace % 64) return HAL_NULL_POINTER;
  if (!p.call.grad_out || !p.call.grad_query || !p.call.grad_key || !p.call.grad_value) return HAL_NULL_POINTER;
  if (c.workspace_bytes < p.bytes()) return HAL_SMALL_WORKSPACE;
  for (int step = 0; step < (p.splits > 1 ? 2 : 1); step++) {
    hal::Work shared;
    shared.plan = &p;
    shared.merging = step == 1;
    hal::run_on_threads(p.threads, hal::work, &shared);
  }
  return HAL_OK;
}

}  // extern "C"
