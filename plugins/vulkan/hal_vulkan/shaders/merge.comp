#version 450
#extension GL_GOOGLE_include_directive : require
#include "problem.glsl"

// Parts of the keys into the whole: part [splits, rows, QUADS], part_lse [splits, rows]. One invocation per float4.

layout(binding = 0) readonly buffer Part { vec4 part[]; };
layout(binding = 1) readonly buffer PartLse { float part_lse[]; };
layout(binding = 2) writeonly buffer Out { STORED result[]; };
layout(binding = 3) writeonly buffer Lse { float lse[]; };

void main() {
  const int rows = p.unit_rows;  // of all units together
  const int n = int(gl_GlobalInvocationID.x), row = n / QUADS;
  if (row >= rows) return;
  float top = -INFINITE, total = 0.0;
  for (int s = 0; s < p.splits; s++) top = max(top, part_lse[s * rows + row]);
  vec4 sum = vec4(0.0);
  if (top > -INFINITE) {
    for (int s = 0; s < p.splits; s++) {
      const float whole = part_lse[s * rows + row];
      const float weight = whole == -INFINITE ? 0.0 : exp(whole - top);
      total += weight;
      sum += part[s * rows * QUADS + n] * weight;
    }
    sum /= total;
  }
  result[n] = narrow(sum);
  if (n % QUADS == 0) lse[row] = top > -INFINITE ? top + log(total) : -INFINITE;
}
