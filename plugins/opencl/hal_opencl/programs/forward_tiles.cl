// Attention for processors with many small cores and local memory. A work group of THREADS takes ROWS query rows against
// tiles of TILE keys; a thread holds 4 rows x COLUMNS keys of the scores and 4 rows x HEAD_DIM / ACROSS of the output in
// registers. Rows of local memory are padded by 4 floats, so that neighbours read from different banks.
// Build options beside problem.h's: ROWS, TILE, THREADS.

#define ACROSS (THREADS * 4 / ROWS)  // threads that share a row
#define COLUMNS (TILE / ACROSS)
#define PITCH (HEAD_DIM + 4)
#define WEIGHTS (TILE + 4)
#define QUADS (HEAD_DIM / 4)
#define OWN ((QUADS + ACROSS - 1) / ACROSS)  // float4 of the output per thread and row

static inline void load_rows(__local float *to, __global const stored *from, int count, int most, float factor) {
  for (int n = get_local_id(0); n < most * QUADS; n += THREADS) {
    const int row = n / QUADS, quad = n % QUADS;
#if HALF
    const float4 x = row < count ? vload_half4((size_t)row * QUADS + quad, from) : (float4)0.0f;
#else
    const float4 x = row < count ? vload4((size_t)row * QUADS + quad, from) : (float4)0.0f;
#endif
    vstore4(x * factor, 0, to + row * PITCH + quad * 4);
  }
}

__kernel __attribute__((reqd_work_group_size(THREADS, 1, 1)))
void forward(__global const stored *query, __global const stored *keys, __global const stored *values,
             __global const float *mask, __global const int *range_index, __global const int *ranges,
             __global stored *out, __global float *lse, __global float *part, const Problem p) {
  __local float q[ROWS * PITCH], kv[TILE * PITCH], weights[ROWS * WEIGHTS], shared_rows[ROWS * ACROSS];
  const int unit = get_group_id(1), split = get_group_id(2), row0 = get_group_id(0) * ROWS;
  const int across = get_local_id(0) % ACROSS, down = get_local_id(0) / ACROSS * 4;
  const int rows = min(ROWS, p.unit_rows - row0), key_unit = unit * p.heads_per_unit / p.group;
  load_rows(q, query + ((size_t)unit * p.unit_rows + row0) * HEAD_DIM, rows, ROWS, p.scale);
  float4 o[4][OWN];
  float top[4], total[4];
  int first[4], last[4];
  for (int r = 0; r < 4; r++) {
    const int i = min(row0 + down + r, p.unit_rows - 1) % p.len_q;
    for (int n = 0; n < OWN; n++) o[r][n] = 0.0f;
    top[r] = -INFINITY;
    total[r] = 0.0f;
    first[r] = max(i + p.lower, 0);
    last[r] = min(i + p.upper + 1, p.len_k);
  }
  int low = p.len_k, high = 0;
  if (row0 / p.len_q == (row0 + rows - 1) / p.len_q) {  // one head: its first and last row bound the keys
    low = max(row0 % p.len_q + p.lower, 0);
    high = min((row0 + rows - 1) % p.len_q + p.upper + 1, p.len_k);
  } else {
    low = max(p.lower, 0);
    high = min(p.len_q - 1 + p.upper + 1, p.len_k);
  }
  low = max(low, split * p.chunk);
  high = min(high, (split + 1) * p.chunk);
  const int place = p.has_plan ? ranges_of(p, unit, row0) : 0;
  const int begin = p.has_plan ? range_index[place] : 0, end = p.has_plan ? range_index[place + 1] : 1;
  for (int n = begin; n < end; n++) {
    const int from = p.has_plan ? max(ranges[2 * n], low) : low, to = p.has_plan ? min(ranges[2 * n + 1], high) : high;
    for (int key = from / TILE * TILE; key < to; key += TILE) {
      const size_t at = ((size_t)key_unit * p.len_k + key) * HEAD_DIM;
      barrier(CLK_LOCAL_MEM_FENCE);
      load_rows(kv, keys + at, p.len_k - key, TILE, 1.0f);
      barrier(CLK_LOCAL_MEM_FENCE);
      float s[4][COLUMNS];
      #pragma unroll
      for (int r = 0; r < 4; r++)
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) s[r][c] = 0.0f;
      for (int d = 0; d < QUADS; d++) {
        float4 x[4];
        #pragma unroll
        for (int r = 0; r < 4; r++) x[r] = vload4(d, q + (down + r) * PITCH);
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const float4 y = vload4(d, kv + (c * ACROSS + across) * PITCH);
          #pragma unroll
          for (int r = 0; r < 4; r++)
            s[r][c] = mad(x[r].x, y.x, mad(x[r].y, y.y, mad(x[r].z, y.z, mad(x[r].w, y.w, s[r][c]))));
        }
      }
      #pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = min(row0 + down + r, p.unit_rows - 1);
        const int start = max(from, first[r]), stop = min(to, last[r]);
        float highest = -INFINITY;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const int j = key + c * ACROSS + across;
          float x = s[r][c];
          if (p.softcap > 0) x = tanh(x / p.softcap) * (p.softcap * LOG2E);
          if (j < start || j >= stop) x = -INFINITY;
          else if (p.has_mask) x += mask_row(mask, p, unit, row)[j] * LOG2E;
          s[r][c] = x;
          highest = max(highest, x);
        }
        shared_rows[(down + r) * ACROSS + across] = highest;
      }
      barrier(CLK_LOCAL_MEM_FENCE);
      load_rows(kv, values + at, p.len_k - key, TILE, 1.0f);
      #pragma unroll
      for (int r = 0; r < 4; r++) {
        float now = top[r];
        for (int a = 0; a < ACROSS; a++) now = max(now, shared_rows[(down + r) * ACROSS + a]);
        const float anchor = now == -INFINITY ? 0.0f : now;
        const float factor = exp2(top[r] - anchor);
        top[r] = now;
        total[r] *= factor;
        #pragma unroll
        for (int m = 0; m < OWN; m++) o[r][m] *= factor;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const float weight = exp2(s[r][c] - anchor);
          total[r] += weight;  // of this thread's keys; the row's are added up at the end
          weights[(down + r) * WEIGHTS + c * ACROSS + across] = weight;
        }
      }
      barrier(CLK_LOCAL_MEM_FENCE);
      for (int j = 0; j < TILE; j += 4) {
        float4 w[4];
        #pragma unroll
        for (int r = 0; r < 4; r++) w[r] = vload4(0, weights + (down + r) * WEIGHTS + j);
        #pragma unroll
        for (int m = 0; m < OWN; m++) {
          const int quad = min(m * ACROSS + across, QUADS - 1);
          const float4 v0 = vload4(quad, kv + j * PITCH), v1 = vload4(quad, kv + (j + 1) * PITCH);
          const float4 v2 = vload4(quad, kv + (j + 2) * PITCH), v3 = vload4(quad, kv + (j + 3) * PITCH);
          #pragma unroll
          for (int r = 0; r < 4; r++)
            o[r][m] = mad((float4)w[r].x, v0, mad((float4)w[r].y, v1, mad((float4)w[r].z, v2, mad((float4)w[r].w, v3, o[r][m]))));
        }
      }
    }
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  for (int r = 0; r < 4; r++) shared_rows[(down + r) * ACROSS + across] = total[r];
  barrier(CLK_LOCAL_MEM_FENCE);
  for (int r = 0; r < 4; r++) {
    if (down + r >= rows) break;
    float sum = 0.0f;
    for (int a = 0; a < ACROSS; a++) sum += shared_rows[(down + r) * ACROSS + a];
    const size_t row = (size_t)unit * p.unit_rows + row0 + down + r, all = (size_t)get_num_groups(1) * p.unit_rows;
    const float factor = sum > 0 ? 1.0f / sum : 0.0f;
    if (across == 0) lse[split * all + row] = sum > 0 ? (top[r] + log2(sum)) * LN2 : -INFINITY;
    for (int m = 0; m < OWN; m++) {
      const int quad = m * ACROSS + across;
      if (quad >= QUADS) break;
      if (p.splits > 1) vstore4(o[r][m] * factor, (split * all + row) * QUADS + quad, part);
#if HALF
      else vstore_half4_rte(o[r][m] * factor, row * QUADS + quad, out);
#else
      else vstore4(o[r][m] * factor, row * QUADS + quad, out);
#endif
    }
  }
}
