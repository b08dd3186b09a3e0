// Pages of keys and values: new ones put into their slots, and sequences taken out. The pool is [pages, 2, heads, size,
// dim]. A thread moves one unit of a head's elements (16 bytes where WIDE is defined, else one element, UNIT) of keys, and one of values.
//
// A slot or page that the pool does not have, and a position behind a sequence's pages, are masked: nothing outside the
// tensors is read or written.

static const int THREADS = 256;

// The caller launches it for so many tokens at a time that tokens * heads * units stays below 2^31.
template <typename U>
__device__ __forceinline__ void append(U* pool, const int* slots, const U* keys, const U* values, i64 k_t, i64 k_h,
                                       i64 v_t, i64 v_h, u32 tokens, i64 pages, u32 heads, u32 size, u32 units) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= tokens * heads * units) return;
    const u32 unit = at % units, row = at / units, token = row / heads, head = row % heads;
    const int slot = slots[token];
    if (slot < 0 || slot >= pages * size) return;
    const U key = keys[token * k_t + head * k_h + unit], value = values[token * v_t + head * v_h + unit];
    const i64 plane = (i64)heads * size * units;
    U* to = pool + (u32)slot / size * 2 * plane + ((i64)head * size + (u32)slot % size) * units + unit;
    to[0] = key;
    to[plane] = value;
}

// POSITIONS of a head go to one thread, so that as many loads are in flight. most * units stays below 2^31.
static const int POSITIONS = 2;

template <typename U>
__device__ __forceinline__ void read(const U* pool, const int* table, const int* lengths, U* keys, U* values, i64 t_b,
                                     i64 t_n, u32 pages, u32 heads, u32 size, u32 listed, u32 most, u32 units,
                                     U zero) {
    const u32 whole = most * units;  // units of a head
    const u32 width = (whole + THREADS * POSITIONS - 1) / (THREADS * POSITIONS);
    const u32 row = blockIdx.x / width, batch = row / heads, head = row % heads;
    const u32 first = blockIdx.x % width * THREADS * POSITIONS + threadIdx.x;
    const i64 length = lengths[batch], plane = (i64)heads * size * units;
    U key[POSITIONS], value[POSITIONS];
#pragma unroll
    for (int p = 0; p < POSITIONS; ++p) {
        const u32 at = first + p * THREADS, position = at / units, place = position / size;
        key[p] = value[p] = zero;
        if (at >= whole || position >= length || place >= listed) continue;
        const u32 page = table[batch * t_b + place * t_n];  // a negative number is a large one
        if (page >= pages) continue;
        const U* from = pool + page * 2 * plane + ((i64)head * size + position % size) * units + at % units;
        key[p] = from[0];
        value[p] = from[plane];
    }
#pragma unroll
    for (int p = 0; p < POSITIONS; ++p) {
        const u32 at = first + p * THREADS;
        if (at >= whole) continue;
        keys[(i64)row * whole + at] = key[p];
        values[(i64)row * whole + at] = value[p];
    }
}

#ifdef WIDE
typedef uint4 Unit;
#define ZERO make_uint4(0, 0, 0, 0)
#else
typedef UNIT Unit;
#define ZERO 0
#endif
extern "C" __global__ void __launch_bounds__(256)
    append_units(Unit* pool, const int* slots, const Unit* keys, const Unit* values, i64 k_t, i64 k_h, i64 v_t, i64 v_h,
                 u32 tokens, i64 pages, u32 heads, u32 size, u32 units) {
    append<Unit>(pool, slots, keys, values, k_t, k_h, v_t, v_h, tokens, pages, heads, size, units);
}
extern "C" __global__ void __launch_bounds__(256)
    read_units(const Unit* pool, const int* table, const int* lengths, Unit* keys, Unit* values, i64 t_b, i64 t_n,
               u32 pages, u32 heads, u32 size, u32 listed, u32 most, u32 units) {
    read<Unit>(pool, table, lengths, keys, values, t_b, t_n, pages, heads, size, listed, most, units, ZERO);
}
