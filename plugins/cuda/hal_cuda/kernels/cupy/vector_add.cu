// out = a + b. ELEMENT is defined where it is compiled. VECTORS: of 16 bytes that a thread moves where all pointers are multiples of 16.

static const int THREADS = 256, VECTORS = 2;

template <typename T, bool ALIGNED>
__device__ __forceinline__ void vector_add(const T* a, const T* b, T* out, i64 count) {
    const int SIZE = Vector<T>::SIZE;
    const i64 first = (i64)blockIdx.x * THREADS * VECTORS * SIZE;
    if (ALIGNED && first + THREADS * VECTORS * SIZE <= count) {
        Vector<T> x[VECTORS], y[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const i64 at = first + (v * THREADS + threadIdx.x) * SIZE;
            x[v].load(a + at);
            y[v].load(b + at);
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) narrow(wide(x[v].item[i]) + wide(y[v].item[i]), x[v].item[i]);
            x[v].store(out + first + (v * THREADS + threadIdx.x) * SIZE);
        }
        return;
    }
    for (int i = threadIdx.x; i < THREADS * VECTORS * SIZE && first + i < count; i += THREADS) {
        T sum;
        narrow(wide(a[first + i]) + wide(b[first + i]), sum);
        out[first + i] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) add(const ELEMENT* a, const ELEMENT* b, ELEMENT* out, i64 count,
                                                      int aligned) {
    if (aligned) vector_add<ELEMENT, true>(a, b, out, count);
    else vector_add<ELEMENT, false>(a, b, out, count);
}
