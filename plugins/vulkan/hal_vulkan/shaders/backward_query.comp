#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"
#include "gradient.glsl"

// The query's gradient, a work group per query row and so on in turn: scores with one key per invocation, then sums with OWN float4 of the
// row per invocation. Writes delta = sum(grad_out * out) - grad_lse for the keys' gradients.

layout(binding = 8) readonly buffer Out { STORED result[]; };
layout(binding = 9) readonly buffer GradLse { float grad_lse[]; };
layout(binding = 10) writeonly buffer GradQuery { STORED grad_query[]; };
layout(binding = 11) writeonly buffer Delta { float delta[]; };

void gradient(int unit, int i) {
  const int local = int(gl_LocalInvocationID.x);
  const int row = unit * p.unit_rows + i, key_unit = unit * p.heads_per_unit / p.group;
  vec4 product = vec4(0.0);
  for (int d = 0; d < QUADS; d++) product = fma(wide(grad_out[row * QUADS + d]), wide(result[row * QUADS + d]), product);
  const float offset = product.x + product.y + product.z + product.w - grad_lse[row];
  if (local == 0) delta[row] = offset;
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
      const float weight = weight_of(row, key_unit * p.len_k + j, masked + j, slope);
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
