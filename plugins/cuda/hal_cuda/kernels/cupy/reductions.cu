// Sums and maxima: a warp's threads by shuffles, then its block's warps by a tree in shared memory.
// ELEMENT (read), RESULT (written) and OPERATION are defined where it is compiled; partial results are float.

static const int THREADS = 256, WARPS = THREADS / 32;
static const int LANES = 8;  // threads of a short row: each keeps several loads in flight where a warp would have one

struct Sum {
    static __device__ __forceinline__ float neutral() { return 0.0f; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Max {  // NaN where either is
    static __device__ __forceinline__ float neutral() { return __uint_as_float(0xff800000u); }
    static __device__ __forceinline__ float join(float a, float b) { return a != a ? a : b > a || b != b ? b : a; }
};

// The result is in the first of each `width` threads of a warp.
template <typename Op, int width = 32> __device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int step = width / 2; step; step >>= 1) x = Op::join(x, __shfl_down_sync(0xffffffffu, x, step, width));
    return x;
}

// The result is in thread 0.
template <typename Op> __device__ __forceinline__ float over_block(float x) {
    __shared__ float kept[WARPS];
    x = over_warp<Op>(x);
    if (threadIdx.x % 32 == 0) kept[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (int step = WARPS / 2; step; step >>= 1) {
        if (threadIdx.x < step) kept[threadIdx.x] = Op::join(kept[threadIdx.x], kept[threadIdx.x + step]);
        __syncthreads();
    }
    return kept[0];
}

// What one of `threads` threads finds in count numbers at x. Those before the first multiple of 16 bytes and behind
// the last go one by one; the others by 16 bytes, UNROLL of them in flight.
template <typename T, typename Op>
__device__ __forceinline__ float over_span(const T* x, i64 count, int thread, int threads) {
    const int SIZE = Vector<T>::SIZE, UNROLL = 4;
    const i64 before = (i64)((16 - (reinterpret_cast<size_t>(x) & 15)) & 15) / sizeof(T);
    const i64 head = before < count ? before : count;
    float found = Op::neutral();
    if (thread < head) found = wide(x[thread]);
    const T* body = x + head;
    const i64 vectors = (count - head) / SIZE;
    float part[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) part[i] = Op::neutral();
    i64 at = thread;
    for (; at + (UNROLL - 1) * threads < vectors; at += UNROLL * threads) {
        Vector<T> some[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) some[u].load(body + (at + u * threads) * SIZE);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int i = 0; i < SIZE; ++i) part[i] = Op::join(part[i], wide(some[u].item[i]));
    }
    for (; at < vectors; at += threads) {
        Vector<T> some;
        some.load(body + at * SIZE);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) part[i] = Op::join(part[i], wide(some.item[i]));
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) found = Op::join(found, part[i]);
    for (i64 i = head + vectors * SIZE + thread; i < count; i += threads) found = Op::join(found, wide(x[i]));
    return found;
}

// Pieces of contiguous rows, a block each. x: [rows, length]; out: [rows, pieces].
template <typename T, typename R, typename Op>
__device__ __forceinline__ void reduce_rows(const T* x, R* out, i64 length, i64 pieces, i64 piece) {
    const i64 row = blockIdx.x / pieces, first = blockIdx.x % pieces * piece;
    const i64 count = length - first < piece ? length - first : piece;
    const float found = over_block<Op>(over_span<T, Op>(x + row * length + first, count, threadIdx.x, THREADS));
    if (threadIdx.x == 0) narrow(found, out[blockIdx.x]);
}

// Short rows, LANES threads each. Threads without a row find nothing: every thread of a warp takes part in its shuffles.
template <typename T, typename R, typename Op>
__device__ __forceinline__ void reduce_short_rows(const T* x, R* out, i64 length, i64 rows) {
    const i64 row = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const i64 count = row < rows ? length : 0;
    const float found = over_warp<Op, LANES>(over_span<T, Op>(x + row * length, count, threadIdx.x % LANES, LANES));
    if (threadIdx.x % LANES == 0 && row < rows) narrow(found, out[row]);
}

// Pieces of the middle dimension: 32 threads side by side along inner, SIZE numbers each, and WARPS along length. x:
// [outer, length, inner]; out: [pieces, outer, inner]. blocks: of 32 * SIZE numbers in inner.
template <typename T, typename R, typename Op, int SIZE>
__device__ __forceinline__ void reduce_columns(const T* x, R* out, i64 outers, i64 length, i64 inner, i64 blocks,
                                               i64 piece) {
    const int UNROLL = 4;
    __shared__ float kept[WARPS][32 * SIZE];
    const i64 block = blockIdx.x % blocks, outer = blockIdx.x / blocks % outers;
    const i64 which = blockIdx.x / blocks / outers;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 column = (block * 32 + lane) * SIZE;
    const i64 last = (which + 1) * piece < length ? (which + 1) * piece : length;
    float part[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) part[i] = Op::neutral();
    if (column < inner) {
        const T* from = x + outer * length * inner + column;
        i64 at = which * piece + warp;
        if (SIZE > 1) {
            for (; at + (UNROLL - 1) * WARPS < last; at += UNROLL * WARPS) {
                Vector<T> some[UNROLL];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) some[u].load(from + (at + u * WARPS) * inner);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u)
#pragma unroll
                    for (int i = 0; i < SIZE; ++i) part[i] = Op::join(part[i], wide(some[u].item[i]));
            }
        }
        for (; at < last; at += WARPS)
#pragma unroll
            for (int i = 0; i < SIZE; ++i) part[i] = Op::join(part[i], wide(from[at * inner + i]));
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) kept[warp][i * 32 + lane] = part[i];
    __syncthreads();
#pragma unroll
    for (int step = WARPS / 2; step; step >>= 1) {
        if (warp < step)
#pragma unroll
            for (int i = 0; i < SIZE; ++i)
                kept[warp][i * 32 + lane] = Op::join(kept[warp][i * 32 + lane], kept[warp + step][i * 32 + lane]);
        __syncthreads();
    }
    if (warp == 0 && column < inner)
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            narrow(kept[0][i * 32 + lane], out[(which * outers + outer) * inner + column + i]);
}

extern "C" __global__ void __launch_bounds__(256) rows(const ELEMENT* x, RESULT* out, i64 length, i64 pieces,
                                                       i64 piece) {
    reduce_rows<ELEMENT, RESULT, OPERATION>(x, out, length, pieces, piece);
}
extern "C" __global__ void __launch_bounds__(256) short_rows(const ELEMENT* x, RESULT* out, i64 length, i64 count) {
    reduce_short_rows<ELEMENT, RESULT, OPERATION>(x, out, length, count);
}
extern "C" __global__ void __launch_bounds__(256) columns(const ELEMENT* x, RESULT* out, i64 outers, i64 length,
                                                          i64 inner, i64 blocks, i64 piece) {
    reduce_columns<ELEMENT, RESULT, OPERATION, Vector<ELEMENT>::SIZE>(x, out, outers, length, inner, blocks, piece);
}
extern "C" __global__ void __launch_bounds__(256) single_columns(const ELEMENT* x, RESULT* out, i64 outers, i64 length,
                                                                 i64 inner, i64 blocks, i64 piece) {
    reduce_columns<ELEMENT, RESULT, OPERATION, 1>(x, out, outers, length, inner, blocks, piece);
}
