// Attention for processors with wide vectors and large caches. One work item takes ROWS query rows of a unit and walks the
// keys in tiles of TILE, GROUP rows at a time: scores are GROUP x 32 blocks in registers against transposed keys, the
// output GROUP x 32 blocks against values, and the softmax between them runs online (Milakov & Gimelshein 2018).
// Build options beside problem.h's: TILE, ROWS, GROUP, DIRECT (1: few rows, for which transposing the keys would not pay: the
// key and value tensors themselves are read, and a score is the sum of a product of vectors).

#define VECTORS (TILE / 16)

#if DIRECT
typedef stored packed;
#define READ_PACKED(i, p) READ16(i, p)
#else
typedef float packed;
#define READ_PACKED(i, p) vload16(i, p)
#endif

// 2^x to 2 ulp for x <= 0; below -126 it is 0.
static inline float16 exp2_to_zero(float16 x) {
  const float16 shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the nearest whole number
  const float16 f = x - (shifted - 12582912.0f);
  float16 y = 1.5403530e-4f;
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const float16 scaled = as_float16(as_int16(y) + (as_int16(shifted) << 23));
  return select(scaled, (float16)0.0f, x < -126.0f);
}

static inline float largest(float16 x) {
  const float8 a = max(x.lo, x.hi);
  const float4 b = max(a.lo, a.hi);
  return max(max(b.x, b.y), max(b.z, b.w));
}

static inline float sum_of(float16 x) {
  const float8 a = x.lo + x.hi;
  const float4 b = a.lo + a.hi;
  return (b.x + b.y) + (b.z + b.w);
}

#if !DIRECT
// Keys [units, len, HEAD_DIM] to float32 tiles [units, tiles, HEAD_DIM, TILE], zero past the end; float16 values to float32.
__kernel void pack_keys(__global const stored *key, __global const stored *value, __global float *packed,
                        __global float *values, int len) {
  const int tile = get_global_id(0), unit = get_global_id(1), tiles = get_global_size(0);
  __global float *to = packed + (size_t)(unit * tiles + tile) * HEAD_DIM * TILE;
  for (int j = 0; j < TILE; j++) {
    const int place = tile * TILE + j;
    const size_t from = ((size_t)unit * len + place) * HEAD_DIM;
    for (int d = 0; d < HEAD_DIM; d++) to[d * TILE + j] = place < len ? READ(from + d, key) : 0.0f;
#if HALF
    if (place < len)
      for (int d = 0; d < HEAD_DIM; d++) values[from + d] = READ(from + d, value);
#endif
  }
}
#endif

// Scores of one group against `count` keys of one tile: scores[GROUP][TILE]. Those beyond are not numbers.
#if DIRECT
static inline void score(const float *query, __global const packed *keys, float *scores, int count) {
  for (int j = 0; j < count; j++) {
    float16 sum[GROUP];
    #pragma unroll
    for (int r = 0; r < GROUP; r++) sum[r] = 0.0f;
    #pragma unroll
    for (int c = 0; c < HEAD_DIM / 16; c++) {
      const float16 k = READ_PACKED(j * (HEAD_DIM / 16) + c, keys);
      #pragma unroll
      for (int r = 0; r < GROUP; r++) sum[r] = vload16(c, query + r * HEAD_DIM) * k + sum[r];
    }
    #pragma unroll
    for (int r = 0; r < GROUP; r++) scores[r * TILE + j] = sum_of(sum[r]);
  }
}
#else
static inline void score(const float *query, __global const packed *keys, float *scores, int count) {
  for (int half_tile = 0; half_tile < TILE / 32; half_tile++) {
    float16 sum[GROUP][2];
    #pragma unroll
    for (int r = 0; r < GROUP; r++) sum[r][0] = sum[r][1] = 0.0f;
    #pragma unroll 4
    for (int d = 0; d < HEAD_DIM; d++) {
      const float16 k0 = vload16(0, keys + d * TILE + half_tile * 32), k1 = vload16(1, keys + d * TILE + half_tile * 32);
      #pragma unroll
      for (int r = 0; r < GROUP; r++) {
        const float x = query[r * HEAD_DIM + d];
        sum[r][0] = x * k0 + sum[r][0];
        sum[r][1] = x * k1 + sum[r][1];
      }
    }
    #pragma unroll
    for (int r = 0; r < GROUP; r++) {
      vstore16(sum[r][0], half_tile * 2, scores + r * TILE);
      vstore16(sum[r][1], half_tile * 2 + 1, scores + r * TILE);
    }
  }
}
#endif

// out[GROUP][HEAD_DIM] += weights[GROUP][TILE] @ values[count][HEAD_DIM].
static inline void accumulate(float *out, const float *weights, __global const packed *values, int count) {
  for (int c = 0; c < HEAD_DIM / 32; c++) {
    float16 sum[GROUP][2];
    #pragma unroll
    for (int r = 0; r < GROUP; r++) {
      sum[r][0] = vload16(2 * c, out + r * HEAD_DIM);
      sum[r][1] = vload16(2 * c + 1, out + r * HEAD_DIM);
    }
    #pragma unroll 4
    for (int j = 0; j < count; j++) {
      const int at = j * (HEAD_DIM / 16) + 2 * c;
      const float16 v0 = READ_PACKED(at, values), v1 = READ_PACKED(at + 1, values);
      #pragma unroll
      for (int r = 0; r < GROUP; r++) {
        const float x = weights[r * TILE + j];
        sum[r][0] = x * v0 + sum[r][0];
        sum[r][1] = x * v1 + sum[r][1];
      }
    }
    #pragma unroll
    for (int r = 0; r < GROUP; r++) {
      vstore16(sum[r][0], 2 * c, out + r * HEAD_DIM);
      vstore16(sum[r][1], 2 * c + 1, out + r * HEAD_DIM);
    }
  }
}

// Softcap, mask and hidden keys of one row of scores; keys first to last (excluded) of the row are visible.
static inline void bend(float *scores, const Problem p, __global const float *mask, int key, int first, int last) {
  const int16 places = (int16)(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) + key;
  for (int c = 0; c < VECTORS; c++) {
    float16 s = vload16(c, scores);
    if (p.softcap > 0) s = tanh(s / p.softcap) * p.softcap;
    if (p.has_mask) {
      if (key + c * 16 + 16 <= p.len_k) s += vload16(0, mask + key + c * 16);
      else
        for (int e = 0; e < 16; e++)
          if (key + c * 16 + e < p.len_k) ((float *)&s)[e] += mask[key + c * 16 + e];
    }
    const int16 here = places + c * 16;
    s = select(s, (float16)(-INFINITY), here < first || here >= last);
    vstore16(s, c, scores);
  }
}

__kernel void forward(__global const stored *query, __global const packed *keys, __global const packed *values,
                      __global const float *mask, __global const int *range_index, __global const int *ranges,
                      __global stored *out, __global float *lse, __global float *part, const Problem p) {
  const int unit = get_global_id(1), split = get_global_id(2), row0 = get_global_id(0) * ROWS;
  const int tiles = (p.len_k + TILE - 1) / TILE, key_unit = unit * p.heads_per_unit / p.group;
  const int rows = min(ROWS, p.unit_rows - row0);
  float q[ROWS * HEAD_DIM], o[ROWS * HEAD_DIM], top[ROWS], total[ROWS];
  int first[ROWS], last[ROWS];
  int low = p.len_k, high = 0;
  for (int r = 0; r < ROWS; r++) {
    const int row = row0 + min(r, rows - 1), i = row % p.len_q;
    const size_t from = ((size_t)unit * p.unit_rows + row) * (HEAD_DIM / 16);
    for (int c = 0; c < HEAD_DIM / 16; c++) {
      vstore16(READ16(from + c, query) * p.scale, c, q + r * HEAD_DIM);
      vstore16((float16)0.0f, c, o + r * HEAD_DIM);
    }
    top[r] = -INFINITY;
    total[r] = 0.0f;
    first[r] = max(i + p.lower, 0);
    last[r] = min(i + p.upper + 1, p.len_k);
    low = min(low, first[r]);
    high = max(high, last[r]);
  }
  low = max(low, split * p.chunk);
  high = min(high, (split + 1) * p.chunk);
  const int place = p.has_plan ? ranges_of(p, unit, row0) : 0;
  const int begin = p.has_plan ? range_index[place] : 0, end = p.has_plan ? range_index[place + 1] : 1;
  for (int n = begin; n < end; n++) {
    const int from = p.has_plan ? max(ranges[2 * n], low) : low, to = p.has_plan ? min(ranges[2 * n + 1], high) : high;
    for (int key = from / TILE * TILE; key < to; key += TILE) {
      const size_t at = ((size_t)key_unit * p.len_k + key) * HEAD_DIM;
      __global const packed *k = DIRECT ? keys + at : keys + ((size_t)key_unit * tiles + key / TILE) * HEAD_DIM * TILE;
      __global const packed *v = values + at;
      const int count = min(TILE, p.len_k - key);
      for (int g = 0; g < ROWS; g += GROUP) {
        if (g >= rows) break;
        float s[GROUP * TILE];
        score(q + g * HEAD_DIM, k, s, count);
        for (int r = 0; r < GROUP; r++) {
          float *x = s + r * TILE;
          const int start = max(from, first[g + r]), stop = min(to, last[g + r]);
          if (p.softcap > 0 || p.has_mask || start > key || stop < key + TILE)
            bend(x, p, p.has_mask ? mask_row(mask, p, unit, min(row0 + g + r, p.unit_rows - 1)) : mask, key, start, stop);
          float16 highest = vload16(0, x);
          #pragma unroll
          for (int c = 1; c < VECTORS; c++) highest = max(highest, vload16(c, x));
          const float before = top[g + r], now = max(before, largest(highest));
          const float anchor = now == -INFINITY ? 0.0f : now;  // no key yet: weights of exp2(-inf) = 0, not of nan
          float16 sum = 0.0f;
          #pragma unroll
          for (int c = 0; c < VECTORS; c++) {
            const float16 weight = exp2_to_zero((vload16(c, x) - anchor) * LOG2E);
            sum += weight;
            vstore16(weight, c, x);
          }
          top[g + r] = now;
          if (now > before) {
            const float factor = exp2((before - anchor) * LOG2E);
            total[g + r] *= factor;
            for (int c = 0; c < HEAD_DIM / 16; c++)
              vstore16(vload16(c, o + (g + r) * HEAD_DIM) * factor, c, o + (g + r) * HEAD_DIM);
          }
          total[g + r] += sum_of(sum);
        }
        accumulate(o + g * HEAD_DIM, s, v, count);
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    const size_t row = (size_t)unit * p.unit_rows + row0 + r, units = get_global_size(1);
    const float factor = total[r] > 0 ? 1.0f / total[r] : 0.0f;
    write_sum(lse, p, split * units * p.unit_rows + row, top[r], total[r]);
    for (int c = 0; c < HEAD_DIM / 16; c++) {
      const float16 x = vload16(c, o + r * HEAD_DIM) * factor;
      if (p.splits > 1) vstore16(x, (split * units * p.unit_rows + row) * (HEAD_DIM / 16) + c, part);
      else WRITE16(x, row * (HEAD_DIM / 16) + c, out);
    }
  }
}
