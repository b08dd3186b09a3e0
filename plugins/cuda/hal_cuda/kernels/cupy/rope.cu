// Rotary position embedding: elements 2 i and 2 i + 1 of a head are turned by position * 2^(i * step) radians.
// ELEMENT is defined where it is compiled.

static const int THREADS = 256, HEADS = 4;

// Whole quarters of a turn are taken off in double, where float would lose the fraction.
__device__ __forceinline__ void angle(i64 position, int pair, double step, float& c, float& s) {
    const double fourths = (double)position * (exp2(pair * step) * 0.6366197723675814), whole = rint(fourths);
    const int quarter = (int)((i64)whole & 3);
    float x, y;
    sincospif(0.5f * (float)(fourths - whole), &y, &x);
    c = quarter & 1 ? y : x;
    s = quarter & 1 ? x : y;
    if ((quarter + 1) & 2) c = -c;
    if (quarter & 2) s = -s;
}

extern "C" __global__ void __launch_bounds__(256) rope_table(float* cos, float* sin, i64 count, int pairs,
                                                             double step) {
    const i64 at = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (at < count) angle(at / pairs, (int)(at % pairs), step, cos[at], sin[at]);
}

struct Heads { i64 batch, head, position; };  // strides of a tensor [batch, heads, length, dim], elements side by side

// SIZE elements of a position for up to HEADS heads; a thread keeps its cosines for all of them.
template <typename T, int SIZE>
__device__ __forceinline__ void turn(const T* x, T* out, Heads by, i64 batch, i64 position, int element, int first,
                                     int heads, i64 length, int dim, const float* c, const float* s) {
    const T* from = x + batch * by.batch + position * by.position + element;
    T* to = out + (batch * heads * length + position) * dim + element;
    const int count = heads - first < HEADS ? heads - first : HEADS;
    if (SIZE > 2) {
        Vector<T> some[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; ++h)
            if (h < count) some[h].load(from + (first + h) * by.head);
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
#pragma unroll
            for (int i = 0; i < SIZE; i += 2) {
                const float even = wide(some[h].item[i]), odd = wide(some[h].item[i + 1]);
                narrow(even * c[i / 2] - odd * s[i / 2], some[h].item[i]);
                narrow(even * s[i / 2] + odd * c[i / 2], some[h].item[i + 1]);
            }
            if (h < count) some[h].store(to + (first + h) * length * dim);
        }
    } else {
        for (int h = first; h < first + count; ++h) {
            const float even = wide(from[h * by.head]), odd = wide(from[h * by.head + 1]);
            narrow(even * c[0] - odd * s[0], to[h * length * dim]);
            narrow(even * s[0] + odd * c[0], to[h * length * dim + 1]);
        }
    }
}

// A thread has one place (batch, position, SIZE elements) and one group of HEADS heads, of the query or of the key.
// The groups of a place come one after the other: what they share is in the caches.
template <typename T, int SIZE, bool TABLE>
__device__ __forceinline__ void rope(const T* q, const T* k, const float* cos, const float* sin, T* q_out, T* k_out,
                                     Heads q_by, Heads k_by, int heads_q, int heads_k, i64 length,
                                     int dim, double step) {
    const u32 chunks = dim / SIZE;
    const int groups_q = (heads_q + HEADS - 1) / HEADS;
    const int groups = groups_q + (heads_k + HEADS - 1) / HEADS;
    const u32 units = (u32)length * chunks;  // of a head; the caller keeps length * dim below 2^31
    const u32 width = (units + THREADS - 1) / THREADS;
    const u32 at = blockIdx.x % width * THREADS + threadIdx.x;
    const int group = blockIdx.x / width % groups;
    const i64 batch = blockIdx.x / width / groups;
    if (at >= units) return;
    const i64 position = at / chunks;
    const int element = at % chunks * SIZE;
    float c[SIZE / 2], s[SIZE / 2];
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
        if (TABLE) {
            c[i] = cos[position * (dim / 2) + element / 2 + i];
            s[i] = sin[position * (dim / 2) + element / 2 + i];
        } else {
            angle(position, element / 2 + i, step, c[i], s[i]);
        }
    }
    if (group < groups_q)
        turn<T, SIZE>(q, q_out, q_by, batch, position, element, group * HEADS, heads_q, length, dim, c, s);
    else
        turn<T, SIZE>(k, k_out, k_by, batch, position, element, (group - groups_q) * HEADS, heads_k, length, dim, c,
                      s);
}

#define ENTRY(name, SIZE, TABLE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        name(const ELEMENT* q, const ELEMENT* k, const float* cos, const float* sin, ELEMENT* q_out, ELEMENT* k_out, \
             i64 q_b, i64 q_h, i64 q_n, i64 k_b, i64 k_h, i64 k_n, int heads_q, int heads_k, i64 length, int dim,    \
             double step) {                                                                                          \
        const Heads q_by = {q_b, q_h, q_n}, k_by = {k_b, k_h, k_n};                                                  \
        rope<ELEMENT, SIZE, TABLE>(q, k, cos, sin, q_out, k_out, q_by, k_by, heads_q, heads_k, length, dim, step);   \
    }
ENTRY(table_wide, Vector<ELEMENT>::SIZE, true)
ENTRY(computed_wide, Vector<ELEMENT>::SIZE, false)
ENTRY(table_pairs, 2, true)
ENTRY(computed_pairs, 2, false)
