// gelu(x w^T + bias): a kernel for tensor cores (fp16 from compute capability 7.5, bf16 from 8.0) and one for all else.
// ELEMENT is defined where it is compiled; the first kernel is compiled where STORED_BY_ROWS is defined, true or false.

__device__ __forceinline__ float gelu(float x, int tanh) {
    if (tanh) return x / (1.0f + __expf(-1.5957691216057308f * x * (1.0f + 0.044715f * x * x)));
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}

// Place of a block's tile: TOGETHER tiles of rows at a time, so that their parts of x and w stay in the caches.
__device__ __forceinline__ void tile_of(u32 tile, u32 tiles, u32 across, u32& row, u32& column) {
    const u32 TOGETHER = 8, group = tile / (TOGETHER * across), inside = tile % (TOGETHER * across);
    const u32 height = tiles - group * TOGETHER < TOGETHER ? tiles - group * TOGETHER : TOGETHER;
    row = group * TOGETHER + inside % height;
    column = inside / height;
}

// Any type and any strides: a tile of 64 x 64, 4 x 4 of it in the registers of each of 256 threads.
template <typename T>
__device__ __forceinline__ void on_any(const T* x, const T* w, const T* bias, T* out, i64 rows, i64 columns, i64 depth,
                                      i64 x_m, i64 x_k, i64 w_n, i64 w_k, int tanh) {
    const int TILE = 64, STEP = 16;
    __shared__ float left[STEP][TILE + 4], right[STEP][TILE + 4];
    u32 tile_row, tile_column;
    tile_of(blockIdx.x, (u32)((rows + TILE - 1) / TILE), (u32)((columns + TILE - 1) / TILE), tile_row, tile_column);
    const i64 row = (i64)tile_row * TILE, column = (i64)tile_column * TILE;
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float sum[4][4] = {};
    for (i64 start = 0; start < depth; start += STEP) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * STEP; i += 256) {
            // Threads go along the dimension whose elements lie side by side.
            const int xm = x_k == 1 ? i / STEP : i % TILE, xk = x_k == 1 ? i % STEP : i / TILE;
            const int wn = w_k == 1 ? i / STEP : i % TILE, wk = w_k == 1 ? i % STEP : i / TILE;
            left[xk][xm] = row + xm < rows && start + xk < depth ? wide(x[(row + xm) * x_m + (start + xk) * x_k]) : 0.0f;
            right[wk][wn] =
                column + wn < columns && start + wk < depth ? wide(w[(column + wn) * w_n + (start + wk) * w_k]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
            float a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[i] = left[k][ty * 4 + i];
                b[i] = right[k][tx * 4 + i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const i64 m = row + ty * 4 + i, n = column + tx * 4 + j;
            if (m < rows && n < columns) narrow(gelu(sum[i][j] + (bias ? wide(bias[n]) : 0.0f), tanh), out[m * columns + n]);
        }
}

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// 16 bytes into shared memory, zeros where they are not there; beside the work of this thread from 8.0 on.
__device__ __forceinline__ void copy(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}
__device__ __forceinline__ void load_matrices(u32* to, const void* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(at)));
}
__device__ __forceinline__ void load_transposed(u32* to, const void* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(at)));
}

// d += a b of 16 x 8 x 16.
__device__ __forceinline__ void multiply(float* d, const u32* a, u32 b0, u32 b1, fp16) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void multiply(float* d, const u32* a, u32 b0, u32 b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A tile of 128 x 128 by 8 warps, 64 x 32 each, in steps of 32 along K. x [rows, depth] has rows of x_m elements; w
// [columns, depth] has rows of w_n, or, where W_ROWS, is stored [depth, columns] with rows of w_k. All rows begin at
// multiples of 16 bytes, and depth (columns where W_ROWS) is a multiple of 8.
template <typename T, bool W_ROWS>
__device__ __forceinline__ void on_tensor_cores(const T* x, const T* w, const T* bias, T* out, i64 rows, i64 columns,
                                                i64 depth, i64 x_m, i64 w_n, i64 w_k, int tanh) {
    const int TILE = 128, STEP = 32, STAGES = 3;
    __shared__ __align__(128) T left[STAGES][TILE * STEP];
    __shared__ __align__(128) T right[STAGES][TILE * STEP];
    u32 tile_row, tile_column;
    tile_of(blockIdx.x, (u32)((rows + TILE - 1) / TILE), (u32)((columns + TILE - 1) / TILE), tile_row, tile_column);
    const i64 row = (i64)tile_row * TILE, column = (i64)tile_column * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
    // 16-byte chunks of a row change places with the row's number, so that the eight rows that ldmatrix reads lie in
    // different banks: rows of 32 elements have 4 chunks, rows of 128 have 16.
    auto narrow_place = [](int r, int chunk) { return r * 32 + (chunk ^ (r >> 1 & 3)) * 8; };
    auto wide_place = [](int r, int chunk) { return r * 128 + (chunk ^ (r & 7)) * 8; };
    auto fill = [&](int stage, i64 start) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * STEP / 8; i += 256) {
            const int r = i / 4, chunk = i % 4;
            const bool there = row + r < rows && start + chunk * 8 < depth;
            copy(&left[stage][narrow_place(r, chunk)], there ? x + (row + r) * x_m + start + chunk * 8 : x, there);
        }
#pragma unroll
        for (int i = threadIdx.x; i < TILE * STEP / 8; i += 256) {
            if (W_ROWS) {
                const int r = i / 16, chunk = i % 16;
                const bool there = start + r < depth && column + chunk * 8 < columns;
                copy(&right[stage][wide_place(r, chunk)], there ? w + (start + r) * w_k + column + chunk * 8 : w, there);
            } else {
                const int r = i / 4, chunk = i % 4;
                const bool there = column + r < columns && start + chunk * 8 < depth;
                copy(&right[stage][narrow_place(r, chunk)], there ? w + (column + r) * w_n + start + chunk * 8 : w, there);
            }
        }
    };
    const int steps = (int)((depth + STEP - 1) / STEP);
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) fill(s, (i64)s * STEP);
        end_copies();
    }
    float sum[4][4][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        const int next = step + STAGES - 1;
        if (next < steps) fill(next % STAGES, (i64)next * STEP);
        end_copies();
        const T* a_tile = left[step % STAGES];
        const T* b_tile = right[step % STAGES];
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            u32 a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; ++m)
                load_matrices(a[m], &a_tile[narrow_place(warp_row + m * 16 + lane % 16, k / 8 + lane / 16)]);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                u32 found[4];
                if (W_ROWS) {
                    const int r = k + lane % 16, chunk = (warp_column + n * 8) / 8 + lane / 16;
                    load_transposed(found, &b_tile[wide_place(r, chunk)]);
                } else {
                    const int r = warp_column + n * 8 + lane / 16 * 8 + lane % 8, chunk = k / 8 + lane / 8 % 2;
                    load_matrices(found, &b_tile[narrow_place(r, chunk)]);
                }
                b[n][0] = found[0], b[n][1] = found[1], b[n + 1][0] = found[2], b[n + 1][1] = found[3];
            }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply(sum[m][n], a[m], b[n][0], b[n][1], T());
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const i64 at = column + warp_column + n * 8 + lane % 4 * 2;
        const float added[2] = {bias && at < columns ? wide(bias[at]) : 0.0f,
                                bias && at + 1 < columns ? wide(bias[at + 1]) : 0.0f};
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const i64 r = row + warp_row + m * 16 + half * 8 + lane / 4;
                if (r >= rows || at >= columns) continue;
                T pair[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) narrow(gelu(sum[m][n][half * 2 + i] + added[i], tanh), pair[i]);
                T* to = out + r * columns + at;
                if (columns % 2 == 0) {
                    *reinterpret_cast<u32*>(to) = (u32)pair[1].bits << 16 | pair[0].bits;
                } else {
                    to[0] = pair[0];
                    if (at + 1 < columns) to[1] = pair[1];
                }
            }
    }
}

#ifndef STORED_BY_ROWS
#define ENTRY plain
#else
#define ENTRY tensor
#endif
extern "C" __global__ void __launch_bounds__(256)
    ENTRY(const ELEMENT* x, const ELEMENT* w, const ELEMENT* bias, ELEMENT* out, i64 rows, i64 columns, i64 depth,
          i64 x_m, i64 x_k, i64 w_n, i64 w_k, int tanh) {
#ifndef STORED_BY_ROWS
    on_any<ELEMENT>(x, w, bias, out, rows, columns, depth, x_m, x_k, w_n, w_k, tanh);
#else
    on_tensor_cores<ELEMENT, STORED_BY_ROWS>(x, w, bias, out, rows, columns, depth, x_m, w_n, w_k, tanh);
#endif
}
