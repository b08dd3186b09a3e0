// Attention for processors with many small cores and local memory. A work group of THREADS takes ROWS query rows against
// tiles of TILE keys; a thread holds HEIGHT rows x COLUMNS keys of the scores and HEIGHT rows x 4 OWN of the output in
// registers. Keys come in slices of SLICE head elements, values in runs of RUN keys, through the same local memory. Groups
// of 4 floats are swizzled within their row, so that neighbours read from different banks.
// Build options beside problem.h's: ROWS, TILE, THREADS, HEIGHT, SLICE, RUN, SLICED (1: the query comes in slices too).

#define ACROSS (THREADS * HEIGHT / ROWS)  // threads that share a row
#define COLUMNS (TILE / ACROSS)
#define QUADS (HEAD_DIM / 4)
#define OWN ((QUADS + ACROSS - 1) / ACROSS)  // float4 of the output per thread and row
#define SPACE (TILE * SLICE > RUN * HEAD_DIM ? TILE * SLICE : RUN * HEAD_DIM)
#define HELD (SLICED ? SLICE : HEAD_DIM)  // head elements of the query in local memory

// Rows that are read together with one address in each HEIGHT rows (query, weights), or as neighbours (keys).
#define BY_HEIGHT(row) ((row) / HEIGHT % 4 * 2)
#define BY_ROW(row) ((row) % 8)

#if HALF
#define READ4(i, p) vload_half4(i, p)
#define WRITE4(x, i, p) vstore_half4_rte(x, i, p)
#else
#define READ4(i, p) vload4(i, p)
#define WRITE4(x, i, p) vstore4(x, i, p)
#endif

// Rows of `width` elements, of which the first `have` exist, from rows of HEAD_DIM; swizzled by neighbour or by height.
static inline void load_rows(__local float *to, __global const stored *from, int have, int rows, int width, float factor,
                             bool by_height) {
  const int quads = width / 4;
  for (int n = get_local_id(0); n < rows * quads; n += THREADS) {
    const int row = n / quads, quad = n % quads;
    const float4 x = row < have ? READ4((size_t)row * QUADS + quad, from) : (float4)0.0f;
    vstore4(x * factor, row * quads + (quad ^ (by_height ? BY_HEIGHT(row) : BY_ROW(row))), to);
  }
}

__kernel __attribute__((reqd_work_group_size(THREADS, 1, 1)))
void forward(__global const stored *restrict query, __global const stored *restrict keys,
             __global const stored *restrict values, __global const float *restrict mask,
             __global const int *restrict range_index, __global const int *restrict ranges, __global stored *restrict out,
             __global float *restrict lse, __global float *restrict part, const Problem p) {
  __local float q[ROWS * HELD], kv[SPACE], weights[ROWS * TILE];
  const int unit = get_group_id(1), split = get_group_id(2), row0 = get_group_id(0) * ROWS;
  const int across = get_local_id(0) % ACROSS, down = get_local_id(0) / ACROSS * HEIGHT;
  const int rows = min(ROWS, p.unit_rows - row0), key_unit = unit * p.heads_per_unit / p.group;
  const int turn = BY_HEIGHT(down);  // of all of this thread's rows
  query += ((size_t)unit * p.unit_rows + row0) * HEAD_DIM;
  if (!SLICED) load_rows(q, query, rows, ROWS, HEAD_DIM, p.scale, true);
  float4 o[HEIGHT][OWN];
  float top[HEIGHT], total[HEIGHT];
  #pragma unroll
  for (int r = 0; r < HEIGHT; r++) {
    #pragma unroll
    for (int n = 0; n < OWN; n++) o[r][n] = 0.0f;
    top[r] = -INFINITY;
    total[r] = 0.0f;
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
      float s[HEIGHT][COLUMNS];
      #pragma unroll
      for (int r = 0; r < HEIGHT; r++)
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) s[r][c] = 0.0f;
      for (int slice = 0; slice < HEAD_DIM; slice += SLICE) {
        barrier(CLK_LOCAL_MEM_FENCE);
        load_rows(kv, keys + at + slice, p.len_k - key, TILE, SLICE, 1.0f, false);
        if (SLICED) load_rows(q, query + slice, rows, ROWS, SLICE, p.scale, true);
        barrier(CLK_LOCAL_MEM_FENCE);
        const int skip = SLICED ? 0 : slice / 4;
        #pragma unroll 2
        for (int d = 0; d < SLICE / 4; d++) {
          float4 x[HEIGHT];
          #pragma unroll
          for (int r = 0; r < HEIGHT; r++) x[r] = vload4((down + r) * (HELD / 4) + ((skip + d) ^ turn), q);
          #pragma unroll
          for (int c = 0; c < COLUMNS; c++) {
            const int row = c * ACROSS + across;
            const float4 y = vload4(row * (SLICE / 4) + (d ^ BY_ROW(row)), kv);
            #pragma unroll
            for (int r = 0; r < HEIGHT; r++)
              s[r][c] = mad(x[r].x, y.x, mad(x[r].y, y.y, mad(x[r].z, y.z, mad(x[r].w, y.w, s[r][c]))));
          }
        }
      }
      #pragma unroll
      for (int r = 0; r < HEIGHT; r++) {
        const int row = min(row0 + down + r, p.unit_rows - 1), i = row % p.len_q;
        const int start = max(from, i + p.lower), stop = min(to, min(i + p.upper + 1, p.len_k));
        if (p.softcap > 0 || p.has_mask || start > key || stop < key + TILE) {
          __global const float *mine = p.has_mask ? mask_row(mask, p, unit, row) : mask;
          #pragma unroll
          for (int c = 0; c < COLUMNS; c++) {
            const int j = key + c * ACROSS + across;
            float x = s[r][c];
            if (p.softcap > 0) x = tanh(x / p.softcap) * p.softcap;
            if (j < start || j >= stop) x = -INFINITY;
            else if (p.has_mask) x += mine[j];
            s[r][c] = x;
          }
        }
        float highest = s[r][0];
        #pragma unroll
        for (int c = 1; c < COLUMNS; c++) highest = max(highest, s[r][c]);
        weights[(down + r) * ACROSS + across] = highest;  // lent for the rows' maxima
      }
      barrier(CLK_LOCAL_MEM_FENCE);
      load_rows(kv, values + at, p.len_k - key, RUN, HEAD_DIM, 1.0f, false);
      #pragma unroll
      for (int r = 0; r < HEIGHT; r++) {
        float now = top[r];
        #pragma unroll
        for (int a = 0; a < ACROSS; a++) now = max(now, weights[(down + r) * ACROSS + a]);
        const float anchor = now == -INFINITY ? 0.0f : now;
        const float factor = native_exp2((top[r] - anchor) * LOG2E);
        top[r] = now;
        total[r] *= factor;
        #pragma unroll
        for (int m = 0; m < OWN; m++) o[r][m] *= factor;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          s[r][c] = native_exp2((s[r][c] - anchor) * LOG2E);
          total[r] += s[r][c];  // of this thread's keys; the row's are added up at the end
        }
      }
      barrier(CLK_LOCAL_MEM_FENCE);
      #pragma unroll
      for (int r = 0; r < HEIGHT; r++)
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const int column = c * ACROSS + across;
          weights[(down + r) * TILE + (column / 4 ^ turn) * 4 + column % 4] = s[r][c];
        }
      for (int run = 0; run < TILE; run += RUN) {
        if (run) {
          barrier(CLK_LOCAL_MEM_FENCE);
          load_rows(kv, values + at + run * HEAD_DIM, p.len_k - key - run, RUN, HEAD_DIM, 1.0f, false);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int j = 0; j < RUN; j += 4) {
          float4 w[HEIGHT];
          #pragma unroll
          for (int r = 0; r < HEIGHT; r++) w[r] = vload4((down + r) * (TILE / 4) + ((run + j) / 4 ^ turn), weights);
          #pragma unroll
          for (int m = 0; m < OWN; m++) {
            const int quad = min(m * ACROSS + across, QUADS - 1);
            const float4 v0 = vload4(j * QUADS + (quad ^ BY_ROW(j)), kv);
            const float4 v1 = vload4((j + 1) * QUADS + (quad ^ BY_ROW(j + 1)), kv);
            const float4 v2 = vload4((j + 2) * QUADS + (quad ^ BY_ROW(j + 2)), kv);
            const float4 v3 = vload4((j + 3) * QUADS + (quad ^ BY_ROW(j + 3)), kv);
            #pragma unroll
            for (int r = 0; r < HEIGHT; r++)
              o[r][m] = mad((float4)w[r].x, v0, mad((float4)w[r].y, v1, mad((float4)w[r].z, v2, mad((float4)w[r].w, v3, o[r][m]))));
          }
        }
      }
    }
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  #pragma unroll
  for (int r = 0; r < HEIGHT; r++) weights[(down + r) * ACROSS + across] = total[r];
  barrier(CLK_LOCAL_MEM_FENCE);
  #pragma unroll
  for (int r = 0; r < HEIGHT; r++) {
    if (down + r >= rows) break;
    float sum = 0.0f;
    for (int a = 0; a < ACROSS; a++) sum += weights[(down + r) * ACROSS + a];
    const size_t row = (size_t)unit * p.unit_rows + row0 + down + r, all = (size_t)get_num_groups(1) * p.unit_rows;
    const float factor = sum > 0 ? 1.0f / sum : 0.0f;
    if (across == 0) write_sum(lse, p, split * all + row, top[r], sum);
    #pragma unroll
    for (int m = 0; m < OWN; m++) {
      const int quad = m * ACROSS + across;
      if (quad >= QUADS) break;
      if (p.splits > 1) vstore4(o[r][m] * factor, (split * all + row) * QUADS + quad, part);
      else WRITE4(o[r][m] * factor, row * QUADS + quad, out);
    }
  }
}
