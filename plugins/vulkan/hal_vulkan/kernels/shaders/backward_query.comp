#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"
#include "gradient.glsl"

// The query's gradient, a work group per query row and so on in turn: scores with one key per invocation, then sums with OWN float4 of the
// row per invocation. For the keys' gradients it writes three numbers per row: delta = sum(grad_out * out) - grad_lse, and the norm.

layout(binding = 8) readonly buffer Out { STORED result[]; };
layout(binding = 9) readonly buffer GradLse { float grad_lse[]; };
layout(binding = 10) writeonly buffer GradQuery { STORED grad_query[]; };
layout(binding = 11) writeonly buffer Delta { float delta[]; };

#define LOWEST_EXACT_LSE -256.0  // below it a float32 log-sum-exp says a row's weights too coarsely
#define EPSILON 1.1920929e-7

// (a, b) with a + b the log-sum-exp of a row. Where every key has a very low mask value, a float32 log-sum-exp has lost the
// sum beside that value: the maximum and the sum are computed again, unless `whole` is about more keys than these.
vec2 norm_of(int unit, int i, int row, int key_unit) {
  const float whole = lse[row];
  if (p.has_mask == 0 || whole > LOWEST_EXACT_LSE || whole == -INFINITE) return vec2(whole, 0.0);
  const int local = int(gl_LocalInvocationID.x), first = max(i + p.lower, 0), last = min(i + p.upper + 1, p.len_k);
  const int masked = p.has_mask != 0 ? mask_row(unit, i) : 0, place = p.has_plan != 0 ? ranges_of(unit, i) : 0;
  const int begin = p.has_plan != 0 ? range_index[place] : 0, end = p.has_plan != 0 ? range_index[place + 1] : 1;
  float top = LOWEST, total = 0.0, slope;
  for (int n = begin; n < end; n++) {
    const int from = p.has_plan != 0 ? max(first, ranges[n].x) : first, to = p.has_plan != 0 ? min(last, ranges[n].y) : last;
    for (int j = from + local; j < to; j += THREADS) {
      const float s = score_of(row, key_unit * p.len_k + j, masked + j, slope);
      if (s == -INFINITE) continue;
      const float now = max(top, s);
      total = total * exp(top - now) + exp(s - now);
      top = now;
    }
  }
  weights[local] = top;
  changes[local] = total;
  barrier();
  top = LOWEST;
  for (int n = 0; n < THREADS; n++) top = max(top, weights[n]);
  total = 0.0;
  for (int n = 0; n < THREADS; n++) total += changes[n] * exp(weights[n] - top);
  barrier();
  const float rest = log(total);
  return abs(top + rest - whole) <= -4.0 * EPSILON * whole ? vec2(top, rest) : vec2(whole, 0.0);
}

void gradient(int unit, int i) {
  const int local = int(gl_LocalInvocationID.x);
  const int row = unit * p.unit_rows + i, key_unit = unit * p.heads_per_unit / p.group;
  vec4 product = vec4(0.0);
  for (int d = 0; d < QUADS; d++) product = fma(wide(grad_out[row * QUADS + d]), wide(result[row * QUADS + d]), product);
  const float offset = product.x + product.y + product.z + product.w - grad_lse[row];
  const vec2 norm = norm_of(unit, i, row, key_unit);
  if (local == 0) {
    delta[3 * row] = offset;
    delta[3 * row + 1] = norm.x;
    delta[3 * row + 2] = norm.y;
  }
  vec4 sum[OWN];
  [[unroll]] for (int m = 0; m < OWN; m++) sum[m] = vec4(0.0);
  const int first = max(i + p.lower, 0), last = min(i + p.upper + 1, p.len_k);
  const int masked = p.has_mask != 0 ? mask_row(unit, i) : 0, place = p.has_plan != 0 ? ranges_of(unit, i) : 0;
  const int begin = p.has_plan != 0 ? range_index[place] : 0, end = p.has_plan != 0 ? range_index[place + 1] : 1;
  for (int n = begin; n < end; n++) {
    int from = first, to = last;
    if (p.has_plan != 0) {
      from = max(from, ranges[n].x);
      to = min(to, ranges[n].y);
    }
    for (int base = from; base < to; base += THREADS) {
      const int j = min(base + local, to - 1);
      float slope;
      const float weight = weight_of(row, key_unit * p.len_k + j, masked + j, norm, slope);
      const float change = weight * (grad_of_weight(row, key_unit * p.len_k + j) - offset) * slope;
      changes[local] = base + local < to && weight > 0.0 ? change : 0.0;
      barrier();
      for (int e = 0; e < min(THREADS, to - base); e++) {
        const int from_key = (key_unit * p.len_k + base + e) * QUADS;
        [[unroll]] for (int m = 0; m < OWN; m++)
          sum[m] = fma(vec4(changes[e]), wide(keys[from_key + min(m * THREADS + local, QUADS - 1)]), sum[m]);
      }
      barrier();
    }
  }
  [[unroll]] for (int m = 0; m < OWN; m++)
    if (m * THREADS + local < QUADS) grad_query[row * QUADS + m * THREADS + local] = narrow(sum[m]);
}

void main() {
  for (int i = int(gl_WorkGroupID.x); i < p.len_q; i += int(gl_NumWorkGroups.x)) gradient(int(gl_WorkGroupID.y), i);
}
