#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"

// Parts of the keys into the whole: part [splits, rows, QUADS], part_sums [splits, rows]. STRANDS invocations per float4 share
// the splits.

layout(constant_id = 2) const int STRANDS = 1;

layout(binding = 0) readonly buffer Part { vec4 part[]; };
layout(binding = 1) readonly buffer PartSums { ROW_SUM part_sums[]; };
layout(binding = 2) writeonly buffer Out { STORED result[]; };
layout(binding = 3) writeonly buffer Lse { float lse[]; };

const int PLACES = THREADS / STRANDS;  // float4 of a work group
shared vec4 sums[THREADS];
shared float tops[THREADS], totals[THREADS];

void main() {
  const int rows = p.unit_rows;  // of all units together
  const int group = int(gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x);
  const int local = int(gl_LocalInvocationID.x), n = group * PLACES + local % PLACES, row = n / QUADS;
  float top = LOWEST, total = 0.0;
  vec4 sum = vec4(0.0);
  if (row < rows) {
    for (int s = local / PLACES; s < p.splits; s += STRANDS)
      if (part_sums[s * rows + row].y > 0.0) top = max(top, part_sums[s * rows + row].x);
    for (int s = local / PLACES; s < p.splits; s += STRANDS) {
      const ROW_SUM part_sum = part_sums[s * rows + row];
      if (part_sum.y <= 0.0) continue;  // without a key nothing was written
      const float weight = part_sum.y * exp(part_sum.x - top);
      total += weight;
      sum += part[s * rows * QUADS + n] * weight;
    }
  }
  if (STRANDS > 1) {
    sums[local] = sum;
    tops[local] = top;
    totals[local] = total;
    barrier();
    if (local >= PLACES) return;
    for (int m = local + PLACES; m < THREADS; m += PLACES) top = max(top, tops[m]);
    sum = vec4(0.0);
    total = 0.0;
    for (int m = local; m < THREADS; m += PLACES) {
      const float weight = exp(tops[m] - top);
      total += totals[m] * weight;
      sum += sums[m] * weight;
    }
  }
  if (row < rows) {
    result[n] = narrow(sum * (total > 0.0 ? 1.0 / total : 0.0));
    if (n % QUADS == 0) lse[row] = total > 0.0 ? top + log(total) : -INFINITE;
  }
}
