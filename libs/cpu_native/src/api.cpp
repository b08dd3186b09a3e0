// The C interface: checks, the choice of a kernel, and the division of a call into tasks.
#include <atomic>
#include <cmath>
#include <cstring>

#include "call.hpp"
#include "cpuid.hpp"
#include "plan.hpp"
#include "pool.hpp"

namespace hal {
namespace {

const char* const kMessages[HAL_STATUS_COUNT] = {
    "the call succeeded",
    "query, key, value, out, a field or the workspace is a null pointer, or the workspace is not aligned to 64 bytes",
    "a size is negative or 2^31 or more, the blocks of a plan are below 1, or a field has no elements or steps",
    "heads_q is not a multiple of heads_kv",
    "a head size is not a multiple of 8 (of 32 for decode) from 8 to 512",
    "the dtype is none of float32, bfloat16 and float16",
    "the scale is not above 0 and finite, or the softcap is negative or not finite",
    "the number of threads is not from 1 to 1024",
    "this processor lacks the instruction set that was asked for (AVX2, FMA and F16C at the least)",
    "the kernel is unknown, decode was asked for more than 16 rows, a block plan or an instruction set without it, or the backward "
    "pass for a block plan that differs between heads that share a key head",
    "the workspace is smaller than hal_cpu_native_workspace says",
    "the mask is none of bytes, float32 numbers and numbers of the call's dtype",
};

struct Plan {
  Call call;
  const KernelTable* kernels;
  bool decode;
  int threads;
  int64_t heads, task_rows, parts, split_keys, splits, scratch, partials;
  int64_t tasks() const { return decode ? heads * splits : heads * parts; }
  int64_t bytes() const { return threads * scratch + partials; }
};

const KernelTable* table(int isa) {
  switch (isa) {
    case HAL_ISA_AVX2: return &avx2_kernels();
    case HAL_ISA_AVX512: return &avx512_kernels();
    case HAL_ISA_AVX512_BF16: return &avx512_bf16_kernels();
  }
  return nullptr;
}

bool multiple(int64_t dim, int64_t unit) { return dim >= unit && dim <= HAL_MOST_HEAD_DIM && dim % unit == 0; }

void plan_prefill(Plan& p) {
  // Rows share packed keys and values, so tasks are large; but each thread should get several, or one waits for another.
  const int64_t rows = p.call.rows, unit = p.kernels->block_rows, wanted = 4 * p.call.threads;
  p.task_rows = rows < kMostTaskRows ? round_up(rows, unit) : kMostTaskRows;
  while (p.task_rows > unit && p.heads * ((rows + p.task_rows - 1) / p.task_rows) < wanted) p.task_rows = round_up(p.task_rows / 2, unit);
  p.parts = (rows + p.task_rows - 1) / p.task_rows;
  p.scratch = prefill_scratch(p.call, unit, p.task_rows);
  p.partials = 0;
}

void plan_decode(Plan& p) {
  const int64_t threads = p.call.threads;
  int64_t splits = 1;
  while (p.heads * splits % threads && p.heads * splits < 4 * threads && p.call.len_k / (splits + 1) >= 256) splits++;
  p.split_keys = round_up((p.call.len_k + splits - 1) / splits, kBlockKeys);
  p.splits = (p.call.len_k + p.split_keys - 1) / p.split_keys;
  p.scratch = decode_scratch(p.call);
  p.partials = round_up(p.heads * p.splits * p.call.rows * partial_floats(p.call) * 4, 64);
}

// HAL_OK and a plan, or why not.
int plan(const hal_attention* given, Plan& p) {
  Call& c = p.call;
  if (const int status = checked(given, c, p.kernels)) return status;
  p.heads = c.batch * c.heads_kv;
  const bool fits = !c.blocks && p.kernels->decode[c.dtype] && c.rows <= HAL_DECODE_ROWS && multiple(c.dim_qk, 32) && multiple(c.dim_v, 32);
  if (c.kernel < HAL_KERNEL_AUTO || c.kernel > HAL_KERNEL_DECODE || (c.kernel == HAL_KERNEL_DECODE && !fits)) return HAL_BAD_KERNEL;
  p.decode = c.kernel == HAL_KERNEL_AUTO ? fits : c.kernel == HAL_KERNEL_DECODE;
  if (!p.heads || !c.rows) {
    p.scratch = p.partials = 0;
    p.threads = 1;
    return HAL_OK;
  }
  if (c.len_k == 0) p.decode = false;
  if (p.decode) plan_decode(p); else plan_prefill(p);
  p.threads = p.tasks() < c.threads ? (int)p.tasks() : c.threads;
  return HAL_OK;
}

// What the threads of a call share: they take tasks one by one.
struct Work {
  const Plan* plan;
  std::atomic<int64_t> next{0};
  std::atomic<int> entered{0};
};

void work(void* data) {
  Work& shared = *(Work*)data;
  const Plan& p = *shared.plan;
  const Call& c = p.call;
  const int slot = shared.entered.fetch_add(1);
  if (slot >= p.threads) return;
  char* scratch = (char*)c.workspace + slot * p.scratch;
  float* partials = (float*)((char*)c.workspace + p.threads * p.scratch);
  for (int64_t t; (t = shared.next.fetch_add(1)) < p.tasks();) {
    Task task{};
    if (p.decode) {
      const int64_t head = t / p.splits, split = t % p.splits;
      task = {head / c.heads_kv, head % c.heads_kv, 0, c.rows, split * p.split_keys, p.split_keys};
      p.kernels->decode[c.dtype](c, task, scratch, partials + t * c.rows * partial_floats(c));
    } else {  // late rows first: under a causal diagonal they have the most keys
      const int64_t head = t / p.parts, part = p.parts - 1 - t % p.parts;
      task = {head / c.heads_kv, head % c.heads_kv, part * p.task_rows, 0, 0, c.len_k};
      task.rows = c.rows - task.row < p.task_rows ? c.rows - task.row : p.task_rows;
      p.kernels->prefill[c.dtype](c, task, scratch);
    }
  }
}

// Joins the partial results of the splits of each row: weights are relative to each split's own maximum.
void merge(const Plan& p) {
  const Call& c = p.call;
  float* partials = (float*)((char*)c.workspace + p.threads * p.scratch);
  const int64_t width = partial_floats(c), dim = c.dim_v;
  for (int64_t head = 0; head < p.heads; head++)
    for (int64_t row = 0; row < c.rows; row++) {
      float* first = partials + (head * p.splits * c.rows + row) * width;
      Partial state{first[dim], first[dim + 1]};
      for (int64_t split = 1; split < p.splits; split++) {
        const float* other = partials + ((head * p.splits + split) * c.rows + row) * width;
        const float top = other[dim] > state.maximum ? other[dim] : state.maximum;
        const float a = state.maximum == top ? 1.f : std::exp2(state.maximum - top);
        const float b = other[dim] == top ? 1.f : std::exp2(other[dim] - top);
        for (int64_t d = 0; d < dim; d++) first[d] = a * first[d] + b * other[d];
        state = {top, a * state.sum + b * other[dim + 1]};
      }
      p.kernels->finish(c, head / c.heads_kv, head % c.heads_kv, row, first, state);
    }
}

struct Reading {
  const char* memory;
  int64_t bytes;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};
};

void read(void* data) {
  Reading& shared = *(Reading*)data;
  const int64_t piece = 1 << 20;
  uint64_t sum = 0;
  for (int64_t at; (at = shared.next.fetch_add(piece)) < shared.bytes;)
    sum ^= table(preferred_isa())->read(shared.memory + at, shared.bytes - at < piece ? shared.bytes - at : piece);
  shared.sum ^= sum;
}

}  // namespace

int checked(const hal_attention* given, Call& c, const KernelTable*& kernels) {
  if (!given) return HAL_NULL_POINTER;
  static_cast<hal_attention&>(c) = *given;
  const int64_t sizes[] = {c.batch, c.heads_q, c.heads_kv, c.len_q, c.len_k};
  for (int64_t size : sizes)
    if (size < 0 || size >= int64_t(1) << 31) return HAL_BAD_SIZE;
  if (c.heads_kv ? c.heads_q % c.heads_kv != 0 : c.heads_q != 0) return HAL_BAD_HEADS;
  if (!multiple(c.dim_qk, 8) || !multiple(c.dim_v, 8)) return HAL_BAD_HEAD_DIM;
  if (c.dtype < HAL_FLOAT32 || c.dtype > HAL_FLOAT16) return HAL_BAD_DTYPE;
  if (!(c.scale > 0) || !std::isfinite(c.scale) || !(c.softcap >= 0) || !std::isfinite(c.softcap)) return HAL_BAD_SCALE;
  if (c.mask_kind < HAL_MASK_BYTES || c.mask_kind > HAL_MASK_OF_DTYPE) return HAL_BAD_MASK;
  if (c.threads < 1 || c.threads > HAL_MOST_THREADS) return HAL_BAD_THREADS;
  const int isa = c.isa == HAL_ISA_AUTO ? preferred_isa() : c.isa;
  if (isa < HAL_ISA_AVX2 || isa > best_isa()) return HAL_BAD_ISA;
  kernels = table(isa);
  c.band_low = c.band_low < -HAL_NO_BOUND ? -HAL_NO_BOUND : c.band_low > HAL_NO_BOUND ? HAL_NO_BOUND : c.band_low;
  c.band_high = c.band_high < -HAL_NO_BOUND ? -HAL_NO_BOUND : c.band_high > HAL_NO_BOUND ? HAL_NO_BOUND : c.band_high;
  if (c.blocks && (c.block_q < 1 || c.block_k < 1)) return HAL_BAD_SIZE;
  c.group = c.heads_kv ? c.heads_q / c.heads_kv : 1;
  c.sharing = 1;
  if (c.blocks && c.block_strides[1] && c.heads_kv) {  // each head skips other keys, so none shares its rows' reads
    c.sharing = c.group;
    c.heads_kv = c.heads_q;
    c.group = 1;
  }
  c.rows = c.group * c.len_q;
  return HAL_OK;
}

}  // namespace hal

extern "C" {

int64_t hal_cpu_native_call_bytes(void) { return sizeof(hal_attention); }

int hal_cpu_native_isa(void) { return hal::best_isa(); }

int64_t hal_cpu_native_workspace(const hal_attention* call) {
  hal::Plan p;
  const int status = hal::plan(call, p);
  return status ? -status : p.bytes();
}

int hal_cpu_native_kernel(const hal_attention* call) {
  hal::Plan p;
  const int status = hal::plan(call, p);
  return status ? -status : p.decode ? HAL_KERNEL_DECODE : HAL_KERNEL_PREFILL;
}

int hal_cpu_native_attention(const hal_attention* call) {
  hal::Plan p;
  if (const int status = hal::plan(call, p)) return status;
  const hal::Call& c = p.call;
  if (!p.heads || !c.rows) return HAL_OK;
  if (!c.query || !c.out || (c.len_k && (!c.key || !c.value)) || !c.workspace || (uintptr_t)c.workspace % 64) return HAL_NULL_POINTER;
  if (c.workspace_bytes < p.bytes()) return HAL_SMALL_WORKSPACE;
  hal::Work shared;
  shared.plan = &p;
  hal::run_on_threads(p.threads, hal::work, &shared);
  if (p.decode) hal::merge(p);
  return HAL_OK;
}

const char* hal_cpu_native_message(int status) {
  return status >= 0 && status < HAL_STATUS_COUNT ? hal::kMessages[status] : "the status is unknown";
}

uint64_t hal_cpu_native_read(const void* memory, int64_t bytes, int32_t threads) {
  if (!memory || bytes <= 0 || threads < 1 || threads > HAL_MOST_THREADS || !hal::best_isa()) return 0;
  hal::Reading shared;
  shared.memory = (const char*)memory;
  shared.bytes = bytes;
  hal::run_on_threads(threads, hal::read, &shared);
  return shared.sum.load();
}

void hal_cpu_native_set_runner(hal_runner run) { hal::set_runner(run); }

}  // extern "C"
