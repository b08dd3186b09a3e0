#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"
#include "gradient.glsl"

// The key's and the value's gradients, a work group per key row and so on in turn: all query heads of its group, all rows that read it. No
// sums cross work groups, so equal calls give equal bits.

layout(binding = 8) readonly buffer Delta { float delta[]; };  // see backward_query.comp
layout(binding = 9) writeonly buffer GradKey { STORED grad_key[]; };
layout(binding = 10) writeonly buffer GradValue { STORED grad_value[]; };

bool in_plan(int unit, int i, int j) {
  const int place = ranges_of(unit, i);
  bool found = false;
  for (int n = range_index[place]; n < range_index[place + 1]; n++) found = found || (j >= ranges[n].x && j < ranges[n].y);
  return found;
}

void gradients(int key_unit, int j) {
  const int local = int(gl_LocalInvocationID.x);
  const int key = key_unit * p.len_k + j;
  vec4 sum_key[OWN], sum_value[OWN];
  [[unroll]] for (int m = 0; m < OWN; m++) sum_key[m] = sum_value[m] = vec4(0.0);
  const int first = max(j - p.upper, 0), last = min(j - p.lower + 1, p.len_q);
  for (int h = 0; h < p.group; h++) {
    const int unit = key_unit * p.group + h;  // a unit is one query head here
    for (int base = first; base < last; base += THREADS) {
      const int i = min(base + local, last - 1), row = unit * p.unit_rows + i;
      float slope;
      const vec2 norm = vec2(delta[3 * row + 1], delta[3 * row + 2]);
      float weight = weight_of(row, key, p.has_mask != 0 ? mask_row(unit, i) + j : 0, norm, slope);
      if (base + local >= last) weight = 0.0;
      if (p.has_plan != 0) weight = in_plan(unit, i, j) ? weight : 0.0;
      weights[local] = weight;
      changes[local] = weight > 0.0 ? weight * (grad_of_weight(row, key) - delta[3 * row]) * slope : 0.0;
      barrier();
      for (int e = 0; e < min(THREADS, last - base); e++) {
        const int from = (unit * p.unit_rows + base + e) * QUADS;
        [[unroll]] for (int m = 0; m < OWN; m++) {
          const int quad = from + min(m * THREADS + local, QUADS - 1);
          sum_key[m] = fma(vec4(changes[e]), wide(query[quad]), sum_key[m]);
          sum_value[m] = fma(vec4(weights[e]), wide(grad_out[quad]), sum_value[m]);
        }
      }
      barrier();
    }
  }
  [[unroll]] for (int m = 0; m < OWN; m++) {
    const int quad = m * THREADS + local;
    if (quad < QUADS) {
      grad_key[key * QUADS + quad] = narrow(sum_key[m]);
      grad_value[key * QUADS + quad] = narrow(sum_value[m]);
    }
  }
}

void main() {
  for (int j = int(gl_WorkGroupID.x); j < p.len_k; j += int(gl_NumWorkGroups.x)) gradients(int(gl_WorkGroupID.y), j);
}
