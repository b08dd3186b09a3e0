/* The C interface of hal_cpu_native: attention and fields over raw pointers, without torch, Python or OpenMP.
 *
 * Every call checks its arguments and returns a code; `hal_cpu_native_message` has a sentence for each. Nothing is
 * allocated per call: the caller brings a workspace of `hal_cpu_native_workspace` bytes.
 */
#ifndef HAL_CPU_NATIVE_H
#define HAL_CPU_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define HAL_API __attribute__((visibility("default")))
#else
#define HAL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum hal_dtype { HAL_FLOAT32 = 0, HAL_BFLOAT16 = 1, HAL_FLOAT16 = 2 };

/* Instruction sets, each with what those before it have. AUTO: the best that this processor has. */
enum hal_isa { HAL_ISA_AUTO = 0, HAL_ISA_AVX2 = 1, HAL_ISA_AVX512 = 2, HAL_ISA_AVX512_BF16 = 3 };

/* What a mask's elements are: bytes, or numbers that are added to the scaled (and softcapped) scores, -inf hiding a key. */
enum hal_mask { HAL_MASK_BYTES = 0, HAL_MASK_FLOAT32 = 1, HAL_MASK_OF_DTYPE = 2 };

/* AUTO: decode for at most HAL_DECODE_ROWS rows (queries times group) where the processor has it, else prefill. */
enum hal_kernel { HAL_KERNEL_AUTO = 0, HAL_KERNEL_PREFILL = 1, HAL_KERNEL_DECODE = 2 };

enum hal_status {
  HAL_OK = 0,
  HAL_NULL_POINTER,
  HAL_BAD_SIZE,
  HAL_BAD_HEADS,
  HAL_BAD_HEAD_DIM,
  HAL_BAD_DTYPE,
  HAL_BAD_SCALE,
  HAL_BAD_THREADS,
  HAL_BAD_ISA,
  HAL_BAD_KERNEL,
  HAL_SMALL_WORKSPACE,
  HAL_BAD_MASK,
  HAL_STATUS_COUNT
};

#define HAL_DECODE_ROWS 16
#define HAL_MOST_HEAD_DIM 512
#define HAL_MOST_THREADS 1024
/* Bounds of a band beyond every key: no bound. */
#define HAL_NO_BOUND ((int64_t)1 << 40)

/* One call. Strides are in elements; the last dimension of query, key, value and out is contiguous.
 *
 * query [batch, heads_q, len_q, dim_qk], key [batch, heads_kv, len_k, dim_qk], value [batch, heads_kv, len_k, dim_v],
 * out [batch, heads_q, len_q, dim_v]; query head h reads key head h / (heads_q / heads_kv).
 * mask: [batch, heads_q, len_q, len_k] with any strides in elements, of the kind `mask_kind`; NULL for none. A byte of 0
 * hides the key; a number is added, in natural units, and numbers below -2.3e38 count as one.
 * blocks: a block plan as bytes [batch, heads_q, ceil(len_q / block_q), ceil(len_k / block_k)] with any strides, 0 where
 * no query of the block may read a key of the other; NULL for none. Keys that no row reads by it cost nothing.
 * lse: natural log-sum-exp, float [batch, heads_q, len_q], contiguous; NULL where it is not wanted.
 * Row i reads the keys i + band_low to i + band_high that exist. softcap: 0 for none.
 */
typedef struct {
  const void* query;
  const void* key;
  const void* value;
  const void* mask;
  const uint8_t* blocks;
  void* out;
  float* lse;
  void* workspace; /* aligned to 64 bytes */
  int64_t workspace_bytes;
  int64_t query_strides[3], key_strides[3], value_strides[3], out_strides[3]; /* batch, head, row */
  int64_t mask_strides[4];                                                    /* batch, head, row, key */
  int64_t block_strides[4];                                                   /* batch, head, query block, key block */
  int64_t block_q, block_k;
  int64_t batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v;
  int64_t band_low, band_high;
  float scale, softcap;
  int32_t dtype, isa, kernel, threads, mask_kind;
} hal_attention;

/* The backward pass of a call: `forward` with the query, key, value, mask and plan of it, and its out and lse, which are
 * read. A plan that differs between heads that share a key head has no backward. Gradients are of the call's dtype, their
 * last dimension contiguous; grad_out [batch, heads_q, len_q, dim_v]. grad_lse: of the log-sum-exp, as it is laid out;
 * NULL for none. Lengths are above 0.
 */
typedef struct {
  hal_attention forward;
  const void* grad_out;
  const float* grad_lse;
  void* grad_query;
  void* grad_key;
  void* grad_value;
  int64_t grad_out_strides[3], grad_query_strides[3], grad_key_strides[3], grad_value_strides[3]; /* batch, head, row */
} hal_backward;

HAL_API int64_t hal_cpu_native_backward_bytes(void);
HAL_API int64_t hal_cpu_native_backward_workspace(const hal_backward* call);
HAL_API int hal_cpu_native_attention_backward(const hal_backward* call);

/* Bytes of hal_attention as this library was built: whoever fills the struct by its fields' places compares first. */
HAL_API int64_t hal_cpu_native_call_bytes(void);

/* The best instruction set of this processor (enum hal_isa), 0 where it lacks AVX2, FMA or F16C. */
HAL_API int hal_cpu_native_isa(void);

/* Bytes of workspace that `call` needs: its sizes, dtype, isa, kernel and threads count. Negative: minus a status. */
HAL_API int64_t hal_cpu_native_workspace(const hal_attention* call);

/* Runs `call`. Returns a status; unless it is HAL_OK nothing was written. */
HAL_API int hal_cpu_native_attention(const hal_attention* call);

/* Which kernel runs `call` (HAL_KERNEL_PREFILL or HAL_KERNEL_DECODE); negative: minus a status. */
HAL_API int hal_cpu_native_kernel(const hal_attention* call);

/* A sentence for a status. */
HAL_API const char* hal_cpu_native_message(int status);

/* Reads `bytes` bytes with prefetch on `threads` threads, for measurements: what decode is compared with. */
HAL_API uint64_t hal_cpu_native_read(const void* memory, int64_t bytes, int32_t threads);

/* Fields on periodic grids, float32 [systems, height, width], contiguous. The formulas are those of hal-compute's kernels
 * of the same names. `workspace`: hal_cpu_native_fields_workspace bytes, aligned to 64; results do not depend on `threads`.
 * Each returns a status; unless it is HAL_OK nothing was written. */

/* `steps` explicit steps of an activator u and an inhibitor v. numbers: dt, diffusion of u and of v, reaction, epsilon,
 * decay, offset. */
HAL_API int hal_cpu_native_reaction_diffusion(const float* u, const float* v, float* new_u, float* new_v, void* workspace,
    int64_t workspace_bytes, int64_t systems, int64_t height, int64_t width, int64_t steps, const double* numbers,
    int32_t threads, int32_t isa);

/* `steps` explicit steps of Ricci flow of the metric exp(2 phi) * identity. */
HAL_API int hal_cpu_native_ricci(const float* phi, float* new_phi, void* workspace, int64_t workspace_bytes, int64_t systems,
    int64_t height, int64_t width, int64_t steps, double dt, int32_t threads, int32_t isa);

/* Corners minus edges plus pixels of the closed pixels of at least a level, row by row of the grid of corners: parts
 * [systems, levels, height + 1]. The grid is not periodic. */
HAL_API int hal_cpu_native_euler(const float* field, const float* levels, int32_t* parts, void* workspace,
    int64_t workspace_bytes, int64_t systems, int64_t count, int64_t height, int64_t width, int32_t threads, int32_t isa);

/* Bytes of workspace that each of these needs for `fields` fields in a system (2, 1 and 0). Negative: minus a status. */
HAL_API int64_t hal_cpu_native_fields_workspace(int32_t fields, int64_t systems, int64_t height, int64_t width, int32_t threads);

/* Lets another library's threads do the work: `run` is called as run(function, data, threads, 0), calls function(data)
 * on up to `threads` threads and returns when all have returned, as libgomp's GOMP_parallel does. NULL: this library's
 * own threads. Sharing the threads of a library that spins between its own calls avoids two pools on one processor. */
typedef void (*hal_runner)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
HAL_API void hal_cpu_native_set_runner(hal_runner run);

#ifdef __cplusplus
}
#endif
#endif
