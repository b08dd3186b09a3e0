// Gradients from a given (out, log-sum-exp): one work item per query row, then one per key row. No sums cross work items,
// so equal calls give equal bits.

#define LOWEST_EXACT_LSE -256.0f  // below it a float32 log-sum-exp says a row's weights too coarsely

// The score of a pair before softmax (natural units) and the factor that softcap puts on its gradient.
static inline float2 score_of(__global const stored *query, __global const stored *key, const Problem p) {
  float16 sum = 0.0f;
  for (int c = 0; c < HEAD_DIM / 16; c++) sum = mad(READ16(c, query), READ16(c, key), sum);
  const float8 a = sum.lo + sum.hi;
  const float4 b = a.lo + a.hi;
  const float s = ((b.x + b.y) + (b.z + b.w)) * p.scale;
  if (p.softcap <= 0) return (float2)(s, 1.0f);
  const float t = tanh(s / p.softcap);
  return (float2)(p.softcap * t, 1.0f - t * t);
}

static inline float dot_of(__global const stored *a, __global const stored *b) {
  float16 sum = 0.0f;
  for (int c = 0; c < HEAD_DIM / 16; c++) sum = mad(READ16(c, a), READ16(c, b), sum);
  const float8 x = sum.lo + sum.hi;
  const float4 y = x.lo + x.hi;
  return (y.x + y.y) + (y.z + y.w);
}

// (a, b) with a + b the log-sum-exp of a row. Where every key has a very low mask value, a float32 log-sum-exp has lost the
// sum beside that value: the maximum and the sum are computed again, unless `whole` is about more keys than these.
static float2 norm_of(float whole, __global const stored *q, __global const stored *key, __global const float *mask,
                      __global const int *range_index, __global const int *ranges, int unit, int row, size_t key_unit,
                      const Problem p) {
  if (!p.has_mask || whole > LOWEST_EXACT_LSE || whole == -INFINITY) return (float2)(whole, 0.0f);
  const int i = row % p.len_q, first = max(i + p.lower, 0), last = min(i + p.upper + 1, p.len_k);
  const int place = p.has_plan ? ranges_of(p, unit, row) : 0;
  const int begin = p.has_plan ? range_index[place] : 0, end = p.has_plan ? range_index[place + 1] : 1;
  float top = -FLT_MAX, total = 0.0f;
  for (int n = begin; n < end; n++) {
    const int from = p.has_plan ? max(ranges[2 * n], first) : first, to = p.has_plan ? min(ranges[2 * n + 1], last) : last;
    for (int j = from; j < to; j++) {
      const float s = score_of(q, key + (key_unit * p.len_k + j) * HEAD_DIM, p).x
                    + (p.has_mask ? mask_row(mask, p, unit, row)[j] : 0.0f);
      if (s == -INFINITY) continue;
      const float now = max(top, s);
      total = total * exp(top - now) + exp(s - now);
      top = now;
    }
  }
  const float rest = log(total);
  return fabs(top + rest - whole) <= -4 * FLT_EPSILON * whole ? (float2)(top, rest) : (float2)(whole, 0.0f);
}

// grad_query, and for each row three numbers that the keys' gradients need: delta = sum(grad_out * out) - grad_lse, and the norm.
__kernel void backward_query(__global const stored *query, __global const stored *key, __global const stored *value,
                             __global const float *mask, __global const int *range_index, __global const int *ranges,
                             __global const stored *out, __global const float *lse, __global const stored *grad_out,
                             __global const float *grad_lse, __global stored *grad_query, __global float *delta, const Problem p) {
  const int row = get_global_id(0), unit = get_global_id(1), i = row % p.len_q;
  const size_t at = (size_t)unit * p.unit_rows + row, key_unit = unit * p.heads_per_unit / p.group;
  __global const stored *q = query + at * HEAD_DIM, *g = grad_out + at * HEAD_DIM;
  const float whole = lse[at];
  const float offset = dot_of(g, out + at * HEAD_DIM) - grad_lse[at];
  const float2 norm = norm_of(whole, q, key, mask, range_index, ranges, unit, row, key_unit, p);
  vstore3((float3)(offset, norm), at, delta);
  float16 sum[HEAD_DIM / 16];
  for (int c = 0; c < HEAD_DIM / 16; c++) sum[c] = 0.0f;
  if (whole > -INFINITY) {
    const int first = max(i + p.lower, 0), last = min(i + p.upper + 1, p.len_k);
    const int place = p.has_plan ? ranges_of(p, unit, row) : 0;
    const int begin = p.has_plan ? range_index[place] : 0, end = p.has_plan ? range_index[place + 1] : 1;
    for (int n = begin; n < end; n++) {
      const int from = p.has_plan ? max(ranges[2 * n], first) : first, to = p.has_plan ? min(ranges[2 * n + 1], last) : last;
      for (int j = from; j < to; j++) {
        __global const stored *k = key + (key_unit * p.len_k + j) * HEAD_DIM, *v = value + (key_unit * p.len_k + j) * HEAD_DIM;
        const float2 s = score_of(q, k, p);
        const float masked = s.x + (p.has_mask ? mask_row(mask, p, unit, row)[j] : 0.0f);
        const float weight = exp((masked - norm.x) - norm.y);
        const float change = weight * (dot_of(g, v) - offset) * s.y * p.scale;
        for (int c = 0; c < HEAD_DIM / 16; c++) sum[c] = mad((float16)change, READ16(c, k), sum[c]);
      }
    }
  }
  for (int c = 0; c < HEAD_DIM / 16; c++) WRITE16(sum[c], at * (HEAD_DIM / 16) + c, grad_query);
}

// grad_key and grad_value of one key row: over all query heads of its group and all rows that read it.
__kernel void backward_key(__global const stored *query, __global const stored *key, __global const stored *value,
                           __global const float *mask, __global const int *range_index, __global const int *ranges,
                           __global const stored *grad_out, __global const float *delta,
                           __global stored *grad_key, __global stored *grad_value, const Problem p) {
  const int j = get_global_id(0), key_unit = get_global_id(1);
  const size_t at = (size_t)key_unit * p.len_k + j;
  __global const stored *k = key + at * HEAD_DIM, *v = value + at * HEAD_DIM;
  float16 sum_k[HEAD_DIM / 16], sum_v[HEAD_DIM / 16];
  for (int c = 0; c < HEAD_DIM / 16; c++) sum_k[c] = sum_v[c] = 0.0f;
  for (int h = 0; h < p.group; h++) {
    const int unit = key_unit * p.group + h;  // a unit is one query head here
    int visible = 1, block = -1;
    for (int i = max(j - p.upper, 0); i < min(j - p.lower + 1, p.len_q); i++) {
      const size_t row = (size_t)unit * p.unit_rows + i;
      if (p.has_plan && i / p.block_q != block) {
        block = i / p.block_q;
        visible = 0;
        const int place = ranges_of(p, unit, i);
        for (int n = range_index[place]; n < range_index[place + 1]; n++) visible |= j >= ranges[2 * n] && j < ranges[2 * n + 1];
      }
      const float3 known = vload3(row, delta);
      if (!visible || known.y == -INFINITY) continue;
      __global const stored *q = query + row * HEAD_DIM, *g = grad_out + row * HEAD_DIM;
      const float2 s = score_of(q, k, p);
      const float masked = s.x + (p.has_mask ? mask_row(mask, p, unit, i)[j] : 0.0f);
      const float weight = exp((masked - known.y) - known.z);
      const float change = weight * (dot_of(g, v) - known.x) * s.y * p.scale;
      for (int c = 0; c < HEAD_DIM / 16; c++) {
        sum_k[c] = mad((float16)change, READ16(c, q), sum_k[c]);
        sum_v[c] = mad((float16)weight, READ16(c, g), sum_v[c]);
      }
    }
  }
  for (int c = 0; c < HEAD_DIM / 16; c++) {
    WRITE16(sum_k[c], at * (HEAD_DIM / 16) + c, grad_key);
    WRITE16(sum_v[c], at * (HEAD_DIM / 16) + c, grad_value);
  }
}
